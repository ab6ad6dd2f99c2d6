"""Bundles that make no sense: ``python -m bench.bundles`` tampers with a thousand, loads each and asks it something.

Each runs in a process of its own, so that one which ends its process is counted and not the end of the run. Whatever is
no answer and none of our errors is a fault, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from manyeyes.recipe import load_recipe
from tests.bundle_tampering import tampered, use
from tests.export_toys import make_toy


def run(bundle: Path) -> str:
    """What becomes of a bundle in a process of its own."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what ONNX Runtime and Rust say themselves
        try:
            outcome = use(bundle)
        except BaseException as error:  # noqa: BLE001  (a fault is what is looked for)
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"FAULT {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        os.write(writer, outcome.encode("utf-8", "replace")[:2000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        outcome = stream.read().decode("utf-8", "replace")
    _, status = os.waitpid(process, 0)
    return outcome if os.WIFEXITED(status) and outcome else f"KILLED by signal {os.WTERMSIG(status)}"


def main() -> int:
    """Tamper, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=16)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Exported in a process of its own: a process that has run torch is no good to fork.
        if os.fork() == 0:
            make_toy(folder, load_recipe("tiny"))
            os._exit(0)
        os.wait()
        for what, copied in tampered(folder / "bundle", folder, seed=options.seed, count=options.count):
            outcome = run(copied)
            outcomes[outcome.split(":")[0] if outcome.startswith(("FAULT", "KILLED")) else outcome] += 1
            if outcome.startswith(("FAULT", "KILLED")):
                print(f"{what}\n    {outcome}", flush=True)
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    return int(any(outcome.startswith(("FAULT", "KILLED")) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
