"""The steps of the pipeline curate, each as in a pod of its own: what they write is what data curate writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manyeyes.data.contamination import comparison, fingerprints
from manyeyes.data.curation import facts as facts_module
from manyeyes.data.curation import parts
from manyeyes.data.curation.curate import curate
from manyeyes.data.curation.gathering import Shard, gathering_recipe
from manyeyes.data.curation.parts import MAX_PARTS, cut_into_parts, parse_part, part_key
from manyeyes.data.curation.planned import parse_planned
from manyeyes.data.curation.recipe import read_curation_text
from manyeyes.data.pushing import add_to_snapshot
from manyeyes.data.remote import FolderRemote, open_remote
from manyeyes.data.snapshot import hash_folder, open_folder, open_snapshot, read_dvc_file
from manyeyes.errors import PipelineError, RecipeError, SnapshotError, ValidationError
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.steps.curate_data import curate_data
from manyeyes.steps.gather_facts import gather_facts
from manyeyes.steps.plan_curation import plan_curation
from manyeyes.steps.publish_snapshot import publish_snapshot
from tests.unit.data_samples import lay_out_remote, make_snapshot, write_remote
from tests.unit.test_data_curation import RECIPE, make_photo, make_sample, make_samples

# Great Expectations judges what is drawn: on a core that others use, minutes.
pytestmark = pytest.mark.timeout(900)

TEXT = RECIPE.replace("[toy-train]", "[toy-train, toy-more]") + 'noun_phrases: {sources: ["llava*"], min_count: 1}\n'


@dataclass(frozen=True)
class World:
    """A snapshot in a remote, and what ``data curate`` makes of a copy of its folder."""

    data_md5: str
    remote: Path
    local: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("curate")
    test = [make_sample(0, "test", "What?", "A house.", make_photo(997, quality=60))]
    # Two data sets, of three shards each; duplicates and near duplicates lie across both.
    samples = make_samples()
    snapshot = make_snapshot(
        base / "in", {"train": samples[::2], "more": samples[1::2], "test": test}, rows_per_shard=20
    )
    md5, objects = lay_out_remote(base / "in")
    write_remote(base / "remote", objects)
    shutil.copytree(base / "in", base / "local")
    recipe = read_curation_text(TEXT)
    curate(recipe, [snapshot], base / "local", cache_dir=base / "cache")
    return World(md5, base / "remote", base / "local")


class Pods:
    """Runs each step with folders of its own, as pods have them."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._base, self._monkeypatch, self._number = base, monkeypatch, 0

    def stay(self) -> None:
        """The next step is another attempt of the last one, on the same volumes."""
        self._number -= 1

    def __call__(self, function: Callable[..., StepResult], **arguments: Any) -> StepResult:
        self._number += 1
        for name in ("MANYEYES_CACHE", "MANYEYES_WORKDIR"):
            self._monkeypatch.setenv(name, str(self._base / f"{name}-{self._number}"))
        return function(Reporter(function.__name__), **arguments)


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pods:
    # Less than any shard here: every shard is a run, so that there are several parts.
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    monkeypatch.setattr(parts, "MAX_PARTS", 3)
    return Pods(tmp_path, monkeypatch)


def plan(pods: Pods, world: World, text: str = TEXT, **more: str) -> Mapping[str, Any]:
    given = {"data_md5": world.data_md5, "data_remote": str(world.remote), **more}
    return pods(plan_curation, curate_recipe="clean", curate_recipe_text=text, **given).values


def gather(pods: Pods, values: Mapping[str, Any], folder: Path) -> list[Path]:
    for number, part in enumerate(values["parts"]):
        pods(gather_facts, part=part, pinned=values["gather_facts"], facts=folder / str(number))
    return [folder / str(number) for number in range(len(values["parts"]))]


def refuse(*_arguments: object, **_named: object) -> None:
    raise AssertionError("looked at again")


def test_a_pipeline_writes_the_bytes_of_data_curate(
    world: World, pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = plan(pods, world)
    assert len(values["parts"]) == 3
    facts = gather(pods, values, tmp_path / "facts")
    # The step that joins opens no text and no image of an input to look at it: all of that was handed over.
    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "_look_at", refuse)
        patch.setattr(fingerprints, "_look_at", refuse)
        patch.setattr(comparison, "Benchmarks", refuse)
        made = pods(curate_data, facts=facts, pinned=values["curate_data"], curated=tmp_path / "curated")
    published = pods(publish_snapshot, curated=tmp_path / "curated", pinned=values["curate_data"])
    md5 = published.values["data_md5"]
    # One digest over every byte: shards, list, report, page and manifest, and all that was there before.
    assert md5 == hash_folder(world.local)
    assert read_dvc_file(tmp_path / "curated" / "data.dvc").md5 == md5
    # To be copied: its indentation has a meaning.
    assert (tmp_path / "curated" / "data.dvc").read_text(encoding="utf-8") in (published.html or "")
    assert made.html == (world.local / "toy-mix-curation.html").read_text(encoding="utf-8")
    # No shard travels as an artifact.
    assert not list((tmp_path / "curated").rglob("train-*.parquet"))
    fetched = open_snapshot(md5=md5, remote=str(world.remote), cache_dir=tmp_path / "fetched")
    assert fetched.manifest == open_folder(world.local).manifest
    assert [path.read_bytes() for path in fetched.shards("toy-mix-train")] == [
        path.read_bytes() for path in open_folder(world.local).shards("toy-mix-train")
    ]


def test_inputs_of_several_snapshots_are_drawn_from_and_the_first_gets_the_mixture(
    world: World, pods: Pods, tmp_path: Path
) -> None:
    # A data set that both have is taken from the one whose input names it.
    more = make_snapshot(tmp_path / "more", {"own": make_samples()[::3], "train": make_samples()[:5]})
    md5, objects = lay_out_remote(tmp_path / "more")
    write_remote(world.remote, objects)
    text = TEXT.replace("[{datasets: [toy-train, toy-more]}]", f"[{{datasets: [toy-more]}}, {{snapshot: {md5}.dir}}]")
    assert text != TEXT
    values = plan(pods, world, text)
    facts = gather(pods, values, tmp_path / "facts")
    pods(curate_data, facts=facts, pinned=values["curate_data"], curated=tmp_path / "curated")
    published = pods(publish_snapshot, curated=tmp_path / "curated", pinned=values["curate_data"])
    shutil.copytree(world.local, tmp_path / "local")
    base = open_snapshot(md5=world.data_md5, remote=str(world.remote), cache_dir=tmp_path / "fetched")
    curate(read_curation_text(text), [base, more], tmp_path / "local", cache_dir=tmp_path / "cache")
    assert published.values["data_md5"] == hash_folder(tmp_path / "local")


def test_another_remote_gets_all_of_the_snapshot_and_a_stopped_push_goes_on(
    world: World, pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    values = plan(pods, world, curate_remote=str(tmp_path / "other"))
    write, written = FolderRemote.write, list[str]()

    def failing(self: FolderRemote, key: str, content: Path | bytes) -> None:
        if len(written) == 4:
            raise SnapshotError("the store went away", "a store", "Run it again.", retry=True)
        written.append(key)
        write(self, key, content)

    given = {"facts": gather(pods, values, tmp_path / "facts"), "pinned": values["curate_data"]}
    with monkeypatch.context() as patch:
        patch.setattr(FolderRemote, "write", failing)
        with pytest.raises(SnapshotError, match="went away"):
            pods(curate_data, **given, curated=tmp_path / "first")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("*") if path.is_file()}
    assert len(before) == 4
    pods(curate_data, **given, curated=tmp_path / "second")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    publish = {"curated": tmp_path / "second", "pinned": values["curate_data"]}
    md5 = pods(publish_snapshot, **publish).values["data_md5"]
    whole = open_snapshot(md5=md5, remote=str(tmp_path / "other"), cache_dir=tmp_path / "fetched")
    assert len(whole.shards("toy-train")) == 3
    assert hash_folder(world.local) == md5
    next(iter(before)).unlink()
    with pytest.raises(SnapshotError, match=r"lacks 1 files of the new snapshot.*without its cache"):
        pods(publish_snapshot, **publish)


def test_what_gathering_depends_on_is_neither_cap_nor_ratio_nor_remote(world: World, pods: Pods) -> None:
    first = plan(pods, world)
    other = TEXT.replace("cap: 40", "cap: 7").replace("name: toy-mix", "name: other")
    (world.remote.parent / "elsewhere").mkdir(exist_ok=True)
    second = plan(pods, world, other, curate_remote=str(world.remote.parent / "elsewhere"))
    assert first["gather_facts"] == second["gather_facts"]
    assert first["parts"] == second["parts"]
    assert first["curate_data"] != second["curate_data"]
    assert plan(pods, world, TEXT.replace("latin", "greek"))["gather_facts"] != first["gather_facts"]
    assert parse_planned(first["gather_facts"]).recipe == gathering_recipe(read_curation_text(TEXT))


def test_what_cannot_be_run_is_refused_before_a_shard_is_read(
    world: World, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r'inputs.0.snapshot is "runs/mine", a folder of one machine'):
        plan(pods, world, "{name: a, inputs: [{snapshot: runs/mine}]}")
    with pytest.raises(SnapshotError, match="toy-trian"):
        plan(pods, world, "{name: a, inputs: [{datasets: [toy-trian]}]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SnapshotError, match="can only be read"):
        plan(pods, world, curate_remote="hub:owner/name@main")
    with pytest.raises(PipelineError, match="Pass on what plan_curation gave"):
        parse_planned("{}")


def test_what_validation_refuses_is_not_pushed(
    world: World, pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = plan(pods, world, "{name: a, inputs: [{datasets: [toy-more]}]}")
    monkeypatch.setattr("manyeyes.steps.curate_data.SUITE", str(tmp_path / "suite.json"))
    suite = (
        '{"name": "mine", "expectations": [{"type": "expect_table_row_count_to_be_between", "severity": "critical", '
        '"kwargs": {"min_value": 1000}, "meta": {"name": "many", "explanation": "There are a thousand."}}]}'
    )
    (tmp_path / "suite.json").write_text(suite, encoding="utf-8")
    before = sorted(world.remote.rglob("*"))
    with pytest.raises(ValidationError, match=r"what a draws: .*thousand"):
        pods(curate_data, facts=[], pinned=values["curate_data"], curated=tmp_path / "curated")
    assert sorted(world.remote.rglob("*")) == before


def test_parts_are_of_about_one_size_and_name_every_shard_once() -> None:
    def shard(dataset: str, size: int) -> Shard:
        return Shard(dataset, Path("x"), "0" * 64, size << 20, 1, 0, 0)

    large = [shard("large", 200) for _ in range(60)]
    named = [parse_part(part) for part in cut_into_parts([shard("small", 1), *large, shard("other", 3)])]
    assert len(named) == MAX_PARTS
    numbers = sorted(number for part in named for name, *run in part if name == "large" for number in range(*run))
    assert numbers == list(range(60))
    heavy = [sum(end - first for name, first, end in part if name == "large") for part in named]
    assert max(heavy) - min(heavy) <= 3
    assert [part_key(part) for part in cut_into_parts([shard("a", 1), shard("b", 2), shard("b", 2)])] == ["b", "a"]
    assert part_key('["b", 4, 6]\n["a", 0, 1]') == "b from 4 and 1 more"
    with pytest.raises(PipelineError, match="part is 'all of it'"):
        part_key("all of it")


def test_a_folder_takes_the_place_of_data_sets_of_its_name(world: World, tmp_path: Path) -> None:
    """As where data curate writes into a snapshot that has the data set already."""
    md5, objects = lay_out_remote(world.local)
    write_remote(tmp_path / "remote", objects)
    base = open_snapshot(md5=md5, remote=str(tmp_path / "remote"), cache_dir=tmp_path / "cache")
    recipe = read_curation_text(TEXT.replace("cap: 40", "cap: 20"))
    inputs = [base]
    curate(recipe, inputs, tmp_path / "new", cache_dir=tmp_path / "cache")
    added = add_to_snapshot(base, tmp_path / "new")
    shutil.copytree(world.local, tmp_path / "local")
    curate(recipe, [open_folder(world.local)], tmp_path / "local", cache_dir=tmp_path / "cache")
    assert added.dvc_output().md5 == hash_folder(tmp_path / "local")
    size = sum(path.stat().st_size for path in (tmp_path / "local").rglob("*") if path.is_file())
    assert (added.dvc_output().size, added.dvc_output().nfiles) == (size, len(added.files))
    assert open_remote(str(tmp_path / "remote")).read(f"files/md5/{md5[:2]}/{md5[2:]}.dir") is not None
