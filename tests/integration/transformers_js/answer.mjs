// node answer.mjs BUNDLE DTYPE: answers of transformers.js, greedy. DTYPE is JSON: null, "int8", {"embed_tokens": "q4", ...}.
// In: [{"question": text, "image": file or null, "max_new_tokens": number}]. Out: [{"text", "token_ids", "prompt"}].
import { readFileSync } from "node:fs";
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers";

const [bundle, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = "";
const processor = await AutoProcessor.from_pretrained(bundle);
const model = await AutoModelForImageTextToText.from_pretrained(bundle, {
  dtype: JSON.parse(dtype),
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const answers = [];
for (const { question, image, max_new_tokens } of JSON.parse(readFileSync(0, "utf-8"))) {
  const content = [...(image ? [{ type: "image" }] : []), { type: "text", text: question }];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = image ? await processor(await RawImage.read(image), text) : processor.tokenizer(text);
  const output = await model.generate({ ...inputs, max_new_tokens });
  const [prompt] = inputs.input_ids.tolist();
  const written = output.slice(null, [prompt.length, null]);
  const [answer] = processor.batch_decode(written, { skip_special_tokens: true });
  const [token_ids] = written.tolist();
  answers.push({ text: answer.trim(), token_ids: token_ids.map(Number), prompt: prompt.map(Number) });
}
console.log(JSON.stringify(answers));
