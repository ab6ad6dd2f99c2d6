"""``python -m bench.choice``: what choosing from one prefill saves against writing the answer.

The model is untrained and would write until it is cut, so the written side is cut where a trained model stops: behind
the answer and the end of the turn. Both sides share encoders and prefixes; what is saved is decoding alone. As
evidence, every choice is compared with one full forward pass an option, from image bytes and without any cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.__main__ import Comparison, measure
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file
from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.model import build_model, save_checkpoint
from manyeyes.recipe import load_recipe
from manyeyes.runtime import Group
from manyeyes.runtime.chat import encode_answers

IMAGES = 8
LETTERS = ("A", "B", "C", "D")
SUFFIX = "\nA. yes\nB. no\nC. red\nD. circle\nAnswer with the option's letter from the given choices directly."


def compare(
    name: str, answerer: TorchAnswerer, images: Sequence[tuple[bytes, Sequence[str]]], options: tuple[str, ...]
) -> Comparison:
    """Write, or choose between options, the answers to questions on images."""
    chosen = [Group((image,), tuple(questions), (options,) * len(questions)) for image, questions in images]
    written = [Group(group.images, group.questions) for group in chosen]
    processor = answerer.processor
    encoded = encode_answers(
        processor.rust_tokenizer,
        processor.conversation_template,
        [("human", images[0][1][0])],
        options,
        stop_ids=processor.stop_token_ids,
        system=processor.system,
    )
    longest = max(len(ids) for ids in encoded)
    count = sum(len(group.questions) for group in chosen)

    def equal(_: object, choices: object) -> tuple[str, bool]:
        expected = [
            choose_alone(answerer, group.images[0], question, options)
            for group in chosen
            for question in group.questions
        ]
        same = sum(ours == theirs for ours, theirs in zip(choices, expected, strict=True))  # type: ignore[call-overload]
        return f"{same} of {count} choices are those of a full forward pass an option", same == count

    def write() -> object:
        return answerer.answer_groups(written, max_new_tokens=longest)

    def choose() -> object:
        return [answer.text for group in answerer.answer_groups(chosen, max_new_tokens=1) for answer in group]

    shape = f"{count} questions on {len(images)} images, {len(options)} options"
    return Comparison(
        f"{name}, {shape}: up to {longest} tokens written / chosen after one prefill", write, choose, equal
    )


@torch.inference_mode()
def choose_alone(answerer: TorchAnswerer, image: bytes, question: str, options: Sequence[str]) -> str:
    """The likeliest first token's option; of several with that token the likeliest whole one."""
    found = []
    for option in options:
        batch = answerer.processor(
            images=[[image]], conversations=[[("human", f"<image>\n{question}"), ("gpt", option)]]
        )
        labels = batch.pop("labels")[0]
        scores = answerer.model(**batch).logits[0].double().log_softmax(-1)
        places = (labels != -100).nonzero().flatten()
        own = scores[places - 1, labels[places]]
        found.append((int(labels[places[0]]), float(own[0]), float(own.sum()), option))
    best = max(found, key=lambda each: each[1])[0]
    return max((each for each in found if each[0] == best), key=lambda each: each[2])[3]


def main() -> int:
    """Run both comparisons; exit 1 if a choice is another than that of full forward passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[1]
    snapshot = open_snapshot(
        md5=read_dvc_file(root / "data.dvc").md5,
        remote=str(root / read_default_remote(root)),
        cache_dir=root / "runs" / "cache",
    )
    recipe = load_recipe("tiny")
    model, processor = build_model(recipe.model, snapshot_path=snapshot.path, seed=recipe.seed)
    reader = RecordReader(snapshot.shards("easy-vqa-val"))
    records = [reader.read(index) for index in range(IMAGES)]
    asked = [
        (record.images[0].data, [turn.text.replace("<image>\n", "") for turn in record.turns[::2]])
        for record in records
    ]
    one_each = [(image, [questions[0] + SUFFIX]) for image, questions in asked]
    easy_vqa = BENCHMARKS["easy-vqa"]
    assert easy_vqa.options is not None
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, processor, Path(folder) / "checkpoint")
        answerer = TorchAnswerer(Path(folder) / "checkpoint", threads=1)
        print("| comparison | written, CPU s | chosen, CPU s | ratio, median (quartiles) | results |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        comparisons = [
            compare(
                "letters", answerer, [(image, [q + SUFFIX for q in questions]) for image, questions in asked], LETTERS
            ),
            compare("letters", answerer, one_each, LETTERS),
            compare("easy-VQA's answers", answerer, asked, tuple(easy_vqa.options({}))),
        ]
        equal = [measure(comparison, arguments.rounds) for comparison in comparisons]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
