"""``python -m bench.smol CHECKPOINT LANGUAGE_MODEL``: what recipe ``smol`` learned, and whether it kept its language.

Asks the checkpoint easy-VQA's test questions in a word, with the image and without, and in a sentence; then compares
its language model with the one that it was trained from: perplexity of English prose (the standard library's
documentation, which is in no training data of the recipe), and answers to ten questions without an image.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyeyes.data.builders.easy_vqa import IN_A_SENTENCE, answer_in_a_sentence
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file
from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
from manyeyes.evaluation.benchmarks.easy_vqa import parse
from manyeyes.model.language_model import load_language_model
from manyeyes.runtime.bundle import Group
from manyeyes.tokenizer_files import load_tokenizer
from manyeyes.training.stage import read_stage_report
from manyeyes.training.warmup import standard_library_prose

PROMPTS = (
    "What is the capital of France?",
    "What is 2 plus 3?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "Translate into French: good morning.",
    "What do bees make?",
    "Why is the sky blue?",
    "Give me a tip for sleeping well.",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
)
_SENTENCE = re.compile(r"[A-Z][^.?!]*(?: [^.?!]+){2,}[.]")


def is_sentence(text: str) -> bool:
    """Whether a text is one sentence of three words or more: a capital in front, a full stop at the end."""
    return _SENTENCE.fullmatch(text.strip()) is not None


@torch.inference_mode()
def perplexity(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Of ``[N, T]`` token ids, each row by itself; its first token is given."""
    losses = [functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in blocks]
    return math.exp(sum(losses) / len(losses))


def prose_blocks(tokenizer: PreTrainedTokenizerBase, *, blocks: int, tokens: int) -> torch.Tensor:
    """The first ``[blocks, tokens]`` token ids of the prose."""
    ids: list[int] = []
    for text in standard_library_prose():
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= blocks * tokens:
            break
    return torch.tensor(ids[: blocks * tokens]).view(blocks, tokens)


@torch.inference_mode()
def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int) -> list[str]:
    """Greedy answers to PROMPTS, by the tokenizer's own template."""
    answers = []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip())
    return answers


def ask(answerer: TorchAnswerer, groups: Sequence[Group], *, max_new_tokens: int) -> list[str]:
    """Answers in order, sixteen images at a time."""
    batches = [groups[start : start + 16] for start in range(0, len(groups), 16)]
    return [
        answer.text
        for batch in batches
        for own in answerer.answer_groups(batch, max_new_tokens=max_new_tokens)
        for answer in own
    ]


def ask_easy_vqa(answerer: TorchAnswerer, *, images: int) -> dict[str, Any]:
    """Percent right on the questions of the first test images."""
    snapshot = open_snapshot(
        md5=read_dvc_file(Path("data.dvc")).md5, remote=read_default_remote(Path()), cache_dir=Path("runs/cache")
    )
    reader = RecordReader(snapshot.shards("easy-vqa-test"))
    asked = []
    for number in range(min(images, snapshot.dataset("easy-vqa-test").rows)):
        record = reader.read(number)
        texts = [turn.text.removeprefix("<image>\n") for turn in record.turns]
        asked.append((record.images[0].data, list(zip(texts[0::2], texts[1::2], strict=True))))
    pairs = [pair for _, own in asked for pair in own]

    def groups(*, shown: bool, behind: str = "") -> list[Group]:
        return [
            Group(images=(data,) if shown else (), questions=tuple(question + behind for question, _ in own))
            for data, own in asked
        ]

    def percent(right: Sequence[bool]) -> float:
        return round(100 * sum(right) / len(right), 2)

    word = ask(answerer, groups(shown=True), max_new_tokens=6)
    blind = ask(answerer, groups(shown=False), max_new_tokens=6)
    sentence = ask(answerer, groups(shown=True, behind=f" {IN_A_SENTENCE}"), max_new_tokens=16)
    wanted = [answer_in_a_sentence(*pair) for pair in pairs]
    return {
        "images": len(asked),
        "questions": len(pairs),
        "right": percent([parse(text) == answer for text, (_, answer) in zip(word, pairs, strict=True)]),
        "right_without_image": percent([parse(text) == answer for text, (_, answer) in zip(blind, pairs, strict=True)]),
        "are_sentences": percent([is_sentence(text) for text in sentence]),
        "are_the_right_sentence": percent([text.strip() == own for text, own in zip(sentence, wanted, strict=True)]),
        "examples": [
            {"question": question, "answer": answer, "word": one, "sentence": whole}
            for (question, answer), one, whole in list(zip(pairs, word, sentence, strict=True))[:12]
        ],
    }


def draw(stages: Sequence[Path], path: Path) -> None:
    """The loss of each stage against the tokens' share of the whole, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for place, folder in zip(axes, stages, strict=True):
        report = read_stage_report(folder)
        place.plot([point.step for point in report.history], [point.loss for point in report.history], linewidth=1.2)
        place.set(title=report.stage, xlabel="optimizer step", yscale="log")
        place.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("loss per supervised token")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the figures as JSON, each part as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("language_model", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="First N test images.")
    parser.add_argument("--blocks", type=int, default=32, help="Of 128 tokens of prose.")
    parser.add_argument("--new-tokens", type=int, default=32, help="Longest answer without an image.")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="PATH", help="SVG to write, then folders of stages.")
    given = parser.parse_args()
    if given.draw:
        draw(given.draw[1:], given.draw[0])
    answerer = TorchAnswerer(given.checkpoint)
    begun = time.process_time()
    print(json.dumps({"easy_vqa": ask_easy_vqa(answerer, images=given.images)}, indent=1), flush=True)
    tokenizer = load_tokenizer(given.language_model)
    blocks = prose_blocks(tokenizer, blocks=given.blocks, tokens=128)
    models = {
        "before": load_language_model(given.language_model, pretrained=True),
        "after": answerer.model.language_model,
    }
    figures = {name: perplexity(model, blocks) for name, model in models.items()}
    print(json.dumps({"perplexity": figures, "ratio": figures["after"] / figures["before"]}, indent=1), flush=True)
    said = {name: chat(model, tokenizer, max_new_tokens=given.new_tokens) for name, model in models.items()}
    rows = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(PROMPTS, said["before"], said["after"], strict=True)
    ]
    print(json.dumps({"prompts": rows, "equal": sum(row["before"] == row["after"] for row in rows)}, indent=1))
    print(json.dumps({"cpu_s": time.process_time() - begun, "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
