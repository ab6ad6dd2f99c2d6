from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from manyeyes.cli.data import diff_command
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.diff import SnapshotDiff, compare_snapshots, open_version
from manyeyes.data.records import Record, Turn
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import SnapshotError
from tests.unit.data_samples import lay_out_remote, make_image, make_record, make_snapshot, write_remote


def changed(records: list[Record]) -> list[Record]:
    """Of 40: one went, two came, one answers otherwise, one has another image and source; the order is another."""
    answered = replace(records[3], turns=(*records[3].turns[:-1], Turn("gpt", "another answer")))
    pictured = replace(records[5], images=(make_image(77),), source="elsewhere")
    rest = [record for number, record in enumerate(records) if number not in (3, 5, 7)]
    return [*reversed(rest), make_record(100), answered, pictured, make_record(101)]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    records = [make_record(number) for number in range(40)]
    make_snapshot(tmp_path / "a", {"train": records, "old": records[:3]})
    make_snapshot(tmp_path / "b", {"train": changed(records), "new": records[:2]}, rows_per_shard=15)
    return tmp_path / "a", tmp_path / "b"


def test_samples_that_came_went_and_changed_are_told_by_id_and_field(folders: tuple[Path, Path]) -> None:
    found = compare_snapshots(*map(open_folder, folders), most_ids=1)
    train = found.datasets["toy-train"]
    assert (train.state, train.came, train.went, train.changed) == ("changed", 2, 1, 2)
    assert (train.rows_before, train.rows_after) == (40, 41)
    assert (train.shards_skipped, train.shards_read) == (0, 4)
    assert train.fields == {"turns": 1, "source": 1, "images": 1}
    assert train.came_ids == ("toy/100",)
    assert train.went_ids == ("toy/7",)
    assert [(sample.id, sample.fields) for sample in train.changed_samples] == [("toy/3", ("turns",))]
    old, new = found.datasets["toy-old"], found.datasets["toy-new"]
    assert (old.state, old.went, old.went_ids) == ("went", 3, ("toy/0",))
    assert (new.state, new.came, new.came_ids) == ("came", 2, ("toy/0",))
    text = found.as_text()
    assert "  + toy/100\n  + ... and 1 more\n  - toy/7\n  ~ toy/3 (turns)\n  ~ ... and 1 more\n" in text


def test_shards_of_equal_sha256_are_not_read(tmp_path: Path) -> None:
    records = [make_record(number) for number in range(30)]
    make_snapshot(tmp_path / "a", {"train": records}, rows_per_shard=10)
    make_snapshot(tmp_path / "b", {"train": [*records[:20], *reversed(records[20:])]}, rows_per_shard=10)
    before, after = open_folder(tmp_path / "a"), open_folder(tmp_path / "b")
    for path in (*before.shards("toy-train")[:2], *after.shards("toy-train")[:2]):
        path.write_bytes(bytes(path.stat().st_size))
    train = compare_snapshots(before, after).datasets["toy-train"]
    assert (train.state, train.shards_skipped, train.shards_read) == ("same", 2, 2)
    assert compare_snapshots(before, before).is_same


def test_licence_source_and_pretrained_parts_are_compared(folders: tuple[Path, Path]) -> None:
    before, after = map(open_folder, folders)
    for folder, weights in ((before.path, b"one"), (after.path, b"two")):
        (folder / "pretrained" / "tiny-lm").mkdir(parents=True)
        (folder / "pretrained" / "tiny-lm" / "model.safetensors").write_bytes(weights)
        licence = "MIT" if weights == b"one" else "CC-BY-4.0"
        write_snapshot_manifest(folder, provenance={"toy-train": Provenance(licence, "made for a test")})
    found = compare_snapshots(*map(open_folder, folders))
    change = found.datasets["toy-train"].manifest["licence"]
    assert (change.before, change.after) == ("MIT", "CC-BY-4.0")
    part = found.pretrained["tiny-lm"]
    assert (part.state, part.files, part.manifest) == ("changed", ("model.safetensors",), {})
    assert "licence: 'MIT' -> 'CC-BY-4.0'" in found.as_text()
    assert "pretrained tiny-lm changed: model.safetensors" in found.as_text()


def test_an_id_that_comes_twice_and_rows_without_ids_are_counted_once_each(tmp_path: Path) -> None:
    for name, answers in (("a", ["x", "y", "y"]), ("b", ["x", "y", "z", "z"])):
        for split, ids in (("named", ["1", "1", "2", "2"]), ("plain", None)):
            columns = {"answer": answers} | ({"question_id": ids[: len(answers)]} if ids else {})
            (tmp_path / name / "bench").mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), tmp_path / name / "bench" / f"{split}-00000.parquet")
        provenance = {f"bench-{split}": Provenance("MIT", "a benchmark", "hub") for split in ("named", "plain")}
        write_snapshot_manifest(tmp_path / name, provenance=provenance)
    found = compare_snapshots(open_folder(tmp_path / "a"), open_folder(tmp_path / "b")).datasets
    named, plain = found["bench-named"], found["bench-plain"]
    assert (named.came, named.went, named.changed, named.fields) == (1, 0, 1, {"answer": 1})
    assert (plain.came, plain.went, plain.came_ids) == (2, 1, ("bench-plain#2", "bench-plain#3"))
    assert plain.went_ids == ("bench-plain#2",)


def test_a_snapshot_is_named_by_dvc_file_revision_or_md5(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    remote = here\n['remote \"here\"']\n    url = ../store\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    digests = []
    for folder in folders:
        md5, objects = lay_out_remote(folder)
        write_remote(tmp_path / "store", objects)
        text = f"outs:\n- md5: {md5}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n"
        (tmp_path / "data.dvc").write_text(text)
        subprocess.run([*git, "add", "data.dvc"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "data"], check=True)
        digests.append(md5)
    result = CliRunner().invoke(diff_command, ["data.dvc@HEAD~1", "data.dvc", "--json"], catch_exceptions=False)
    found = SnapshotDiff.model_validate_json(result.stdout)
    assert found.datasets["toy-train"].came == 2
    assert json.loads(result.stdout)["before"] == "data.dvc@HEAD~1"
    assert open_version(digests[0]).md5 == open_version("data.dvc@HEAD~1").md5 == digests[0]
    for wrong in ("nowhere", "data.dvc@nothing", "no.dvc"):
        with pytest.raises(SnapshotError):
            open_version(wrong)
