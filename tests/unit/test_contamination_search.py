"""Contamination of a snapshot: report, list to leave out, gate, step and command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import easy_vqa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import lay_out_remote, make_snapshot, write_remote
from PIL import Image

from bench.contamination import CHANGES, encode, photographs
from manyeyes.data.contamination import fingerprints
from manyeyes.data.contamination.findings import ContaminationReport, Pair, Thresholds, read_contamination
from manyeyes.data.contamination.search import find_contamination
from manyeyes.data.fetching import RemoteShards
from manyeyes.data.quarantine import read_quarantine
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.snapshot import Snapshot, open_folder, open_snapshot
from manyeyes.errors import SnapshotError
from manyeyes.recipe.gate_rules import ContaminationRule, Evidence
from tests.cli_calls import call

LONG = "Which of the two ships in the harbour carries the flag with a yellow cross on blue ground? The left one."


def record(name: str, images: Sequence[bytes] = (), question: str = "what is it?", answer: str = "a thing") -> Record:
    turns = (Turn("human", "<image>\n" * len(images) + question), Turn("gpt", answer))
    return Record(name, "toy", tuple(read_image_file(data, path=name) for data in images), turns)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    return {name: image.resize((240, 180)) for name, image in photographs().items() if " " not in name}


@pytest.fixture
def snapshot(tmp_path: Path, pictures: dict[str, Image.Image]) -> Snapshot:
    """Five benchmark images, of which training has three in other forms, and a text."""
    coffee, rocket, chelsea = (pictures[name] for name in ("coffee.png", "rocket.jpg", "chelsea.png"))
    shape = Image.new("RGB", (64, 64), "white")
    shape.paste((200, 30, 30), (10, 20, 40, 50))
    broken = encode(pictures["coins.png"])[:-500]
    whole = encode(pictures["coins.png"])
    test = [
        record("test/coffee", [encode(coffee)]),
        record("test/rocket+coins", [whole, encode(rocket)]),
        record("test/chelsea", [encode(chelsea)]),
        record("test/shape", [encode(shape)]),
        record("test/text", question=LONG),
        record("test/astronaut", [encode(pictures["astronaut.png"])]),
    ]
    moved = Image.new("RGB", (64, 64), "white")
    moved.paste((200, 30, 30), (11, 20, 41, 50))
    train = [
        record("train/exact", [encode(coffee)]),
        record("train/near", [encode(pictures["camera.png"]), CHANGES["JPEG, quality 50"](rocket)]),
        record("train/mirrored", [CHANGES["mirrored"](chelsea)]),
        record("train/shape", [encode(moved)]),
        record("train/broken", [broken]),
        record("train/text", question=f"Look. {LONG.upper()}"),
        record("train/other", [encode(pictures["grass.png"])], question=" ".join(LONG.split()[:12])),
    ]
    return make_snapshot(tmp_path / "snapshot", {"train": train, "test": test}, rows_per_shard=3)


def search(snapshot: Snapshot, out: Path, **changes: Any) -> ContaminationReport:
    given: dict[str, Any] = {"datasets": ["toy-train"], "benchmarks": ["toy-test"]} | changes
    return find_contamination(snapshot, out_dir=out, cache_dir=out / "cache", **given)


def read_pairs(out: Path) -> list[Pair]:
    return [Pair.model_validate_json(line) for line in (out / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_kind_is_found_and_named(snapshot: Snapshot, tmp_path: Path) -> None:
    report = search(snapshot, tmp_path / "out")
    found = {
        (pair.kind, pair.id, pair.image, pair.benchmark_id, pair.benchmark_image)
        for pair in read_pairs(tmp_path / "out")
    }
    assert found == {
        ("exact", "train/exact", 0, "test/coffee", 0),
        ("near", "train/near", 1, "test/rocket+coins", 1),
        ("mirrored", "train/mirrored", 0, "test/chelsea", 0),
        ("text", "train/text", None, "test/text", None),
    }
    assert set(report.examples) == set(read_pairs(tmp_path / "out"))
    (benchmark,) = report.benchmarks
    assert (benchmark.images, benchmark.exact, benchmark.near, benchmark.mirrored) == (6, 1, 1, 1)
    assert (benchmark.undecidable, benchmark.unreadable) == (1, 0)
    assert (benchmark.texts, benchmark.overlapping, benchmark.too_short) == (6, 1, 5)
    (dataset,) = report.datasets
    assert (dataset.images, dataset.exact, dataset.near, dataset.mirrored) == (7, 1, 1, 1)
    assert (dataset.undecidable, dataset.unreadable, dataset.overlapping, dataset.samples) == (1, 1, 1, 4)


def test_what_is_found_is_left_out_of_training(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = search(snapshot, out)
    rows = {f"toy-train#{row}" for row in (0, 1, 2, 5)}  # exact, near, mirrored, and text in the second shard
    assert read_quarantine(out) == rows
    (out / "quarantine.jsonl").write_text(
        '{"id": "train/bad", "dataset": "toy-train", "row": 4, "reason": "bad"}\n', encoding="utf-8"
    )
    assert read_quarantine(out) == rows | {"toy-train#4"}
    reasons = {
        line["id"]: line["reason"]
        for line in map(json.loads, (out / "contaminated.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert reasons["train/exact"] == "image 0 has the very bytes of an image of toy-test (test/coffee)"
    assert "image 1 is a near duplicate (distance " in reasons["train/near"]
    assert reasons["train/text"] == "a text holds 100% of the n-grams of a text of toy-test (test/text)"
    assert (report.remaining_images, report.remaining_texts) == (0, 0)
    counted = search(snapshot, out, leave_out=False)
    assert not (out / "contaminated.jsonl").exists()
    assert (counted.remaining_images, counted.remaining_texts) == (2, 1)
    assert read_contamination(out) == counted


def test_the_second_look_refuses_what_the_hash_alone_would_call_the_same(snapshot: Snapshot, tmp_path: Path) -> None:
    report = search(snapshot, tmp_path / "out", thresholds=Thresholds(max_difference=1.5))
    # Mirroring costs the rounding of a cell (1.1 here), JPEG more (2.0).
    assert (report.datasets[0].near, report.datasets[0].mirrored) == (0, 1)


def test_the_page_and_the_note_say_what_was_found(snapshot: Snapshot, tmp_path: Path) -> None:
    report = search(snapshot, tmp_path / "out")
    page = (tmp_path / "out" / "contamination.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 6  # three pairs of images
    assert "http" not in page
    assert "these samples are left out of training" in page
    note = (tmp_path / "out" / "contamination.md").read_text(encoding="utf-8")
    assert note == report.as_markdown()
    assert "| toy-test | 6 | 1 | 1 | 1 | 50.0% | 1 | 6 | 1 | 5 |" in note


def test_a_search_goes_on_where_it_was_killed(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = fingerprints.decode_image
    budget = [9]

    def counted(data: bytes) -> Any:
        decoded.append(data)
        if len(decoded) > budget[0]:
            raise KeyboardInterrupt
        return decode(data)

    monkeypatch.setattr(fingerprints, "decode_image", counted)
    with pytest.raises(KeyboardInterrupt):
        search(snapshot, tmp_path / "out")
    kept = len(list((tmp_path / "out" / "cache").iterdir()))
    assert 0 < kept < 5
    assert not (tmp_path / "out" / "contamination.json").exists()
    budget[0] = 10**6
    decoded.clear()
    resumed = search(snapshot, tmp_path / "out")
    assert len(decoded) < 12 + 2 * 2  # not all 12 again, and two pairs looked at
    monkeypatch.undo()
    assert resumed == search(snapshot, tmp_path / "anew")


def test_a_benchmark_in_the_hubs_own_schema(
    snapshot: Snapshot, tmp_path: Path, pictures: dict[str, Image.Image]
) -> None:
    rows = {
        "question_id": [7, 8],
        "image": [{"bytes": encode(pictures["grass.png"], 90), "path": None}, None],
        "question": ["is it green?", LONG.removesuffix(" The left one.")],
        "answers": [["yes"], ["The left one.", "left"]],
    }
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "hub" / "val-0.parquet")
    report = search(snapshot, tmp_path / "out", benchmarks=[str(tmp_path / "hub")])
    found = {(pair.kind, pair.id, pair.benchmark, pair.benchmark_id) for pair in read_pairs(tmp_path / "out")}
    assert found == {("near", "train/other", "hub", "7"), ("text", "train/text", "hub", "8")}
    assert report.benchmarks[0].images == 1


def test_an_unknown_benchmark_offers_the_nearest(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match='Did you mean "toy-test"'):
        search(snapshot, tmp_path / "out", benchmarks=["toy-tets"])


def test_easy_vqa_is_not_decidable_though_hashes_call_it_all_the_same(tmp_path: Path) -> None:
    folder = Path(easy_vqa.__file__).parent / "data"

    def records(split: str) -> list[Record]:
        files = sorted((folder / split / "images").glob("*.png"))
        return [record(f"{split}/{file.stem}", [file.read_bytes()]) for file in files]

    snapshot = make_snapshot(
        tmp_path / "snapshot", {"train": records("train"), "test": records("test")}, rows_per_shard=4000
    )
    report = search(snapshot, tmp_path / "out")
    (benchmark,) = report.benchmarks
    assert (benchmark.images, benchmark.exact, benchmark.near, benchmark.mirrored) == (1000, 0, 0, 0)
    assert benchmark.undecidable == 1000
    assert report.datasets[0].samples == 0
    prints = [np.load(file) for file in (tmp_path / "out" / "cache").glob("*.npy")]
    train, test = (np.concatenate([p for p in prints if (len(p) == 1000) == small]) for small in (False, True))
    assert (len(train), len(test)) == (4000, 1000)
    flagged = (np.bitwise_count(test["hash"][:, None] ^ train["hash"][None]) <= 4).any(axis=1)
    assert flagged.mean() >= 0.94


@pytest.mark.parametrize(
    ("exact", "near", "texts", "left_out", "max_images", "max_texts", "passed", "found"),
    [
        (0, 0, 0, True, 0, None, True, "0 images"),
        (0, 3, 5, True, 0, 0, True, "0 images, 0 texts"),
        (0, 3, 0, False, 2, None, False, "3 images"),
        (1, 2, 0, False, 3, None, True, "3 images"),
        (1, 0, 0, True, 0, None, False, "1 images"),
        (0, 0, 5, False, 0, None, True, "0 images"),
        (0, 0, 5, False, 0, 4, False, "0 images, 5 texts"),
    ],
)
def test_the_gate_judges_what_training_saw(
    exact: int, near: int, texts: int, left_out: bool, max_images: int, max_texts: int | None, passed: bool, found: str
) -> None:
    report = SimpleNamespace(
        remaining_images=0 if left_out else near,
        remaining_texts=0 if left_out else texts,
        left_out=left_out,
        headline=lambda: "some",
    )
    rule = ContaminationRule(rule="contamination", max_images=max_images, max_texts=max_texts)
    validation = SimpleNamespace(contaminated_images=exact, eval_datasets=("val",))
    evidence = Evidence(None, None, None, validation, None, report, None)  # type: ignore[arg-type]
    result = rule.decide(evidence)
    assert (result.passed, result.found) == (passed, found)


def test_the_command_writes_the_report(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert (
        call(monkeypatch, "data", "contamination", str(snapshot.path), "--benchmarks", "toy-test", "--out", str(out))
        == 0
    )
    output = capsys.readouterr()
    assert "1 exact and 2 near duplicates among training images, 1 samples with shared text" in output.out
    assert "0% comparing toy-train" in output.err
    assert len((out / "contaminated.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert (
        call(monkeypatch, "data", "contamination", str(snapshot.path), "--benchmarks", "toy-test", "--radius", "9") == 2
    )
    assert "Correct --radius." in capsys.readouterr().err


def test_shards_come_from_the_remote_one_after_the_other_and_what_is_known_is_neither_fetched_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record(f"train/{number}", question=f"{number}: {LONG}") for number in range(12)]
    judged = [record("test/0", question=LONG)]
    folders = []
    for name in ("first", "second"):
        folders.append(make_snapshot(tmp_path / name, {"train": records, "test": judged}, rows_per_shard=2).path)
        records[11] = record("train/other", question="something else")
    limit = 3 * max(file.stat().st_size for file in folders[0].rglob("*.parquet"))
    monkeypatch.setenv("MANYEYES_SHARDS_GB", str(limit / 1e9))
    fetched: list[str] = []
    most = 0

    def watched(self: RemoteShards, relpath: str) -> None:
        nonlocal most
        fetched.append(relpath)
        fetch(self, relpath)
        most = max(most, len(list((tmp_path / "cache").rglob("*.parquet"))))

    fetch = RemoteShards._fetch
    monkeypatch.setattr(RemoteShards, "_fetch", watched)
    remotes = {}
    for folder in folders:
        md5, objects = lay_out_remote(folder)
        remotes[md5] = write_remote(tmp_path / "remote", objects)

    def search_remote(md5: str) -> ContaminationReport:
        fetched.clear()
        opened = open_snapshot(md5=md5, remote=remotes[md5], cache_dir=tmp_path / "cache")
        return find_contamination(
            opened,
            datasets=["toy-train"],
            benchmarks=["toy-test"],
            out_dir=tmp_path / "out",
            cache_dir=tmp_path / "kept",
        )

    first, second = remotes
    assert search_remote(first).datasets[0].overlapping == 12
    assert set(fetched) == {f"toy/train-{number:05d}.parquet" for number in range(6)} | {"toy/test-00000.parquet"}
    assert most <= 3 + 4  # one that is being fetched ahead may be there before it is seen that it is too many
    again = search_remote(second)
    assert "toy/train-00005.parquet" in fetched
    assert not set(fetched) & {f"toy/train-{number:05d}.parquet" for number in range(5)}
    assert again.datasets[0].overlapping == 11
    assert again == search(open_folder(folders[1]), tmp_path / "whole")
    assert read_pairs(tmp_path / "out") == read_pairs(tmp_path / "whole")
    assert search_remote(second) == again
    assert not fetched
