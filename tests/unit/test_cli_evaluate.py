"""What ``manyeyes evaluate`` asks, in how many processes, and how it shows how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyeyes.cli.evaluation import choose_benchmarks, model_folder
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering import asking as answering
from manyeyes.evaluation.answering.answerers import AnswererSpec
from manyeyes.evaluation.answering.asking import LateAnswerer, count_processes, cuda_devices, open_answerer
from manyeyes.evaluation.answering.encoder_cache import EncoderCacheSettings
from manyeyes.evaluation.answering.processes import AnswererPool
from manyeyes.harness import events
from manyeyes.registry.pull import ModelLocation
from tests.cli_calls import call
from tests.evaluation_fakes import make_recipe


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--benchmarks", "gqa,poep"], 'Did you mean "pope"?'),
        (["--benchmarks", "easy-vqa", "--variant", "vqav2=official"], "a benchmark that is asked: easy-vqa"),
        (["--benchmarks", "pope,easy-vqa", "--variant", "lmsm"], 'Did you mean "lmms"?'),
        (["--max-items", "0"], "--max-items"),
        (["--processes", "two"], "--processes"),
        ([], "there is none of that name"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_loaded(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "evaluate", "./nowhere", *arguments) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_benchmarks_items_and_variants_go_into_the_recipe() -> None:
    recipe = make_recipe(evaluation__variants={"pope": "official"})
    asked = choose_benchmarks(recipe, names="pope, mme pope", max_items=7, variants=["lmms"])
    assert asked.evaluation.benchmarks == ("pope", "mme")
    assert asked.evaluation.max_items == 7
    assert asked.evaluation.variants == {"pope": "lmms", "mme": "lmms"}
    one = choose_benchmarks(asked, names="", max_items=None, variants=["mme=official"])
    assert one.evaluation.variants == {"pope": "lmms", "mme": "official"}
    assert choose_benchmarks(recipe, names="", max_items=None, variants=[]) == recipe


@pytest.mark.parametrize(
    ("given", "environment", "devices", "count"),
    [(3, "5", 8, 3), (None, "5", 8, 5), (None, "", 8, 8), (None, "", 0, 1)],
)
def test_processes_are_as_asked_else_one_a_device(
    given: int | None, environment: str, devices: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(answering.PROCESSES, environment)
    assert count_processes(given, devices=devices) == count


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_processes_names_the_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(answering.PROCESSES, value)
    with pytest.raises(EvaluationError, match=f"MANYEYES_EVALUATION_PROCESSES is '{value}'"):
        count_processes(None, devices=0)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ("0", "1")), ("4, 7", ("4", "7")), ("GPU-a,GPU-b", ("GPU-a", "GPU-b")), ("4,5,-1", ("4", "5"))],
)
def test_devices_have_the_names_that_the_environment_gives(
    visible: str | None, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(answering, "count_cuda_devices", lambda: 2)
    assert cuda_devices("torch") == names
    assert cuda_devices("bundle") == names


def test_processes_share_threads_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = EncoderCacheSettings("key", memory_bytes=900)
    spec = AnswererSpec("bundle", tmp_path, threads=7, device="cpu", encoder_cache=cache)
    with open_answerer(spec, processes=3) as answerer:
        assert isinstance(answerer, AnswererPool)
        share = answerer._spec
    assert isinstance(share, AnswererSpec)
    assert share.encoder_cache is not None
    assert (share.threads, share.encoder_cache.memory_bytes) == (2, 300)
    with open_answerer(spec, processes=1) as answerer:
        # Nothing is loaded until something is asked: the folder is empty.
        assert isinstance(answerer, LateAnswerer)
        assert list(answerer.answer_batches([], max_new_tokens=1)) == []


def test_events_reach_who_watches_and_nobody_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYEYES_RUN_DIR", raising=False)
    seen: list[events.Event] = []
    with events.watching(seen.append):
        events.emit("progress", "evaluate", figure="half", done=0.5, eta_s=3.0)
    events.emit("progress", "evaluate", figure="all", done=1.0)
    assert [(event.figure, event.done, event.eta_s) for event in seen] == [("half", 0.5, 3.0)]


def test_a_model_of_the_registry_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(location: ModelLocation, out: Path) -> None:
        out.mkdir(parents=True)
        fetched.append(location.place)

    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("manyeyes.registry.pull.fetch_model", fetch)
    registered = ModelLocation("bundle", "models:/tiny/3", "d" * 64)
    assert model_folder(registered) == model_folder(registered) == tmp_path / "cache" / "models" / ("d" * 16)
    assert fetched == ["models:/tiny/3"]
    assert model_folder(ModelLocation("torch", str(tmp_path), "d" * 64)) == tmp_path
