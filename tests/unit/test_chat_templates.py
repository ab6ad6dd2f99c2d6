"""The tokenizer's own chat template, written down as text around turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from manyeyes.chat import find_chat_template, read_tokenizer_template
from manyeyes.errors import RecipeError, RecordError, SourceError
from manyeyes.model import build_model
from manyeyes.processor import ManyEyesProcessor
from manyeyes.runtime.chat import CHAT_TEMPLATES, ChatTemplate, encode_conversation, render_turns
from manyeyes.tokenizer_files import load_tokenizer
from tests.model_toys import toy_config, toy_images, toy_spec, write_language_model, write_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A system text of its own where the conversation has none, as Qwen2's.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The system text inside the first question.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set told = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}{% for m in rest %}"
    "{% set text = '<<SYS>>\n' + told + '\n<</SYS>>\n\n' + m['content'] if loop.first and told else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# What no text around turns can say: the last answer is written otherwise than the others, the end otherwise than a
# turn's end, a turn is repeated, turns are numbered.
THINKING = CHATML.replace("m['content']", "('<think></think>' if loop.last else '') + m['content']")
LAST_WORD = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
REPEATING = CHATML.replace("+ m['content']", "+ m['content'] + m['content']")
NUMBERED = CHATML.replace("'<|im_start|>'", "'<|im_start|>' ~ loop.index ~ ' '")
REFUSING = "{{ raise_exception('never') }}"

TURNS = [("human", "<image>\nQ"), ("gpt", "A"), ("human", "QQ"), ("gpt", "AA")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def tokenizer_with(folder: Path, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "system"),
    [
        *((template, None) for template in (CHATML, DEFAULT_SYSTEM, LLAMA_3, LLAMA_2, GEMMA)),
        *((template, "Be kind.") for template in (CHATML, DEFAULT_SYSTEM, LLAMA_3, LLAMA_2)),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_text_is_what_the_tokenizer_writes(folder: Path, template: str, count: int, system: str | None) -> None:
    tokenizer = tokenizer_with(folder, template)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": "system", "content": system}] * (system is not None)
    messages += [{"role": roles[speaker], "content": text} for speaker, text in TURNS[:count]]
    asks = count % 2 == 1
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    read = read_tokenizer_template(tokenizer)
    assert render_turns(read, TURNS[:count], system=system, generation_prompt=asks) == expected


def test_ids_are_the_tokenizers_own_with_answers_and_ends_counted(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, LLAMA_2)
    turns = [("human", "what colour?"), ("gpt", "red")]
    encoded = encode_conversation(
        tokenizer.backend_tokenizer, read_tokenizer_template(tokenizer), turns, image_tokens=[], image_token_id=3
    )
    messages = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "red"}]
    assert encoded.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    counted = [token for token, is_counted in zip(encoded.input_ids, encoded.supervised, strict=True) if is_counted]
    assert tokenizer.decode(counted) == " red </s>"
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_template_that_refuses_a_system_text_has_no_place_for_one(folder: Path) -> None:
    read = read_tokenizer_template(tokenizer_with(folder, GEMMA))
    with pytest.raises(RecipeError, match="no place"):
        render_turns(read, TURNS, system="Be kind.")


def test_what_is_read_are_fields_of_a_template(folder: Path) -> None:
    assert read_tokenizer_template(tokenizer_with(folder, DEFAULT_SYSTEM)) == ChatTemplate(
        name="tokenizer",
        system="You are a helpful assistant.",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        human_prefix="<|im_start|>user\n",
        gpt_prefix="<|im_end|>\n<|im_start|>assistant\n",
        gpt_end="<|im_end|>",
        gpt_after="\n",
        adds_bos=False,
    )


@pytest.mark.parametrize("template", [THINKING, LAST_WORD, REPEATING, NUMBERED, REFUSING])
def test_template_that_is_more_than_text_around_turns_is_refused(folder: Path, template: str) -> None:
    with pytest.raises(RecipeError, match="cannot be written as text around turns"):
        read_tokenizer_template(tokenizer_with(folder, template))


def test_tokenizer_without_a_template_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="carries no chat template"):
        find_chat_template("tokenizer", tokenizer_with(folder, None))
    assert find_chat_template("plain", tokenizer_with(folder, None)) is CHAT_TEMPLATES["plain"]


def processor_of(folder: Path, template: str, *, system: str | None = None) -> ManyEyesProcessor:
    return ManyEyesProcessor(
        tokenizer_with(folder, LLAMA_2),
        transforms={},
        template=template,
        system=system,
        num_image_tokens=2,
        image_token_id=3,
        max_length=256,
    )


def test_processor_with_the_tokenizers_template_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    processor = processor_of(folder, "tokenizer", system="S")
    processor.save_pretrained(tmp_path / "saved")
    again = ManyEyesProcessor.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again.conversation_template == processor.conversation_template
    assert again.encode(TURNS, num_images=1) == processor.encode(TURNS, num_images=1)
    assert again.stop_token_ids == [processor.tokenizer.eos_token_id]


def test_processor_refuses_a_system_text_without_a_place(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no place"):
        processor_of(folder, "gemma", system="S")


@pytest.mark.parametrize(("placeholders", "images"), [(1, 0), (1, 2), (2, 1), (0, 1)])
def test_prompt_with_more_or_fewer_placeholders_than_images_is_refused(
    folder: Path, placeholders: int, images: int
) -> None:
    processor = processor_of(folder, "vicuna_v1")
    turns = [("human", "<image>\n" * placeholders + "what colour?")]
    with pytest.raises(RecordError, match=rf"{placeholders} <image> and {images} images"):
        processor.encode(turns, num_images=images)
    with pytest.raises(RecordError, match="one placeholder per image"):
        processor(images=[toy_images(images)], conversations=[turns])


def test_vocabulary_smaller_than_the_tokenizer_is_refused_when_the_model_is_built(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(toy_config(size - 3)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=rf"3 tokens beyond the language model's vocabulary.* is {size - 3}"):
        build_model(toy_spec(tmp_path), snapshot_path=None, seed=1)


def test_vocabulary_larger_than_the_tokenizer_is_fine(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(toy_config(size + 5)).save_pretrained(tmp_path)
    model, _ = build_model(toy_spec(tmp_path), snapshot_path=None, seed=1)
    assert model.language_model.get_input_embeddings().weight.shape[0] == size + 5


def test_model_is_built_with_the_tokenizers_template(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    tokenizer_with(tmp_path, LLAMA_2).save_pretrained(tmp_path)
    model, processor = build_model(
        toy_spec(tmp_path, chat={"template": "tokenizer"}), snapshot_path=None, seed=1, encoders=["vit"]
    )
    assert model.generation_config.eos_token_id == processor.stop_token_ids == [2]
    batch = processor(images=toy_images(1), text="what colour?")
    shown = processor.tokenizer.decode(batch["input_ids"][0])
    assert shown.startswith("<s>[INST] <image>")
    assert shown.endswith("\nwhat colour? [/INST]")
