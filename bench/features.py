"""``python -m bench.features``: a search over frozen encoders with features kept, beside one that runs them anew.

An EfficientNet-Lite0 at five image sizes, three rounds from the smallest; every set trains its projector for eight
epochs, and is scored, by the very steps of a pipeline. Each side begins with an empty work folder in every round of the
bench, so making and writing features counts. Both must choose the same sets with the same scores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS, describe, write_result
from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file
from manyeyes.harness.base import Reporter
from manyeyes.harness.inputs import Pinned
from manyeyes.recipe import Recipe, change_recipe, load_recipe
from manyeyes.search.search import read_search
from manyeyes.steps.advance_search import advance_search
from manyeyes.steps.start_search import start_search
from manyeyes.steps.train_trial import train_trial

ROOT = Path(__file__).resolve().parents[1]
GOAL, TOLERANCE = 4.0, 1e-5
SOURCE = load_recipe("tiny").model.encoders[1].source
POOL: list[dict[str, Any]] = [
    {"name": f"lite0-{size}", "encoder": "efficientnet-lite0", "source": SOURCE, "image_size": size}
    for size in (224, 320, 384, 448, 512)
]
ROUNDS, EPOCHS, RECORDS, ITEMS = 3, 8, 16, 12


def search_recipe(*, keep: bool) -> Recipe:
    """Encoders stay as they are; the rest learns."""
    return change_recipe(
        load_recipe("tiny"),
        {
            "model.encoders": POOL,
            "stages.prealign": None,
            "stages.pretrain": None,
            "stages.sft.train": {"projector": 1e-3},
            "stages.sft.mixture": [{"dataset": "easy-vqa-train", "turns": "independent", "max_samples": RECORDS}],
            "stages.sft.epochs": EPOCHS,
            "stages.sft.batch_size": 8,
            "stages.sft.keep_features": keep,
            "evaluation.max_items": ITEMS,
            "evaluation.conditions": [],
        },
    )


def run(folder: Path, *, keep: bool, md5: str, remote: str) -> tuple[float, Any, list[float]]:
    """Seconds of CPU time; what was tried with which scores; losses at the end of each trial."""
    os.environ["MANYEYES_WORKDIR"] = str(folder / "work")
    whole = Pinned(search_recipe(keep=keep), data_md5=md5, data_remote=remote, code_digest="bench")
    reporter, state = Reporter("bench"), folder / "search-0"
    started = time.process_time()
    begun = start_search(
        reporter,
        pinned=whole.of("start_search").text(),
        search_start=POOL[0]["name"],
        search_rounds=ROUNDS,
        search_min_gain=0.0,
        search=state,
    )
    candidates: Any = begun.values["candidates"]
    for number in range(1, ROUNDS + 2):
        trials = [folder / f"trials-{number}-{place}" for place in range(len(candidates))]
        for trial, variants in zip(trials, candidates, strict=True):
            train_trial(
                reporter,
                variants=str(variants),
                pinned=whole.of("train_trial").text(),
                validation=folder / "validation",
                trial=trial,
            )
        after = folder / f"search-{number}"
        pinned = whole.of("advance_search").text()
        told = advance_search(reporter, pinned=pinned, before=state, trials=trials, search=after)
        candidates, state = told.values["candidates"], after
        if told.values["goes_on"] == "no":
            break
    seconds = time.process_time() - started
    search, found = read_search(state)
    scores = {key: own.mean for key, own in sorted(found.items())}
    losses = [found[key].stages[-1].final_loss for key in scores]
    return seconds, ([each.candidates for each in search.rounds], scores), losses


def main() -> int:
    """Measure in turn, and write the figures; exit 1 where the sides differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one = ("MANYEYES_THREADS", "MANYEYES_PROCESSES", "MANYEYES_EVALUATION_PROCESSES")
    os.environ.update(dict.fromkeys(one, "1"))
    os.environ.setdefault("MANYEYES_CACHE", str(ROOT / "runs" / "cache"))
    md5, remote = read_dvc_file(ROOT / "data.dvc").md5, str(ROOT / read_default_remote(ROOT))
    open_snapshot(md5=md5, remote=remote, cache_dir=Path(os.environ["MANYEYES_CACHE"]))
    seconds, gap, same, trials = [], 0.0, True, 0
    for number in range(arguments.rounds + 1):
        found = []
        for keep in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                found.append(run(Path(folder), keep=keep, md5=md5, remote=remote))
        (slow, chosen, losses), (fast, *kept) = found
        same, trials = same and chosen == kept[0], len(losses)
        gap = max(gap, *(abs(a / b - 1) for a, b in zip(losses, kept[1], strict=True)))
        print(f"  search: {slow / fast:.2f}", file=sys.stderr, flush=True)
        if number:
            seconds.append((slow, fast))
    evidence = {
        "trials": float(trials),
        "trials_chosen_or_scored_otherwise": float(not same),
        "loss_gap": gap,
        "equal": same and gap < TOLERANCE,
    }
    title = f"search over {len(POOL)} frozen encoders, {ROUNDS} rounds: encoders run in every trial / features kept"
    return write_result(describe(title, seconds, goal=GOAL, equal=evidence), arguments.out / "search.json")


if __name__ == "__main__":
    sys.exit(main())
