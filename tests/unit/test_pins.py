"""What a recipe names outside of itself enters its digest by content, or is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from manyeyes import storage as contents
from manyeyes.data.contamination.comparison import open_source
from manyeyes.data.snapshot import open_folder
from manyeyes.data.validation import read_suite
from manyeyes.errors import RecipeError, SourceError
from manyeyes.harness.base import Reporter
from manyeyes.recipe import change_recipe, list_recipes, load_recipe
from manyeyes.sources import pin_recipe, pin_source, resolve_source
from manyeyes.steps.plan_ablation import plan_ablation
from manyeyes.steps.preflight import estimate_recipe
from manyeyes.steps.resolve_data import resolve_data
from manyeyes.storage import content_digest
from manyeyes.training.stage import run_stage
from tests.model_toys import write_language_model
from tests.pinned_toys import pin
from tests.training_toys import toy_recipe, toy_snapshot

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose bytes were read."""
    seen: list[Path] = []
    read = contents.hash_file

    def note(path: Path, *algorithm: Literal["md5", "sha256"]) -> str:
        seen.append(path)
        return read(path, *algorithm)

    monkeypatch.setattr(contents, "hash_file", note)
    return seen


def large_file(path: Path, letter: bytes, *, settled: bool = True, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(letter * (2 << 20))
    if settled:
        monkeypatch.setattr(contents, "_SETTLED_S", -1.0)


def test_a_file_has_its_own_sha256_and_a_folder_one_over_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"1")
    (folder / "inner" / "b.txt").write_bytes(b"2")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"1", b"2"))
    assert content_digest(folder / "a.txt") == one
    first = content_digest(folder)
    assert first == hashlib.sha256(f"a.txt {one}\ninner/b.txt {two}\n".encode()).hexdigest()
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"3")
    assert content_digest(folder) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert content_digest(tmp_path / "copy") == first
    (folder / "a.txt").rename(folder / "c.txt")
    assert content_digest(folder) != first


def test_a_large_file_that_did_not_change_is_read_once(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.bin"
    large_file(weights, b"a", monkeypatch=monkeypatch)
    assert content_digest(weights) == content_digest(weights) == hashlib.sha256(b"a" * (2 << 20)).hexdigest()
    assert reads == [weights]


def test_a_file_exchanged_for_one_of_the_same_size_and_time_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, other = tmp_path / "weights.bin", tmp_path / "other.bin"
    large_file(weights, b"a", monkeypatch=monkeypatch)
    before, times = content_digest(weights), weights.stat()
    weights.write_bytes(b"b" * (2 << 20))  # in place: the same inode
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    in_place = content_digest(weights)
    other.write_bytes(b"c" * (2 << 20))
    other.replace(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len({before, in_place, content_digest(weights)}) == 3


def test_a_file_that_was_written_just_now_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"a" * (2 << 20))
    content_digest(weights), content_digest(weights)
    assert len(reads) == 2


def test_links_that_turn_in_a_circle_end_and_nothing_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "again").symlink_to(tmp_path / "lm")
    (tmp_path / "lm" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "lm" / "config.json").write_text("{}", encoding="utf-8")
    assert len(content_digest(tmp_path / "lm")) == 64
    with pytest.raises(SourceError, match="nowhere cannot be read"):
        content_digest(tmp_path / "nowhere")


def test_a_pinned_folder_opens_while_its_content_stays(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    pinned = pin_source(f"dir:{folder}")
    assert pinned == f"dir:{folder}#sha256={content_digest(folder)}"
    assert pin_source(pinned) == pinned
    assert resolve_source(pinned, snapshot_path=None) == folder
    assert pin_source(f"scratch:dir:{folder}") == f"scratch:{pinned}"
    (folder / "config.json").write_text('{"x": 1}', encoding="utf-8")
    with pytest.raises(SourceError, match="holds something else by now"):
        resolve_source(pinned, snapshot_path=None)


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    def model_info(self: Any, repository: str, *, revision: str, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        assert (repository, revision) == ("openai/clip", "main")
        return SimpleNamespace(sha=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def test_a_branch_of_the_hub_becomes_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, COMMIT)
    assert pin_source("hub:openai/clip@main") == f"hub:openai/clip@{COMMIT}"
    assert pin_source("scratch:hub:openai/clip@main") == f"scratch:hub:openai/clip@{COMMIT}"
    hub_says(monkeypatch, AssertionError("a commit is not asked for"))
    assert pin_source(f"hub:openai/clip@{COMMIT}") == f"hub:openai/clip@{COMMIT}"


def test_without_a_network_a_branch_is_what_the_cache_knows_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_says(monkeypatch, OfflineModeIsEnabled("offline"))
    with pytest.raises(SourceError, match="Write hub:openai/clip@<commit of 40 digits>") as caught:
        pin_source("hub:openai/clip@main")
    assert caught.value.retry
    refs = tmp_path / "models--openai--clip" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT, encoding="utf-8")
    assert pin_source("hub:openai/clip@main") == f"hub:openai/clip@{COMMIT}"


@pytest.mark.parametrize("name", list_recipes())
def test_only_branches_change_a_shipped_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    recipe = load_recipe(name)
    assert (pin_recipe(recipe) == recipe) == ("@main" not in recipe.canonical_json())
    assert "@main" not in pin_recipe(recipe).canonical_json()


def test_every_place_that_names_a_folder_is_pinned(tmp_path: Path) -> None:
    for name in ("lm", "clip", "later"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name, encoding="utf-8")
    (tmp_path / "suite.json").write_text("{}", encoding="utf-8")
    (tmp_path / "judged.parquet").write_bytes(b"rows")
    changes = {
        "model.language_model.source": f"scratch:dir:{tmp_path}/lm",
        "model.encoders.0.source": f"dir:{tmp_path}/clip",
        "stages.sft.model": {"encoders.0.source": f"dir:{tmp_path}/later", "language_model": {"source": "dir:x"}},
        "data.suite": f"{tmp_path}/suite.json",
        "data.contamination.benchmarks": ["easy-vqa-test", f"{tmp_path}/judged.parquet"],
    }
    (changes["stages.sft.model"]["language_model"])["source"] = f"dir:{tmp_path}/lm"  # type: ignore[index]
    recipe = change_recipe(load_recipe("tiny"), changes)
    pinned = pin_recipe(recipe)
    assert pinned.canonical_json().count("#sha256=") == recipe.canonical_json().count("#sha256=") + 6
    assert pin_recipe(pinned) is pinned
    digests = {pinned.digest}
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        path.write_text("{ }", encoding="utf-8")
        digests.add(pin_recipe(recipe).digest)
    assert len(digests) == 6


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.json"):
        pin_recipe(change_recipe(load_recipe("tiny"), {"data.suite": "nowhere.json"}))
    with pytest.raises(RecipeError, match=r"nowhere\.parquet"):
        pin_recipe(change_recipe(load_recipe("tiny"), {"data.contamination.benchmarks": ["nowhere.parquet"]}))


def test_pinned_suites_and_benchmarks_are_read_by_their_paths(tmp_path: Path) -> None:
    suite, judged = tmp_path / "suite.json", tmp_path / "judged.parquet"
    suite.write_text("{}", encoding="utf-8")
    pq.write_table(pa.table({"question": ["what?"]}), judged)
    snapshot = toy_snapshot(tmp_path / "data")
    names = {path: f"{path}#sha256={content_digest(path)}" for path in (suite, judged)}
    assert read_suite(names[suite]) == "{}"
    assert open_source(names[judged], snapshot=snapshot).name == "judged"
    suite.write_text("[]", encoding="utf-8")
    judged.write_bytes(b"others")
    with pytest.raises(SourceError, match="something else"):
        read_suite(names[suite])
    with pytest.raises(SourceError, match="something else"):
        open_source(names[judged], snapshot=snapshot)


def exchange(folder: Path) -> None:
    file = folder / "model.safetensors"
    data, times = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_first_step_gives_other_values_for_other_weights(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    recipe = change_recipe(load_recipe("tiny"), {"model.language_model.source": f"dir:{folder}"})

    def values() -> Any:
        given = {"data_md5": "a" * 32, "data_remote": "x"}
        return resolve_data(Reporter("r"), recipe=recipe.canonical_json(), **given).values

    before = values()
    assert values() == before
    exchange(folder)
    assert values()["sft"] != before["sft"]


def test_sizes_are_estimated_anew_for_another_configuration(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    recipe = change_recipe(toy_recipe(), {"model.language_model.source": f"dir:{folder}"})
    before = estimate_recipe(recipe, None)
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 4'), encoding="utf-8")
    assert estimate_recipe(recipe, None).disk_gb > before.disk_gb


def test_sizes_are_not_estimated_anew_for_what_they_do_not_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_language_model(tmp_path / "lm")
    recipe = change_recipe(toy_recipe(), {"model.language_model.source": f"dir:{folder}"})
    before = estimate_recipe(recipe, None)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("estimated anew")

    monkeypatch.setattr("manyeyes.estimate.skeleton.count_facts", refuse)
    others = {
        "description": "in other words",
        "gate": [{"rule": "validation"}],
        "evaluation.batch_size": 9,
        "stages.sft.batch_size": 9,
        "stages.sft.train.projector": 0.5,
    }
    assert estimate_recipe(change_recipe(recipe, others), None) == before
    with pytest.raises(AssertionError, match="anew"):
        estimate_recipe(change_recipe(recipe, {"stages.sft.checkpoint_encoders": True}), None)


def test_a_variants_text_is_another_for_other_weights(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    grid = f"model.language_model.source=[as-is, 'dir:{folder}']"
    pinned = pin(load_recipe("tiny"), "plan_ablation")

    def texts() -> Any:
        return plan_ablation(Reporter("p"), pinned=pinned, ablate_grid=grid).values["batches"]

    before = texts()
    exchange(folder)
    assert texts()[0] == before[0]
    assert texts()[1] != before[1]


def test_exchanged_weights_are_trained_anew(tmp_path: Path) -> None:
    snapshot = toy_snapshot(tmp_path / "data")
    folder = write_language_model(tmp_path / "lm")
    recipe = change_recipe(toy_recipe(max_steps=1), {"model.language_model.source": f"dir:{folder}"})
    reports = []
    for number in range(3):
        reports.append(
            run_stage(
                recipe,
                "sft",
                snapshot=open_folder(snapshot.path),
                code_digest="code",
                out=tmp_path / f"out-{number}",
                work_dir=tmp_path / "work",
            )
        )
        if number == 1:
            exchange(folder)
    assert reports[0] == reports[1]
    assert reports[1].stage_digest != reports[2].stage_digest
    assert reports[1].checkpoint_digest != reports[2].checkpoint_digest
