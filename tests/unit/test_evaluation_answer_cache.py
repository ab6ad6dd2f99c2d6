"""Answers are kept under all that they depend on, survive kills, and are never asked for twice."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering import answer_cache
from manyeyes.evaluation.answering.answer_cache import AnswerCache, AnswerKeys, CacheWarning, open_answers
from manyeyes.evaluation.evaluate import UNFINISHED, EvaluationProgress, evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.evaluation.scorecard import read_scorecard
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors

IMAGES = 12
QUESTIONS = 4 * IMAGES
KEYS = AnswerKeys(kind="torch", model_digest="m", code_digest="c", data_md5="d", chat={"template": "plain"})
QUESTION = {"images": ["1", "2"], "options": [], "max_new_tokens": 16}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def cache(folder: Path, *, model: str = "m", most_bytes: int = 1 << 20) -> AnswerCache:
    return AnswerCache(folder, model_digest=model, kind="torch", most_bytes=most_bytes)


def run(answerer: RuleAnswerer, snapshot: Snapshot, work: Path, *, out: str = "out", **options: object):
    given = {"recipe": make_recipe(evaluation__batch_size=2), "model_digest": "m", **options}
    recipe = given.pop("recipe")
    folder = work.parent / out
    return evaluate(answerer, recipe, snapshot=snapshot, out_dir=folder, work_dir=work, code_digest="c", **given)


@pytest.mark.parametrize(
    "changed",
    [
        replace(KEYS, kind="bundle"),
        replace(KEYS, model_digest="n"),
        replace(KEYS, code_digest="n"),
        replace(KEYS, data_md5="n"),
        replace(KEYS, chat={"template": "vicuna_v1"}),
    ],
)
def test_each_fact_of_the_model_makes_another_key(changed: AnswerKeys) -> None:
    assert changed.of("p", **QUESTION) != KEYS.of("p", **QUESTION)
    assert replace(changed, **vars(KEYS)).of("p", **QUESTION) == KEYS.of("p", **QUESTION)


def test_each_fact_of_the_question_makes_another_key() -> None:
    keys = [
        KEYS.of("p", **QUESTION),
        KEYS.of("q", **QUESTION),
        KEYS.of("p", **QUESTION | {"images": ["2", "1"]}),
        KEYS.of("p", **QUESTION | {"images": ["1"]}),
        KEYS.of("p", **QUESTION | {"images": []}),
        KEYS.of("p", **QUESTION | {"options": ["A", "B"]}),
        KEYS.of("p", **QUESTION | {"options": ["B", "A"]}),
        KEYS.of("p", **QUESTION | {"max_new_tokens": 17}),
    ]
    assert len(set(keys)) == len(keys)


def test_another_process_reads_what_was_written_before_the_first_one_ends(tmp_path: Path) -> None:
    with cache(tmp_path) as first, cache(tmp_path) as second:
        first.add({"a": "red", "b": "two\nlines, é and \ud83d"})
        assert second.find("a") is None
        second.refresh()
        assert (second.find("a"), second.find("b")) == ("red", "two\nlines, é and \ud83d")
        first.add({"c": "blue"})
        second.refresh()
        assert second.find("c") == "blue"
    with cache(tmp_path, model="another") as other:
        assert len(other) == 0


def test_answers_that_may_only_be_read_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache(tmp_path) as first:
        first.add({"a": "red"})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    with cache(tmp_path) as second:
        assert second.find("a") == "red"


def test_a_line_that_a_kill_cut_off_is_left_out_without_a_word(tmp_path: Path) -> None:
    with cache(tmp_path) as first:
        first.add({"a": "red", "b": "blue"})
        (file,) = tmp_path.glob("*/*.open.jsonl")
        file.write_bytes(file.read_bytes()[:-3])
        with cache(tmp_path) as second:
            assert (second.find("a"), second.find("b")) == ("red", None)


def test_damaged_lines_are_answered_anew_with_one_warning(tmp_path: Path) -> None:
    with cache(tmp_path) as first:
        first.add({"a": "red", "b": "blue", "c": "green"})
    (file,) = tmp_path.glob("*/*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].replace(b"blue", b"pink") + b"\x00\xff\n" + lines[2])
    second = cache(tmp_path)
    with pytest.warns(CacheWarning, match="2 of 4 lines are damaged") as warned:
        second.refresh()
    second.refresh()
    assert len(warned) == 1
    assert [second.find(key) for key in "abc"] == ["red", None, "green"]


def test_many_closed_files_become_one_and_nothing_is_lost(tmp_path: Path) -> None:
    # All open at the same time, as the tasks of a pipeline are; they close one after the other.
    caches = [cache(tmp_path) for _ in range(20)]
    for number, each in enumerate(caches):
        each.add({f"key {number}": f"text {number}", "shared": "same"})
    killed = cache(tmp_path)
    killed.add({"killed": "yes"})
    assert killed._file is not None
    killed._file.close()
    (dead,) = set(tmp_path.glob("*/*.open.jsonl")) - {each._path for each in caches}
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(dead, (long_ago, long_ago))
    for each in caches:
        each.close()
    assert not dead.exists()
    assert len(list(tmp_path.glob("*/*"))) < 8
    with cache(tmp_path) as reader:
        assert {reader.find(f"key {number}") for number in range(20)} == {f"text {number}" for number in range(20)}
        assert (reader.find("shared"), reader.find("killed")) == ("same", "yes")


def test_the_model_that_was_asked_for_longest_ago_goes_first(tmp_path: Path) -> None:
    text = "x" * 1000
    for age, model in enumerate(("young", "middle", "old")):
        with cache(tmp_path, model=model) as each:
            each.add({model: text})
        then = time.time() - 1000 * age
        os.utime(each._own, (then, then))
    with cache(tmp_path, model="own", most_bytes=2500) as own:
        own.add({"own": text})
    left = {}
    for model in ("own", "young", "middle", "old"):
        with cache(tmp_path, model=model) as each:
            left[model] = each.find(model) is not None
    assert left == {"own": True, "young": True, "middle": False, "old": False}
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 2500
    with cache(tmp_path, model="own", most_bytes=100) as own:
        own.add({"more": text})
    assert list(tmp_path.glob("*/*")) == []


def test_a_full_disk_costs_the_cache_and_not_the_evaluation(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(file, content: bytes) -> None:
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rule = rule_with_errors(IMAGES, [3])
    expected = run(RuleAnswerer(rule), snapshot, tmp_path / "a" / "work")
    with monkeypatch.context() as patched:
        patched.setattr(answer_cache, "_write_all", write_half)
        with pytest.warns(CacheWarning, match="no more is written, No space left") as warned:
            card = run(RuleAnswerer(rule), snapshot, tmp_path / "b" / "work")
    assert len(warned) == 1
    assert timeless(card) == timeless(expected)
    # What the half batch left behind disturbs nobody.
    again = RuleAnswerer(rule)
    card = run(again, snapshot, tmp_path / "b" / "work")
    assert timeless(card) == timeless(expected)
    # A batch has eight answers.
    from_cache = card.benchmarks["easy-vqa"].from_cache
    assert 0 < from_cache < 8
    assert again.questions == QUESTIONS + 4 - from_cache


def timeless(card) -> object:
    figures = {"seconds": 0, "questions_per_s": None, "from_cache": 0}
    return card.benchmarks["easy-vqa"].model_copy(update=figures)


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_evaluation(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "answers").write_text("in the way", encoding="utf-8")
    with pytest.warns(CacheWarning):
        card = run(RuleAnswerer(rule_with_errors(IMAGES)), snapshot, tmp_path / "work")
    assert card.benchmarks["easy-vqa"].score == 100


def test_an_evaluation_that_is_done_again_asks_nothing_and_has_no_speed(snapshot: Snapshot, tmp_path: Path) -> None:
    rule = rule_with_errors(IMAGES, [3])
    first = run(RuleAnswerer(rule), snapshot, tmp_path / "work", out="first")
    answerer = RuleAnswerer(rule)
    seen: list[EvaluationProgress] = []
    second = run(answerer, snapshot, tmp_path / "work", out="second", on_progress=seen.append)
    assert answerer.questions == 0
    score = second.benchmarks["easy-vqa"]
    assert (score.from_cache, score.seconds, score.questions_per_s) == (QUESTIONS + 4, 0, None)
    assert (first.benchmarks["easy-vqa"].from_cache, first.benchmarks["easy-vqa"].questions_per_s > 0) == (0, True)
    assert timeless(first) == timeless(second)
    items = [tmp_path / name / "items.parquet" for name in ("first", "second")]
    assert items[0].read_bytes() == items[1].read_bytes()
    assert "easy-vqa.questions_per_s" not in second.metrics()
    assert second.metrics()["easy-vqa.from_cache"] == QUESTIONS + 4
    assert [(one.condition, one.done, one.total, one.from_cache) for one in seen] == [
        ("image-on", QUESTIONS, QUESTIONS, QUESTIONS),
        ("image-off", 4, 4, 4),
    ]
    assert seen[0].score == pytest.approx(score.score, abs=1e-3)
    assert read_scorecard(tmp_path / "second" / "scorecard.json") == second


def test_more_items_ask_only_what_is_new(snapshot: Snapshot, tmp_path: Path) -> None:
    few = make_recipe(evaluation__max_items=10, evaluation__batch_size=2)
    run(RuleAnswerer(rule_with_errors(IMAGES)), snapshot, tmp_path / "work", recipe=few)
    answerer = RuleAnswerer(rule_with_errors(IMAGES))
    card = run(answerer, snapshot, tmp_path / "work")
    assert answerer.questions == QUESTIONS - 10
    # The third image had two questions answered, and is shown again for the other two.
    assert answerer.images == IMAGES - 2
    score = card.benchmarks["easy-vqa"]
    assert (score.n, score.score, score.from_cache) == (QUESTIONS, 100, 10 + 4)


@pytest.mark.parametrize("changed", [{"model_digest": "n"}, {"recipe": make_recipe(evaluation__max_new_tokens=3)}])
def test_another_model_or_longer_answers_are_asked_anew(
    snapshot: Snapshot, tmp_path: Path, changed: dict[str, object]
) -> None:
    run(RuleAnswerer(lambda *_: "yes"), snapshot, tmp_path / "work")
    answerer = RuleAnswerer(rule_with_errors(IMAGES))
    assert run(answerer, snapshot, tmp_path / "work", **changed).benchmarks["easy-vqa"].score == 100
    assert answerer.questions == QUESTIONS + 4


def test_without_a_cache_nothing_is_kept(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_ANSWER_CACHE_GB", "0")
    for _ in range(2):
        answerer = RuleAnswerer(rule_with_errors(IMAGES))
        run(answerer, snapshot, tmp_path / "work")
        assert answerer.questions == QUESTIONS + 4
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("given", ["-1", "many", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_ANSWER_CACHE_GB", given)
    with pytest.raises(EvaluationError, match=f"MANYEYES_ANSWER_CACHE_GB is '{given}'"):
        open_answers(tmp_path, model_digest="m", kind="torch")


KILLED = """
import os, signal, sys
from pathlib import Path
from manyeyes.data.snapshot import open_folder
from manyeyes.evaluation.evaluate import evaluate
from tests.evaluation_fakes import RuleAnswerer, make_recipe, rule_with_errors

work, data, images, survives = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Killed(RuleAnswerer):
    def answer_groups(self, groups, *, max_new_tokens):
        if self.images >= 2 * survives:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer_groups(groups, max_new_tokens=max_new_tokens)

evaluate(Killed(rule_with_errors(images, [3])), make_recipe(evaluation__batch_size=2), snapshot=open_folder(data),
         out_dir=work.parent / "out", work_dir=work, code_digest="c", model_digest="m")
"""


def test_after_kill_9_in_the_middle_of_a_condition_no_answered_question_is_asked_again(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "work"), str(snapshot.path), str(IMAGES)]
    for survives in (2, 1):
        ended = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(survives)], check=False)
        assert ended.returncode == -9
    assert not (tmp_path / "out" / "scorecard.json").exists()
    answerer = RuleAnswerer(rule_with_errors(IMAGES, [3]))
    resumed = run(answerer, snapshot, tmp_path / "work")
    # Two batches of two images, then one more, four questions an image.
    assert (answerer.images, answerer.questions) == (IMAGES - 6, QUESTIONS - 24 + 4)
    whole = run(RuleAnswerer(rule_with_errors(IMAGES, [3])), snapshot, tmp_path / "fresh" / "work")
    assert resumed.benchmarks["easy-vqa"].from_cache == 24
    assert timeless(resumed) == timeless(whole)
    found = [read_outcomes(folder / "items.parquet").outcomes for folder in (tmp_path / "out", tmp_path / "fresh/out")]
    assert found[0] == found[1]


def test_an_evaluation_that_is_stopped_leaves_the_scores_that_it_has(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyeyes.evaluation import evaluate as module

    class StoppedError(Exception):
        pass

    def twice(spec, *, snapshot):
        (benchmark,) = load(spec, snapshot=snapshot)
        other = replace(benchmark, row=replace(benchmark.row, name="gqa"))
        return [benchmark, replace(other, items=other.items[: QUESTIONS // 2])]

    def stops(progress: EvaluationProgress) -> None:
        if progress.benchmark == "gqa" and stop:
            raise StoppedError

    load = module.load_benchmarks
    monkeypatch.setattr(module, "load_benchmarks", twice)
    stop = True
    with pytest.raises(StoppedError):
        run(RuleAnswerer(rule_with_errors(IMAGES, [3])), snapshot, tmp_path / "work", on_progress=stops)
    partial = read_scorecard(tmp_path / "out" / UNFINISHED)
    assert (list(partial.benchmarks), partial.unfinished) == (["easy-vqa"], ["gqa"])
    assert not (tmp_path / "out" / "scorecard.json").exists()
    stop = False
    answerer = RuleAnswerer(rule_with_errors(IMAGES, [3]))
    card = run(answerer, snapshot, tmp_path / "work", on_progress=stops)
    assert (list(card.benchmarks), card.unfinished) == (["easy-vqa", "gqa"], [])
    assert timeless(card) == partial.benchmarks["easy-vqa"].model_copy(
        update={"seconds": 0, "questions_per_s": None, "from_cache": 0}
    )
    # The second benchmark asks what the first one asked.
    assert answerer.questions == 0
    assert card.benchmarks["gqa"].from_cache == QUESTIONS // 2 + 4
    assert not (tmp_path / "out" / UNFINISHED).exists()
    assert json.loads((tmp_path / "out" / "scorecard.json").read_text(encoding="utf-8"))["unfinished"] == []
