"""Import of the other kinds, from folders and from S3, and of every published schema."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import make_image, make_record
from moto.server import ThreadedMotoServer
from test_data_import import imported, sample

from manyeyes.data.importing import KINDS, import_data
from manyeyes.data.importing.hub import fetch_hub_files
from manyeyes.data.importing.kinds import guess_kind
from manyeyes.data.importing.places import FolderPlace
from manyeyes.data.mixture import BRIEF_DESCRIPTION
from manyeyes.data.shards import write_shards
from manyeyes.data.source_items import LIST_OBJECTS
from manyeyes.data.sources_table import NUMBER, SHORT, SOURCES
from manyeyes.errors import DataError

IMAGE = {"bytes": make_image(5).data, "path": "five.png"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def lay_out(kind: str, folder: Path) -> str:
    """A source of two samples, one with an image ``a.png`` and one that must be left out."""
    folder.mkdir()
    image = make_image(1).data
    (folder / "a.png").write_bytes(image)
    items = [sample(0), sample(1, image="gone.png")]
    if kind == "json":
        (folder / "x.json").write_text(json.dumps(items), encoding="utf-8")
    elif kind == "jsonl":
        (folder / "x.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    elif kind in ("parquet", "arrow"):
        rows = [{**item, "image": {"bytes": None, "path": item["image"]}} for item in items]
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=1)
            pq.write_table(table, folder / "test-00000-of-00001.parquet")
        else:
            (folder / "dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
            (folder / "train").mkdir()
            (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}', encoding="utf-8")
            with (
                pa.OSFile(str(folder / "train" / "d.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as out,
            ):
                out.write_table(table, max_chunksize=1)
    elif kind == "webdataset":
        (folder / "a.png").unlink()
        write_tar(
            folder / "0.tar", {"d/0.PNG": image, "d/0.txt": b"a caption", "d/1.txt": b"no image", "d/1.cls": b"3"}
        )
    elif kind == "folder":
        (folder / "a.txt").write_text("a caption", encoding="utf-8-sig")
        (folder / "B.PNG").write_bytes(image)
    else:
        images = [
            {"id": n, "file_name": f"{name}.png", "width": 8, "height": 6} for n, name in enumerate(("a", "gone"))
        ]
        captions = [{"image_id": n, "caption": text} for n, text in ((1, "one"), (0, "two"), (0, "three"))]
        boxes = [{"image_id": 0, "category_id": 3, "bbox": [2, 3, 4, 1.5]}]
        for name, notes in (("captions", captions), ("instances", boxes)):
            content = {
                "info": {"x": [1]},
                "images": images,
                "annotations": notes,
                "categories": [{"id": 3, "name": "cat"}],
            }
            (folder / f"{name}_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_and_read(kind: str, tmp_path: Path) -> None:
    url = lay_out(kind, tmp_path / "source")
    report, records, left_out = imported(url, tmp_path / "out", name="set", items_per_unit=1)
    assert (report.kind, report.items, len(left_out)) == (kind, 2, 1)
    assert records[0].images[0].data == make_image(1).data
    if kind in ("webdataset", "folder"):
        question, answer = records[0].turns
        assert question.text.removeprefix("<image>\n") in BRIEF_DESCRIPTION
        assert answer.text == "a caption"
        assert left_out[0].reason.startswith("image missing" if kind == "webdataset" else "no caption")
    elif kind == "coco":
        texts = [turn.text for turn in records[0].turns]
        assert texts[1::2] == ["two", "three", "cat: [0.250, 0.500, 0.750, 0.750]"]
        assert texts[4] == LIST_OBJECTS
    else:
        assert records[0].id == "set/s0"
        assert "gone.png" in left_out[0].reason


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def test_s3_gives_what_a_folder_gives(bucket: Any, tmp_path: Path) -> None:
    for kind in ("json", "parquet"):
        folder = Path(lay_out(kind, tmp_path / kind))
        for path in folder.rglob("*.*"):
            bucket.upload_file(str(path), "bucket", f"{kind}/{path.relative_to(folder).as_posix()}")
        url = f"s3://bucket/{kind}" + ("/x.json" if kind == "json" else "")
        here = imported(str(folder), tmp_path / "here", name=kind, items_per_unit=1)
        there = imported(url, tmp_path / "there", name=kind, items_per_unit=1)
        assert there[0].model_dump() == here[0].model_dump()
        assert there[1] == here[1]
    with pytest.raises(DataError, match="s3://bucket/nothing is not there"):
        import_data("s3://bucket/nothing", tmp_path / "out")


def test_our_own_shards_are_imported_as_they_are(tmp_path: Path) -> None:
    records = [make_record(number, num_images=number) for number in range(3)]
    write_shards(records, tmp_path / "source", "train")
    report, found, _ = imported(str(tmp_path / "source"), tmp_path / "out", name="toy")
    assert [(record.turns, record.images, record.source) for record in found] == [
        (record.turns, record.images, record.source) for record in records
    ]
    assert report.sources == {"toy": 3}


def test_image_folders_take_metadata_and_lose_no_row_of_it(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for name in ("a.jpg", "below/b.webp", "c.png"):
        (root / name).write_bytes(make_image(len(name)).data)
    (root / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "first"}\n{"file_name": "a.jpg", "text": "again"}\n{"text": "of nothing"}\n'
        '{"file_name": "gone.jpg", "text": "lost"}\n',
        encoding="utf-8",
    )
    with (root / "below" / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], ["b.webp", "in a, table"]])
    (root / "c.caption").write_text("beside", encoding="utf-8")
    report, records, left_out = imported(str(root), tmp_path / "out")
    assert report.kind == "folder"
    assert {record.turns[1].text for record in records} == {"first", "again", "in a, table", "beside"}
    assert sorted(entry.reason.split(":")[0] for entry in left_out) == ["image missing", "no file name"]


def test_a_link_to_a_folder_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(make_image().data)
    (tmp_path / "photos" / "more").symlink_to(tmp_path)
    with pytest.raises(DataError, match="a link to a folder outside"):
        import_data(str(tmp_path / "photos"), tmp_path / "out")


def test_tars_are_cut_between_samples_and_may_be_compressed(tmp_path: Path) -> None:
    long = "d" * 120  # a name that needs a header of its own
    files = {}
    for number in range(5):
        files[f"{long}/{number}.jpg"] = make_image(number).data
        files[f"{long}/{number}.json"] = json.dumps(sample(number, image="?")).encode()
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "a.tar", files)
    write_tar(tmp_path / "t" / "b.tar.gz", files)
    _, records, left_out = imported(str(tmp_path / "t"), tmp_path / "out", items_per_unit=2)
    assert not left_out
    assert [record.turns[1].text for record in records] == [f"answer {number}" for number in range(5)] * 2
    assert records[7].images[0].data == make_image(2).data


def test_a_tar_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": make_image().data, "0.txt": b"x" * 5000})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2500])
    with pytest.raises(DataError, match=r"a\.tar is broken"):
        import_data(str(tmp_path / "a.tar"), tmp_path / "out")


def test_annotations_of_images_that_are_not_listed_are_left_out(tmp_path: Path) -> None:
    folder = Path(lay_out("coco", tmp_path / "coco"))
    content = json.loads((folder / "captions_val2017.json").read_bytes())
    content["annotations"].append({"image_id": 99, "caption": "of what?"})
    (folder / "captions_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    report, _, left_out = imported(str(folder / "captions_val2017.json"), tmp_path / "out", images=str(folder))
    assert report.files == ["captions_val2017.json", "instances_val2017.json"]
    assert 'annotations name the image "99"' in left_out[-1].reason


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["notes.md"], "it holds nothing that is known"),
        (["a.json", "b.parquet"], r"it holds 2 kinds \(json, parquet\)"),
    ],
)
def test_a_kind_that_cannot_be_told_is_asked_for(files: list[str], found: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"[")
    with pytest.raises(DataError, match=found) as caught:
        guess_kind(FolderPlace(tmp_path), "")
    assert all(kind in caught.value.needed for kind in KINDS)


# What one item of each schema looks like, and the turns that it becomes.
SCHEMAS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llava-1.5-mix665k": (sample(0, image=IMAGE), ["<image>\nwhat?", "answer 0"]),
    "cambrian-7m": (sample(0, image=IMAGE, source="x.json"), ["<image>\nwhat?", "answer 0"]),
    "ai2d": (
        {"images": [IMAGE], "texts": [{"user": "q", "assistant": "a", "source": "AI2D"}] * 2},
        ["<image>\nq", "a", "q", "a"],
    ),
    "chartqa": (
        {"image": IMAGE, "query": "How many?", "label": ["3"], "human_or_machine": 0},
        ["<image>\nHow many?", "3"],
    ),
    "laion-gpt4v": (
        {"link": "https://example.org/c/a.png?x=1", "caption": "A cat.", "message_id": "1", "timestamp": "2"},
        ["<image>\n*", "A cat."],
    ),
    "synthdog-en": (
        {"image": IMAGE, "ground_truth": '{"gt_parse": {"text_sequence": "once upon"}}'},
        ["<image>\nWhat is written in the image?", "once upon"],
    ),
    "arxivqa": (
        {
            "id": "x",
            "image": "a.png",
            "question": "Which?",
            "options": ["A) 1", "B) 2"],
            "label": "B",
            "rationale": "r",
        },
        ["<image>\nWhich?\nA) 1\nB) 2", "B"],
    ),
    "scienceqa": (
        {
            **{"image": None, "question": "Which?", "choices": ["salt", "iron"], "answer": 1, "hint": ""},
            **{"lecture": "Metals shine.", "solution": "Iron is one."},
        },
        ["Which?\nContext: N/A\nOptions: (A) salt (B) iron", "Metals shine. Iron is one. The answer is B."],
    ),
    "mathvision": (
        {"image": "images/1.jpg", "decoded_image": IMAGE, "question": "x<image1>?", "options": ["1"], "answer": "A"},
        ["<image>\nx?\n(A) 1", "A"],
    ),
    "design2code": (
        {"image": IMAGE, "text": "<html>"},
        ["<image>\nWrite the HTML of the page in the screenshot.", "<html>"],
    ),
    "pathvqa": ({"image": IMAGE, "question": "q", "answer": "a"}, ["<image>\nq", "a"]),
    "openorca": ({"id": "1", "system_prompt": "Think.", "question": "q", "response": "a"}, ["Think.\n\nq", "a"]),
    "mathinstruct": ({"source": "data/x", "instruction": "q", "output": "a"}, ["q", "a"]),
    "orca-math": ({"question": "q", "answer": "a"}, ["q", "a"]),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, ["q\n\nc", "a"]),
    "opencodeinterpreter": (
        {"id": 1, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ["q", "a"],
    ),
    "openhermes-2.5": (
        {
            "conversations": [
                *({"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "q", "weight": None}),
                {"from": "gpt", "value": "a", "weight": 1.0},
            ],
            "source": "airoboros2.2",
        },
        ["s\n\nq", "a"],
    ),
    "lima": ({"conversations": ["q", "a"], "source": "stackexchange"}, ["q", "a"]),
}


def test_a_schema_is_tried_for_every_way_to_read_an_item() -> None:
    assert {SOURCES[name].read for name in SCHEMAS} == {row.read for row in SOURCES.values()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_item_of_a_published_set_becomes_turns(name: str, tmp_path: Path) -> None:
    item, expected = SCHEMAS[name]
    (tmp_path / "a.png").write_bytes(make_image(1).data)
    pq.write_table(pa.Table.from_pylist([item]), tmp_path / "train-0.parquet")
    report, (record,), _ = imported(
        str(tmp_path / "train-0.parquet"), tmp_path / "out", source=name, images=str(tmp_path)
    )
    texts = [turn.text for turn in record.turns]
    if expected[0].endswith("*"):
        assert texts[0].removeprefix("<image>\n") in BRIEF_DESCRIPTION
        texts[0] = expected[0]
    assert texts == expected
    assert (report.title, record.source) == (SOURCES[name].title, name)


@pytest.mark.parametrize("name", ["chartqa", "ai2d", "llava-1.5-mix665k"])
def test_a_wrong_column_is_named(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"img": "a", "question": "q"}]), tmp_path / "x.parquet")
    missing = SOURCES[name].columns[0]
    with pytest.raises(DataError, match=rf'"{name}" has no column "{missing}"; it has img, question'):
        import_data(str(tmp_path / "x.parquet"), tmp_path / "out", source=name)


def test_sentences_about_answers_are_put_behind_questions_when_asked_for(tmp_path: Path) -> None:
    item, _ = SCHEMAS["chartqa"]
    pq.write_table(pa.Table.from_pylist([item]), tmp_path / "x.parquet")
    _, (record,), _ = imported(str(tmp_path / "x.parquet"), tmp_path / "out", source="chartqa", answer_format=True)
    assert record.turns[0].text == f"<image>\nHow many?\n{NUMBER}"
    lines = json.dumps(sample(0, image=None, source="dvqa_775k.json", conversations=sample()["conversations"]))
    (tmp_path / "y.jsonl").write_text(lines.replace("<image>\\n", ""), encoding="utf-8")
    _, (record,), _ = imported(str(tmp_path / "y.jsonl"), tmp_path / "out", answer_format=True)
    assert record.turns[0].text == f"what?\n{SHORT}"


def test_the_hub_is_asked_for_a_sources_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(repository: str, **options: Any) -> None:
        asked.update(options, repository=repository)
        options["local_dir"].mkdir(parents=True)
        (options["local_dir"] / "train-0.parquet").touch()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path))
    folder = fetch_hub_files("hub:@abc", source="chartqa")
    assert folder == str(tmp_path / "hub_data" / "HuggingFaceM4--ChartQA@abc")
    assert asked["repository"] == "HuggingFaceM4/ChartQA"
    assert asked["allow_patterns"] == ["data/train-*.parquet"]
    with pytest.raises(DataError, match=r'"hub:" names no repository'):
        fetch_hub_files("hub:", source="gqa")
