"""Two processes give the scorecard that one gives, whoever is first, and what they answered outlives Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.answering.answerers import Answerer, AnswererSpec
from manyeyes.evaluation.answering.asking import LateAnswerer, open_answerer
from manyeyes.evaluation.answering.processes import AnswererPool
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import Outcome, read_outcomes
from manyeyes.evaluation.scorecard import BenchmarkScore, ModelKind
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot
from tests.export_toys import Toy
from tests.pool_fakes import asked

IMAGES = 9
TIMES = {"seconds": 0, "questions_per_s": None}


def score(answerer: Answerer, snapshot: Snapshot, folder: Path) -> tuple[BenchmarkScore, list[Outcome]]:
    card = evaluate(
        answerer,
        make_recipe(evaluation__batch_size=2, evaluation__conditions=["grey", "other-image"]),
        snapshot=snapshot,
        out_dir=folder,
        code_digest="c",
        model_digest="d",
    )
    outcomes = read_outcomes(folder / "items.parquet").outcomes
    return card.benchmarks["easy-vqa"].model_copy(update=TIMES), list(outcomes)


@pytest.mark.parametrize("kind", ["torch", "bundle"])
def test_two_processes_give_the_scorecard_of_one(kind: ModelKind, toy_bundle: Toy, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    model = toy_bundle.checkpoint if kind == "torch" else toy_bundle.bundle
    spec = AnswererSpec(kind, model, threads=1)
    alone = score(LateAnswerer(spec), snapshot, tmp_path / "alone")
    with open_answerer(spec, processes=2) as pool:
        assert isinstance(pool, AnswererPool)
        together = score(pool, snapshot, tmp_path / "together")
    assert together == alone
    # Else equality would say little.
    assert len({outcome.prediction for outcome in alone[1]}) > 1


EVALUATION = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from pathlib import Path
from manyeyes.data.snapshot import open_folder
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.answering.processes import AnswererPool
from tests.evaluation_fakes import make_recipe
from tests.pool_fakes import PoolSpec

folder = Path(sys.argv[1])
with AnswererPool(PoolSpec(folder / "asked", pause_s=0.2, together=2), processes=2) as pool:
    evaluate(
        pool,
        make_recipe(evaluation__batch_size=1),
        snapshot=open_folder(folder / "snapshot"),
        out_dir=folder / "out",
        code_digest="c",
        model_digest="d",
    )
"""


def test_what_was_answered_before_ctrl_c_is_not_asked_again(tmp_path: Path) -> None:
    images, questions = 40, 4
    snapshot = make_snapshot(tmp_path / "snapshot", images=images)
    (tmp_path / "asked").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", EVALUATION, str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as running:
        deadline = time.monotonic() + 200
        while (begun := count_asked(tmp_path / "asked")) < 8 * questions:
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        running.wait(timeout=60)
    answerer = RuleAnswerer(lambda *_: "no")
    evaluate(
        answerer,
        make_recipe(evaluation__batch_size=1),
        snapshot=snapshot,
        out_dir=tmp_path / "out",
        code_digest="c",
        model_digest="d",
    )
    total = images * questions + questions
    # Two batches a process had no answer yet.
    assert answerer.questions <= total - (begun - 4 * questions)
    assert answerer.questions >= total - count_asked(tmp_path / "asked")


def count_asked(folder: Path) -> int:
    return sum(len(lines) for lines in asked(folder).values())
