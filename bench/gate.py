"""``python -m bench.gate``: our gate beside Great Expectations as its users run it, and beside ``dvc add``.

Ours is what ``manyeyes data validate`` does: profile, suite and page. Theirs reads the same shards into a table, finds
the same facts of each row by the same functions, and runs the same expectations in an ephemeral context with complete
results and Data Docs. Verdicts and the samples against each expectation must be equal. Three ratios: records that share
images as those of a VQA set do (ten an image), a tenth as many with an image each, and a snapshot of the first kind of
which one shard in a hundred changed; there ours knows what it found before. Great Expectations itself takes half a
second on both sides, so a small snapshot shows little else. The fourth is the fingerprint of the folder with an image
each: ``dvc add``, whose md5 must be ours.

Seconds are those of the processor. Packages are imported before anything is measured, but for the fourth, where each
side is a command with its start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from bench import RESULTS, describe, write_result
from bench.validation import DATASET, make_images, make_snapshot
from manyeyes.data.records import (
    ImageFile,
    Turn,
    find_checksum_problem,
    find_decoding_problem,
    find_drawing_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
)
from manyeyes.data.snapshot import open_folder
from manyeyes.data.validation import validate_snapshot

SIZE = 100_000
SHARDS = 100
Outcome = dict[str, tuple[bool, int]]
"""Of each expectation whether it is met, and how many samples are against it."""


def find_facts(row: Any) -> dict[str, object]:
    """What the suite asks about one row of a shard."""
    images = [
        ImageFile(image["bytes"], image["path"], sha256, width, height)
        for image, sha256, width, height in zip(row.images, row.sha256, row.width, row.height, strict=True)
    ]
    turns = [Turn(turn["from"], turn["value"]) for turn in row.conversations]
    roles, checksums = find_role_problem(turns), find_checksum_problem(images)
    placeholders = find_placeholder_problem(turns, num_images=len(images))
    decoding = find_decoding_problem(images)
    problem = find_id_problem(row.id) or roles or placeholders or find_drawing_problem(turns) or checksums or decoding
    width, height = (images[0].width, images[0].height) if images else (0, 0)
    return {
        "id": row.id,
        "is_eval": False,
        "in_eval_set": False,
        "n_images": len(images),
        "width": width,
        "height": height,
        "aspect": max(width, height) / min(width, height) if images else 1.0,
        "decode_ok": decoding is None,
        "roles_ok": roles is None,
        "placeholders_ok": placeholders is None,
        "text_chars": sum(len(turn.text) for turn in turns),
        "sha256": hashlib.sha256(images[0].data).hexdigest() if images else "",
        "sha256_ok": checksums is None,
        "problem": "" if problem is None else str(problem),
    }


def run_theirs(folder: Path) -> Outcome:
    """Great Expectations over a table of all rows, with its page."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    rows = pd.concat(pd.read_parquet(path) for path in sorted((folder / "records").glob("*.parquet")))
    table = pd.DataFrame([find_facts(row) for row in rows.itertuples(index=False)])
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("pandas").add_dataframe_asset("records")
    text = resources.files("manyeyes").joinpath("data", "suites", "conversations.json").read_text(encoding="utf-8")
    built = [ExpectationConfiguration(**each).to_domain_obj() for each in json.loads(text)["expectations"]]
    suite = context.suites.add(gx.ExpectationSuite(name="conversations", expectations=built))
    data = asset.add_batch_definition_whole_dataframe("whole")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="gate", data=data, suite=suite))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="gate",
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
        )
    )
    (run,) = checkpoint.run(batch_parameters={"dataframe": table}).run_results.values()
    return {
        result.expectation_config.meta["name"]: (bool(result.success), int(result.result.get("unexpected_count", 0)))
        for result in run.results
    }


def run_ours(folder: Path, out: Path, cache: Path | None) -> Outcome:
    """Our gate; what it knows lies in ``cache``."""
    report = validate_snapshot(
        open_folder(folder), datasets=[DATASET], eval_datasets=[], suite="conversations", out_dir=out, cache_dir=cache
    )
    return {each.name: (each.success, each.unexpected_count) for each in report.expectations}


def measure(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[list[Any], list[Any]]:
    """Both sides in turn; seconds of the processor by round, and the last results."""
    seconds, results = [], []
    for number in range(rounds + 1):
        times = [time.process_time()]
        results = []
        for side in (theirs, ours):
            results.append(side())
            times.append(time.process_time())
        if number:
            seconds.append((times[1] - times[0], times[2] - times[1]))
        print(f"round {number}: {times[1] - times[0]:.2f} / {times[2] - times[1]:.2f}", file=sys.stderr, flush=True)
    return seconds, results


def spent_by(command: list[str], **options: Any) -> float:
    """Processor seconds of a command and all that it starts."""

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return children() - before


def compare_fingerprints(folder: Path, work: Path, rounds: int) -> tuple[list[tuple[float, float]], tuple[str, str]]:
    """``dvc add`` of the folder in a repository of its own, and our md5 of it."""
    from manyeyes.data.snapshot import hash_folder, read_dvc_file

    dvc = str(Path(sys.executable).with_name("dvc"))
    seconds, md5s = [], ("", "")
    code = (
        f"from pathlib import Path; from manyeyes.data.snapshot import open_folder; open_folder(Path({str(folder)!r}))"
    )
    for number in range(rounds + 1):
        repository = work / str(number)
        shutil.copytree(folder, repository / "data")
        subprocess.run([dvc, "init", "--no-scm", "--quiet"], check=True, cwd=repository)
        theirs = spent_by([dvc, "add", "--quiet", "data"], cwd=repository)
        ours = spent_by(
            [sys.executable, "-c", code], env={**os.environ, "MANYEYES_CACHE": str(work / f"kept-{number}")}
        )
        if number:
            seconds.append((theirs, ours))
        md5s = read_dvc_file(repository / "data.dvc").md5, hash_folder(folder)
        shutil.rmtree(repository)
        print(f"round {number}: {theirs:.2f} / {ours:.2f}", file=sys.stderr, flush=True)
    return seconds, md5s


def write_ratio(name: str, seconds: list[Any], results: list[Outcome], *, goal: float, rows: int, path: Path) -> int:
    """One ratio of gates, equal where every expectation came out the same."""
    theirs, ours = results
    failed = sum(not met for met, _ in ours.values())
    equal = {
        "records": rows,
        "expectations": f"{len(ours)} ({failed} not met)",
        "samples_against_each": "the same" if theirs == ours else "differ",
        "equal": theirs == ours and bool(ours),
    }
    packages = ("great-expectations", "pandas", "pyarrow", "pillow")
    return write_result(describe(name, seconds, goal=goal, equal=equal, packages=packages, measured="cpu_s"), path)


def main() -> int:
    """Measure all four and write them; exit 1 where results differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rounds, size, failed = arguments.rounds, arguments.size, 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["MANYEYES_CACHE"] = str(work / "kept")
        images = make_images(size // 10)
        for name, rows, changed in (("shared", size, 0), ("own", size // 10, 0), ("changed", size, 1)):
            make_snapshot(work / name, rows, images=images, changed=changed, shards=SHARDS)
        for name, kind, said, rows in (
            ("shared", "", "ten records an image", size),
            ("own", "_own", "an image each", size // 10),
        ):
            seconds, results = measure(
                lambda folder=work / name: run_theirs(folder),
                lambda folder=work / name: run_ours(folder, work / "out", None),
                rounds,
            )
            failed |= write_ratio(
                f"data gate, {said}: Great Expectations / data validate",
                *(seconds, results),
                goal=10.0,
                rows=rows,
                path=arguments.out / f"gate{kind}.json",
            )
        run_ours(work / "shared", work / "out", work / "before")

        def ours_again() -> Outcome:
            shutil.rmtree(work / "after", ignore_errors=True)
            shutil.copytree(work / "before", work / "after")
            return run_ours(work / "changed", work / "out", work / "after")

        seconds, results = measure(lambda: run_theirs(work / "changed"), ours_again, rounds)
        failed |= write_ratio(
            "data gate, one shard in a hundred changed: Great Expectations / data validate",
            *(seconds, results),
            goal=20.0,
            rows=size,
            path=arguments.out / "gate_incremental.json",
        )
        figures, (theirs, ours) = compare_fingerprints(work / "own", work / "dvc", rounds)
        equal: dict[str, float | str | bool] = {"md5": "the same" if theirs == ours else "differs"}
        result = describe(
            "fingerprint of a snapshot: dvc add / open_folder, with the start of both",
            figures,
            goal=5.0,
            equal={**equal, "equal": theirs == ours},
            packages=("dvc",),
            measured="cpu_s",
        )
        failed |= write_result(result, arguments.out / "gate_dvc.json")
    return failed


if __name__ == "__main__":
    sys.exit(main())
