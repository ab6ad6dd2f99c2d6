"""Our scorers beside the peers' own functions, answer by answer: ``python -m bench.scorers``.

Peers are lmms-eval and VLMEvalKit; ours score with ``variant=lmms`` and ``variant=vlmevalkit``. The answers are those
of ``scorer_cases``. Exit 1 where a score differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers_install import SCORER_PACKAGES, get_vlmevalkit, make_peer_python, make_vlmevalkit_python
from bench.scorer_cases import cases
from manyeyes.evaluation.benchmarks import find_benchmark

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "bench"
WORKER = Path(__file__).with_name("scorers_worker.py")
SHOWN = 5

Cases = Mapping[str, list[tuple[dict[str, Any], str]]]


@dataclass(frozen=True)
class Peer:
    """Whose scores ours are compared with.

    Attributes:
        name: For the report.
        variant: Ours.
        module: Beside the worker; has ``scores``.
        python: Has what ``module`` imports.
        environment: Variables that ``module`` reads.
    """

    name: str
    variant: str
    module: str
    python: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def find_lmms_eval(python: Path | None) -> tuple[Peer | None, str]:
    """lmms-eval, installed under runs/ unless a Python that has it is given; and what was done."""
    found, done = (python, "") if python else make_peer_python(RUNS / "lmms-eval", further=SCORER_PACKAGES)
    return (Peer("lmms-eval", "lmms", "scorers_lmms", found) if found else None), done


def find_vlmevalkit(source: Path | None) -> tuple[Peer | None, str]:
    """VLMEvalKit, fetched under runs/ unless a folder with its source is given; and what was done."""
    folder, done = (source, f"VLMEvalKit: {source}") if source else get_vlmevalkit(RUNS / "vlmevalkit" / "source")
    if folder is None:
        return None, done
    python, installed = make_vlmevalkit_python(RUNS / "vlmevalkit" / "python")
    if python is None:
        return None, installed
    environment = {"VLMEVALKIT": str(folder.resolve())}
    return Peer("VLMEvalKit", "vlmevalkit", "scorers_vlmevalkit", python, environment), f"{done}\n{installed}"


def compare(peer: Peer, asked: Cases) -> int:
    """Print a line a benchmark and the first differences; how many there are.

    Raises:
        SystemExit: The peer did not score them all.
    """
    own = {name: items for name, items in asked.items() if peer.variant in find_benchmark(name).variants}
    lines = "".join(json.dumps({"benchmark": name, "items": items}) + "\n" for name, items in own.items())
    scored = subprocess.run(
        [str(peer.python), str(WORKER), peer.module],
        input=lines,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, **peer.environment},
    )
    theirs = [json.loads(line) for line in scored.stdout.splitlines()]
    if len(theirs) != len(own):
        raise SystemExit(f"{peer.name} did not score them all:\n" + "\n".join(scored.stderr.splitlines()[-8:]))
    found = compared = 0
    print(f"\n| {peer.name} | answers | left to a judge | different |\n| --- | --- | --- | --- |")
    for (name, items), scores in zip(own.items(), theirs, strict=True):
        grade = find_benchmark(name).grade
        different = []
        for (row, answer), score in zip(items, scores, strict=True):
            if score is None:
                continue
            ours = grade({"id": "1", "row_number": 0, **row}, answer, peer.variant).score
            if abs(ours - score) > 1e-9:
                different.append((answer, row.get("answer", row.get("answers", "")), score, ours))
        found += len(different)
        judged = scores.count(None)
        compared += len(scores) - judged
        print(f"| {name} | {len(items):,} | {judged:,} | {len(different):,} |", flush=True)
        for answer, reference, score, ours in different[:SHOWN]:
            print(f"  {answer!r} for {reference!r}: {peer.name} {score:g}, ours {ours:g}")
    print(f"{compared:,} compared, {found:,} different", flush=True)
    return found


def main() -> int:
    """Compare with every peer that can be had; exit 1 where a score differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, help="A Python that has lmms-eval; made under runs/ if left out.")
    parser.add_argument("--vlmevalkit", type=Path, help="VLMEvalKit's source; fetched into runs/ if left out.")
    parser.add_argument("--benchmarks", help="Some of them, with commas between.")
    arguments = parser.parse_args()
    chosen = arguments.benchmarks.split(",") if arguments.benchmarks else None
    asked = {name: items for name, items in cases().items() if chosen is None or name in chosen}
    different = 0
    for peer, done in (find_lmms_eval(arguments.peer_python), find_vlmevalkit(arguments.vlmevalkit)):
        print(done)
        if peer is not None:
            different += compare(peer, asked)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
