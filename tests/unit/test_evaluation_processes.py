"""Several processes that answer: who gets what, and what happens when one of them ends before its time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyeyes.errors import CheckpointError, EvaluationError, RecordError
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.evaluation.answering.processes import AnswererPool, ProcessLostWarning
from manyeyes.runtime.bundle import Group
from tests.pool_fakes import PoolSpec, asked

TOKENS = 3
WAIT_S = 20.0


def make_batches(count: int, *, images: int = 2) -> list[list[Group]]:
    return [
        [Group((f"{batch}-{image}".encode(),), (f"q{batch}", f"r{image}")) for image in range(images)]
        for batch in range(count)
    ]


def expected(groups: list[Group]) -> list[list[str]]:
    return [
        [f"{hashlib.sha256(b''.join(group.images)).hexdigest()[:8]} {question}" for question in group.questions]
        for group in groups
    ]


def is_alive(pid: int) -> bool:
    # A process that nobody waits for any more stays as a zombie where the machine has no init that waits.
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text(encoding="utf-8")


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnswererPool]:
    with AnswererPool(PoolSpec(tmp_path_factory.mktemp("asked"), together=2), processes=2) as pool:
        yield pool


def test_every_batch_comes_once_with_its_answers(pool: AnswererPool) -> None:
    batches = make_batches(7)
    found = {}
    for index, answers, seconds in pool.answer_batches(iter(batches), max_new_tokens=TOKENS):
        assert index not in found
        assert seconds >= 0
        found[index] = [[answer.text for answer in group] for group in answers]
        assert {answer.token_ids for group in answers for answer in group} == {(TOKENS,)}
    assert found == {index: expected(groups) for index, groups in enumerate(batches)}


def test_both_processes_answer_and_their_images_are_counted(pool: AnswererPool) -> None:
    counts, lines = pool.image_counts, asked(pool_folder(pool))
    batches = [[Group((f"{batch}".encode(),), ("sleep 0.1",))] for batch in range(12)]
    list(pool.answer_batches(batches, max_new_tokens=TOKENS))
    assert sum(len(after) > len(lines[pid]) for pid, after in asked(pool_folder(pool)).items()) == 2
    assert pool.image_counts - counts == ImageCounts(encoded=12)


def test_a_slow_batch_does_not_hold_up_the_others(pool: AnswererPool) -> None:
    slow = [Group((), ("sleep 2",))]
    order = [index for index, _, _ in pool.answer_batches([slow, *make_batches(6)], max_new_tokens=TOKENS)]
    # What lies behind it in the same process waits for it.
    assert order.index(0) >= len(order) - 2


def test_seconds_add_up_to_the_time_that_passed(pool: AnswererPool) -> None:
    batches = [[Group((), ("sleep 0.2",))] for _ in range(4)]
    started = time.perf_counter()
    seconds = sum(seconds for _, _, seconds in pool.answer_batches(batches, max_new_tokens=TOKENS))
    passed = time.perf_counter() - started
    assert 0.4 <= seconds <= passed


def test_batches_are_read_only_as_they_are_needed(pool: AnswererPool) -> None:
    read = 0

    def batches() -> Iterator[list[Group]]:
        nonlocal read
        for groups in make_batches(50):
            read += 1
            yield groups

    answered = pool.answer_batches(batches(), max_new_tokens=TOKENS)
    for done, _ in enumerate(answered, start=1):
        # Two a process in flight, two that wait for the end, one that was just looked at.
        assert read <= done + 7 or read == 50


def test_what_was_left_in_the_middle_does_not_answer_the_next(pool: AnswererPool) -> None:
    next(pool.answer_batches(make_batches(9), max_new_tokens=TOKENS))
    (group,) = pool.answer_groups([Group((b"x",), ("another?",))], max_new_tokens=TOKENS)
    assert [[answer.text for answer in group]] == expected([Group((b"x",), ("another?",))])


def test_groups_are_shared_out_and_come_back_in_order(pool: AnswererPool) -> None:
    groups = [*make_batches(1, images=9)[0], Group((), ()), Group((), tuple(f"q{number}" for number in range(50)))]
    found = pool.answer_groups(groups, max_new_tokens=TOKENS)
    assert [[answer.text for answer in group] for group in found] == expected(groups)
    assert pool.answer_groups([], max_new_tokens=TOKENS) == []


def test_each_process_has_its_threads_and_its_device(tmp_path: Path) -> None:
    names = ("OMP_NUM_THREADS", "MANYEYES_THREADS", "CUDA_VISIBLE_DEVICES")
    questions = (*(f"environment {name}" for name in names), "sleep 0.1")
    with AnswererPool(PoolSpec(tmp_path, threads=3, together=2), processes=2, devices=["4", "GPU-x"]) as pool:
        seen = set()
        for _, ((answers,)), _ in pool.answer_batches([[Group((), questions)] for _ in range(9)], max_new_tokens=1):
            seen.add(tuple(answer.text for answer in answers[:3]))
    assert seen == {("3", "3", "4"), ("3", "3", "GPU-x")}


def test_nothing_starts_where_nothing_is_asked(tmp_path: Path) -> None:
    with AnswererPool(PoolSpec(tmp_path, broken="it is never built"), processes=2) as pool:
        assert list(pool.answer_batches([], max_new_tokens=TOKENS)) == []


def test_an_error_arrives_as_itself_and_ends_all(tmp_path: Path) -> None:
    with AnswererPool(PoolSpec(tmp_path), processes=2) as pool:
        with pytest.raises(RecordError, match="a broken image") as caught:
            list(pool.answer_batches([*make_batches(4), [Group((), ("refuse",))]], max_new_tokens=TOKENS))
        assert "pool_fakes.py" in caught.value.__notes__[0]
        assert not any(is_alive(pid) for pid in asked(tmp_path))


def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    with (
        AnswererPool(PoolSpec(tmp_path, broken="Train one."), processes=2) as pool,
        pytest.raises(CheckpointError, match="Train one"),
    ):
        pool.answer_groups([Group((), ("a?",))], max_new_tokens=TOKENS)


def test_processes_that_are_killed_while_they_load_end_the_evaluation(tmp_path: Path) -> None:
    with (
        AnswererPool(PoolSpec(tmp_path, broken="killed"), processes=2) as pool,
        pytest.warns(ProcessLostWarning, match="SIGKILL .* while it loaded the model; processes left: 1"),
        pytest.raises(EvaluationError, match="no process is left"),
    ):
        pool.answer_groups([Group((), ("a?",))], max_new_tokens=TOKENS)


def test_the_batch_of_a_process_that_died_is_given_to_another(tmp_path: Path) -> None:
    batches = make_batches(8)
    batches[3] = [*batches[3], Group((), ("die SIGSEGV once",))]
    with AnswererPool(PoolSpec(tmp_path), processes=2) as pool:
        with pytest.warns(ProcessLostWarning, match=r"SIGSEGV while it answered batch 4 \(5 questions on 2 images"):
            answered = list(pool.answer_batches(batches, max_new_tokens=TOKENS))
        assert pool.lost == 1
    assert {index: [[answer.text for answer in group] for group in answers] for index, answers, _ in answered} == {
        index: expected(groups) for index, groups in enumerate(batches)
    }


def test_a_batch_that_ends_two_processes_is_an_error(tmp_path: Path) -> None:
    batches = make_batches(8)
    batches[1] = [Group((), ("die SIGKILL",))]
    with (
        AnswererPool(PoolSpec(tmp_path), processes=3) as pool,
        pytest.warns(ProcessLostWarning),
        pytest.raises(EvaluationError, match=r"SIGKILL .*batch 2 .*'die SIGKILL'.* and so did another"),
    ):
        list(pool.answer_batches(batches, max_new_tokens=TOKENS))
    assert not any(is_alive(pid) for pid in asked(tmp_path))


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from pathlib import Path
from manyeyes.evaluation.answering.processes import AnswererPool
from manyeyes.runtime.bundle import Group
from tests.pool_fakes import PoolSpec

with AnswererPool(PoolSpec(Path(sys.argv[1]), together=2), processes=2) as pool:
    for index, _, _ in pool.answer_batches([[Group((), (f"sleep {s}",))] for s in (0, 60, 60, 60)], max_new_tokens=1):
        print(index, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"0\n"
        wait_until(lambda: [len(lines) > 0 for lines in asked(tmp_path).values()] == [True, True])
        workers = list(asked(tmp_path))
        assert len(workers) == 2
        assert all(is_alive(pid) for pid in workers)
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)  # as a terminal does
        else:
            parent.kill()
        assert parent.wait(timeout=WAIT_S) != 0
        wait_until(lambda: not any(is_alive(pid) for pid in workers))


def pool_folder(pool: AnswererPool) -> Path:
    spec = pool._spec
    assert isinstance(spec, PoolSpec)
    return spec.folder
