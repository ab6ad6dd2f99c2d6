"""Ours against lmms-eval and a plain ``generate`` loop, on one checkpoint: ``python -m bench.peers``.

A small LLaVA is made on the spot in transformers' format and converted with ``manyeyes convert``; photographs come from
scikit-image, as JPEG files. Every side is a process of its own with one thread that answers the same questions
greedily in fp32; its CPU time is taken, loading left out. Rounds are interleaved and the first is dropped; a ratio is
the median of the rounds' own ratios. Answers that are not all equal fail the bench.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from bench.contamination import encode, photographs
from bench.peers_install import make_peer_python
from bench.peers_model import PeerModel, write_peer_model
from manyeyes.converters.convert import convert
from manyeyes.export.bundle import export_bundle
from manyeyes.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("peers_worker.py")
OURS = ("manyeyes", "bundle")
# Images of a set by its questions an image, so that each set has 24 to 30 questions.
IMAGES = {30: 1, 8: 3, 1: 24}
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass
class Side:
    """A worker process.

    Attributes:
        name: A row of ``peers_worker.SIDES``.
        process: Reads requests, writes answers.
        log: What its libraries print.
        versions: Of its packages.
        peak_rss_mib: Most memory that it held so far.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path
    versions: dict[str, str] = field(default_factory=dict)
    peak_rss_mib: float = 0.0

    @classmethod
    def start(cls, name: str, checkpoint: Path, python: Path) -> Self:
        """Start a worker and let it load its model."""
        log = checkpoint.with_name(f"{name}.log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [str(python), str(WORKER), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        side = cls(name, process, log)
        side.versions = side._exchange({"checkpoint": str(checkpoint)})["versions"]
        return side

    def answer(self, requests: Requests, *, max_new_tokens: int, batch_size: int) -> tuple[list[str], float]:
        """Answers and CPU seconds."""
        call = {"requests": requests, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        result = self._exchange(call)
        self.peak_rss_mib = result["peak_rss_mib"]
        # Our answers are stripped; lmms-eval's tasks strip them before they score.
        return [text.strip() for text in result["answers"]], result["cpu_s"]

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8").strip().splitlines()[-12:]
            raise SystemExit("\n".join([f"{self.name} ended with {self.process.wait()}:", *last]))
        result: dict[str, Any] = json.loads(line)
        return result


Requests = Sequence[tuple[str, str]]


def write_questions(folder: Path, *, per_image: int, images: int) -> list[tuple[str, str]]:
    """Image file and prompt of each question; the questions of an image differ, and images are photographs.

    Args:
        folder: Where JPEG files go.
        per_image: Questions on each image.
        images: How many.
    """
    things = ("cat", "rocket", "coin", "person", "cup", "clock", "brick", "galaxy", "motorcycle", "letter")
    asked = (
        "Is there a {thing} in the picture?\nAnswer the question using a single word or phrase.",
        "What colour is the {thing}?\nAnswer the question using a single word or phrase.",
        "How many of them are there, not counting any {thing}?\nAnswer the question using a single word or phrase.",
    )
    questions = [text.format(thing=thing) for thing in things for text in asked]
    requests = []
    for number, picture in enumerate(list(photographs().values())[:images]):
        file = folder / f"{number}.jpg"
        file.write_bytes(encode(picture, quality=90))
        chosen = [questions[(number + step) % len(questions)] for step in range(per_image)]
        requests += [(str(file), question) for question in chosen]
    return requests


def measure(sides: Sequence[Side], requests: Requests, arguments: argparse.Namespace, *, per_image: int) -> bool:
    """Run every side in turn and print a line a pair; whether all answers are equal."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    answers: dict[str, list[str]] = {}
    for round_number in range(arguments.rounds + 1):
        for side in sides:
            found, cpu_s = side.answer(
                requests, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
            )
            if answers.setdefault(side.name, found) != found:
                raise SystemExit(f"{side.name} answered differently in round {round_number}")
            if round_number:
                seconds[side.name].append(cpu_s)
    all_equal = True
    for peer in (side.name for side in sides if side.name not in OURS):
        for ours in (side.name for side in sides if side.name in OURS):
            same = sum(a == b for a, b in zip(answers[peer], answers[ours], strict=True))
            all_equal &= same == len(requests)
            ratios = [slow / fast for slow, fast in zip(seconds[peer], seconds[ours], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            slow, fast = statistics.median(seconds[peer]), statistics.median(seconds[ours])
            verdict = "equal" if same == len(requests) else "DIFFERENT"
            print(
                f"| {per_image} | {peer} / {ours} | {slow:.2f} | {fast:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) "
                f"| {verdict}: {same} of {len(requests)} |",
                flush=True,
            )
            for (_, question), theirs, own in zip(requests, answers[peer], answers[ours], strict=True):
                if theirs != own:
                    print(f"{peer} {theirs!r}, {ours} {own!r}: {question!r}")
    distinct = len(set(answers[sides[0].name]))
    print(f"({distinct} distinct answers to {len(requests)} questions)", file=sys.stderr)
    return all_equal


def probe() -> float:
    """Seconds of a matrix product: shows whether something else held the processor."""
    left = torch.ones(1024, 1024)
    started = time.perf_counter()
    for _ in range(10):
        left @ left
    return time.perf_counter() - started


def describe_processor() -> str:
    """Name and vector instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return f"{named} ({', '.join(flag for flag in _FLAGS if flag in flags)})"


def main() -> int:
    """Make the checkpoint, start every side, measure; exit 1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, help="A Python that has lmms-eval; made under runs/ if left out.")
    parser.add_argument("--sides", default="lmms-eval,generate,manyeyes,bundle", help="Which to run.")
    parser.add_argument("--sets", default="30,8,1", help="Questions an image.")
    parser.add_argument("--images", help="Images of each set; by default N that a set has 24 to 30 questions.")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="Images a batch on our sides, as in a recipe.")
    parser.add_argument("--image-size", type=int, default=224, choices=(224, 336))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.sides.split(",")
    pythons = dict.fromkeys(names, Path(sys.executable))
    if "lmms-eval" in names:
        found, done = (
            (arguments.peer_python, f"lmms-eval: of {arguments.peer_python}")
            if arguments.peer_python
            else make_peer_python(ROOT / "runs" / "bench" / "lmms-eval")
        )
        print(done, flush=True)
        if found is None:
            names.remove("lmms-eval")
        else:
            pythons["lmms-eval"] = found
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_peer_model(folder / "published", PeerModel(image_size=arguments.image_size))
        convert(folder / "published", folder / "manyeyes")
        if "bundle" in names:
            recipe = load_recipe("tiny")
            export_bundle(folder / "manyeyes", folder / "bundle", recipe=recipe, data_md5="", code_digest="")
        folders = {name: folder / (name if name in OURS else "published") for name in names}
        sides = [Side.start(name, folders[name], pythons[name]) for name in names]
        versions = {name: number for side in sides for name, number in side.versions.items()}
        print(f"{parameters / 1e6:.0f} million parameters, images of {arguments.image_size} pixels, fp32, one thread, ")
        print(f"at most {arguments.max_new_tokens} new tokens, {arguments.rounds} rounds; {describe_processor()}; ")
        print(", ".join(f"{name} {number}" for name, number in sorted(versions.items())))
        print("\n| questions an image | peer / ours | peer, CPU s | ours, CPU s | ratio (quartiles) | answers |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        before, equal = probe(), True
        sets = [int(each) for each in arguments.sets.split(",")]
        counts = [int(each) for each in arguments.images.split(",")] if arguments.images else None
        for place, per_image in enumerate(sets):
            images = counts[place] if counts else IMAGES.get(per_image, max(1, 24 // per_image))
            requests = write_questions(folder, per_image=per_image, images=images)
            equal &= measure(sides, requests, arguments, per_image=per_image)
        print("\nPeak memory, MiB: " + ", ".join(f"{side.name} {side.peak_rss_mib:,.0f}" for side in sides))
        print(f"A matrix product took {100 * (probe() / before - 1):+.0f}% of its time after what it took before.")
        for side in sides:
            side.process.communicate("")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
