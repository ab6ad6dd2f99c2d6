"""Import of JSON and JSON Lines: what becomes of odd items, processes, kills, and what the report says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_samples import make_image

from manyeyes.cli.data import import_command, sources_command
from manyeyes.data.importing import import_data, importer
from manyeyes.data.importing.import_report import ImportReport
from manyeyes.data.importing.json_files import JsonWindow, parse_item
from manyeyes.data.importing.repairs import ADDED, GPT_FIRST, MERGED, MOVED, SYSTEM, UNANSWERED, repair_turns
from manyeyes.data.quarantine import QuarantinedSample
from manyeyes.data.records import Record, Turn, check_record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import hash_folder, open_folder
from manyeyes.data.source_items import SourceItem
from manyeyes.errors import DataError


def sample(number: int = 0, *, image: Any = "a.png", **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"answer {number}"}]
    return {"id": f"s{number}", "image": image, "conversations": turns, **changes}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").write_bytes(make_image(1).data)
    return folder


def run(root: Path, items: Any, **options: Any) -> tuple[ImportReport, list[Record], list[QuarantinedSample]]:
    data = root / "set.json"
    data.write_bytes(items if isinstance(items, bytes) else json.dumps(items, ensure_ascii=False).encode())
    return imported(str(data), root.parent / "out", **options)


def imported(url: str, out: Path, **options: Any) -> tuple[ImportReport, list[Record], list[QuarantinedSample]]:
    report = import_data(url, out, **options)
    records = list(RecordReader(open_folder(out).shards(report.dataset)))
    lines = (out / report.dataset.rpartition("-")[0] / "quarantine.jsonl").read_bytes().splitlines()
    left_out = [QuarantinedSample.model_validate_json(line) for line in lines]
    assert (report.items, report.kept) == (len(records) + len(left_out), len(records))
    assert len({record.id for record in records}) == len(records)
    for record in records:
        check_record(record)
    return report, records, left_out


@pytest.mark.parametrize(
    ("given", "read", "done"),
    [
        ("h:what? <image>|g:x", "h:<image>\nwhat?|g:x", [MOVED]),
        ("h:<image> a <image> b|g:x", "h:<image>\na  b|g:x", [MERGED]),
        ("h:<image>\na|g:x|h:<image>\nb|g:y", "h:<image>\na|g:x|h:b|g:y", [MERGED]),
        ("g:hello|h:<image>\na|g:x", "h:<image>\na|g:x", [GPT_FIRST]),
        ("h:a|g:x", "h:<image>\na|g:x", [ADDED]),
        ("h:<image>\na|g:x|h:b", "h:<image>\na|g:x", [UNANSWERED]),
        ("s:Be kind.|h:<image>\na|g:x", "h:<image>\nBe kind.\n\na|g:x", [SYSTEM]),
        ("h:<image>\na|g:x", "h:<image>\na|g:x", []),
    ],
)
def test_turns_are_read_as_the_originals_read_them(given: str, read: str, done: list[str]) -> None:
    names = {"h": "human", "g": "gpt", "s": "system"}
    turns = tuple((names[part[0]], part[2:]) for part in given.split("|"))
    repairs: Counter[str] = Counter()
    found = repair_turns(SourceItem(("a.png",), turns), repairs)
    assert "|".join(f"{turn.speaker[0]}:{turn.text}" for turn in found) == read
    assert sorted(repairs) == sorted(done)


def test_marks_of_several_images_stay_where_they_are() -> None:
    turns = (("user", "Is <image> like <image>?"), ("assistant", "no"))
    repairs: Counter[str] = Counter()
    found = repair_turns(SourceItem(("a", "b"), turns), repairs)
    assert found == (Turn("human", "Is <image> like <image>?"), Turn("gpt", "no"))
    assert not repairs


def test_every_item_is_kept_or_left_out_with_its_reason(root: Path) -> None:
    (root / "notes.png").write_text("no image", encoding="utf-8")
    (root / "cut.png").write_bytes(make_image(2, size=(64, 64)).data[:90])
    (root.parent / "secret.png").write_bytes(make_image(3).data)
    (root / "link.png").symlink_to(root.parent / "secret.png")
    bad = {
        "image missing": [sample(1, image="gone.png"), sample(2, image="x\0y"), sample(3, image="n" * 300)],
        "image outside of the root": [
            *(sample(4, image="../secret.png"), sample(5, image=str(root.parent / "secret.png"))),
            *(sample(6, image="link.png"), sample(7, image="https://example.org/a.png")),
        ],
        "bad image": [sample(8, image="notes.png"), sample(9, image="cut.png")],
        "bad turns": [
            *(sample(10, conversations=[]), sample(11, conversations=[{"from": "human", "value": "a"}])),
            *(sample(12, conversations=["a"]), sample(13, conversations=[{"from": "cat", "value": "a"}] * 2)),
        ],
        "no turns": [{"id": "s14", "image": "a.png", "text": "a caption"}],
        "not JSON": [17, None],
        "text is not UTF-8": [
            sample(18, conversations=[{"from": "human", "value": "\ud83d"}, sample()["conversations"][1]])
        ],
        "image marks and images differ": [sample(19, image=None), sample(20, image=["a.png", "a.png"])],
        "bad column": [sample(21, image=3)],
    }
    items = [sample(), *(item for group in bad.values() for item in group)]
    report, records, left_out = run(root, json.dumps(items).encode())
    assert report.reasons == {kind: len(group) for kind, group in sorted(bad.items())}
    assert [record.id for record in records] == ["set/s0"]
    assert [entry.row for entry in left_out] == list(range(1, len(items)))
    assert all(entry.reason.startswith(tuple(bad)) for entry in left_out)
    assert 'no file "gone.png"' in left_out[0].reason


def test_ids_are_texts_and_unique(root: Path) -> None:
    items = [sample(id=7), sample(id="7"), sample(id=None), sample(id="a~3"), sample(id=7), sample(id="  ")]
    report, records, _ = run(root, items, name="mine")
    ids = ["mine/7", "mine/7~1", "mine/2", "mine/a~3~3", "mine/7~4", "mine/5"]
    assert [record.id for record in records] == ids
    assert report.repairs["id made a text"] == 2
    assert report.repairs["id made of the place in the source"] == 2
    assert report.repairs["repeated id made unique"] == 2


NAMES = ["with space.png", "100%.png", "a%20b.png", "日本/猫.png", "caf\u00e9.png", "UPPER.PNG", "deep/er/x.png"]


def test_names_of_images_in_any_script_and_spelling_are_found(root: Path) -> None:
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make_image(len(name)).data)
    respelled = ["a%2520b.png", "cafe\u0301.png", "UPPER.png", "deep\\er\\x.png", "deep/er/x.jpg", "deep/../a.png"]
    items = [sample(number, image=name) for number, name in enumerate(NAMES + respelled)]
    report, records, left_out = run(root, items)
    assert not left_out
    assert [record.images[0].path for record in records] == NAMES + respelled
    assert report.repairs["image found under another spelling"] == len(respelled) - 1
    assert report.distinct_images < report.images == len(items)


def test_ways_to_say_that_there_is_no_image(root: Path) -> None:
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    nothing: list[Any] = [None, "", "None", "nan", float("nan"), []]
    report, _, left_out = run(root, [sample(n, image=image, conversations=turns) for n, image in enumerate(nothing)])
    assert (report.text_only, report.images, left_out) == (len(nothing), 0, [])


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_bom_crlf_and_raw_line_ends_are_read(lines: bool, root: Path) -> None:
    items = [json.dumps(sample(number, source="tallyqa_250k.json"), ensure_ascii=False) for number in range(3)]
    text = "\r\n".join([*items, "", ""]) if lines else "[" + ",\r\n".join(items) + "\r\n]\r\n"
    path = root / ("set.jsonl" if lines else "set.json")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    report, records, _ = imported(str(path), root.parent / "out")
    assert (report.kind, report.kept) == (("jsonl" if lines else "json"), 3)
    assert report.sources == {"tallyqa_250k": 3}
    assert [record.turns[1].text for record in records] == ["answer 0", "answer 1", "answer 2"]


def test_a_broken_line_costs_itself_alone(root: Path) -> None:
    (root / "set.jsonl").write_bytes(
        b"\n".join([json.dumps(sample(0)).encode(), b'{"id": "cut', b'{"id":"b\xff"}', json.dumps(sample(3)).encode()])
    )
    _, records, left_out = imported(str(root / "set.jsonl"), root.parent / "out")
    assert [record.id for record in records] == ["set/s0", "set/s3"]
    assert [(entry.row, entry.reason.split(":")[0]) for entry in left_out] == [(1, "not JSON"), (2, "no turns")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[{"messages": 1}, {"id"', r"broken at byte 18: Expecting"),
        (b'[{"messages": 1} {"id": 2}]', r'needed "," between items, found "\{"'),
        (b"[] x", "something follows the list"),
        ('[{"id": 1}]'.encode("utf-16"), "is UTF-16"),
        (b"[]", "has no items"),
        (b'[{"id": 1, "label": 2}]', "its items have id, label"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(content: bytes, found: str, root: Path) -> None:
    (root / "set.json").write_bytes(content)
    with pytest.raises(DataError, match=found):
        import_data(str(root / "set.json"), root.parent / "out", kind="json")
    assert not (root.parent / "out" / "manifest.json").exists()


def test_items_over_the_window_keep_their_offsets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyeyes.data.importing.json_files._WINDOW_BYTES", 5)
    items = [{"id": "é" * 40, "n": 12345678}, {"id": ']}\\"'}, {}]
    (root / "x.json").write_text("\ufeff " + json.dumps(items, ensure_ascii=False, indent=3), encoding="utf-8")
    with (root / "x.json").open("rb") as stream:
        window = JsonWindow(stream, name="x.json")
        window.expect("[", "first")
        found = [(start, text.encode("latin-1")) for start, text in window.items()]
    content = (root / "x.json").read_bytes()
    assert [parse_item(raw).row for _, raw in found] == items
    assert all(content[start : start + len(raw)] == raw for start, raw in found)


def test_any_number_of_processes_and_any_kill_give_the_same_bytes(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [sample(number, image="a.png" if number % 5 else "gone.png") for number in range(20)]
    (root / "set.json").write_text(json.dumps(items), encoding="utf-8")
    hashes = []
    for processes in (1, 2):
        out = root.parent / f"out{processes}"
        import_data(str(root / "set.json"), out, processes=processes, items_per_unit=6)
        assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "set"]
        hashes.append(hash_folder(out))

    out, seen = root.parent / "killed", []

    def stop(sentence: str, done: float) -> None:
        seen.append(sentence)
        if len(seen) == 6:  # four units are planned, two are done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_data(str(root / "set.json"), out, items_per_unit=6, on_progress=stop)
    monkeypatch.setattr(importer, "IdIndex", None)  # nothing is planned again
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.parquet")}
    assert len(before) == 2
    import_data(str(root / "set.json"), out, items_per_unit=6)
    assert set(before.values()) <= {path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert {hash_folder(out), *hashes} == {hashes[0]}
    assert not list(cache.rglob("*.parquet"))


def test_an_import_of_other_options_begins_anew(root: Path) -> None:
    (root / "set.json").write_text(json.dumps([sample()]), encoding="utf-8")
    out = root.parent / "out"

    def stop(sentence: str, done: float) -> None:
        if done == 1.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_data(str(root / "set.json"), out, on_progress=stop)
    (root / "b").mkdir()
    report = import_data(str(root / "set.json"), out, name="set", images=str(root), answer_format=True)
    assert report.kept == 1


def test_nothing_kept_is_an_error_that_says_why(root: Path) -> None:
    (root / "set.json").write_text(json.dumps([sample(image="gone.png")]), encoding="utf-8")
    with pytest.raises(DataError, match=r"none of 1 items can be kept: image missing \(1\)"):
        import_data(str(root / "set.json"), root.parent / "out")


def test_the_command_reports_and_says_where_the_page_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "My Set.json").write_text(json.dumps([sample(0), sample(1, image="gone.png")]), encoding="utf-8")
    out = root.parent / "out"
    result = CliRunner().invoke(import_command, [str(root / "My Set.json"), str(out), "--licence", "CC0-1.0"])
    assert result.exit_code == 0, result.output
    assert "1 of 2 items kept" in result.output
    assert "| image missing | 1 |" in result.output
    page = (out / "my-set" / "import.html").read_text(encoding="utf-8")
    assert "gone.png" in page
    assert "my-set/s0" in page
    entry = open_folder(out).dataset("my-set-train")
    assert (entry.licence, entry.source) == ("CC0-1.0", "My Set.json (json); 1 of 2 items left out")


def test_sources_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(sources_command, [])
    assert "llava-1.5-mix665k" in listed.output
    shown = CliRunner().invoke(sources_command, ["ChartQA"])
    assert "HuggingFaceM4/ChartQA" in shown.output
    assert "GPL-3.0" in shown.output
    wrong = CliRunner().invoke(sources_command, ["chartqq"])
    assert isinstance(wrong.exception, DataError)
