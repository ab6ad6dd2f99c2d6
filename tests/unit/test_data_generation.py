"""Data that a language model writes: what is asked, what is read, what is refused and kept, and what it would cost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from manyeyes.data.generation import drawing_kinds, llava_bench
from manyeyes.data.generation.dataset import GenerationReport, RefusedItem, UnusableItem, generate_dataset, rehearse
from manyeyes.data.generation.descriptions import Description, read_descriptions
from manyeyes.data.generation.interview import RefusedError
from manyeyes.data.generation.llava import read_description, read_one_pair, read_pairs, sampler
from manyeyes.data.generation.llava_prompts import COMPLEX, CONVERSATION, DETAIL
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import DataError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.judging.scoring import JUDGINGS
from manyeyes.evaluation.score import read_references
from manyeyes.recipe.service import ServiceSpec
from manyeyes.web.chat_client import ChatClient
from tests.cli_calls import call
from tests.judge_server import JudgeServer, Trouble, judge_server

DIALOGUE = "Question:\nWhat is it?\n===\nAnswer:\nA red square.\n===\nQuestion:\nHow many?\n===\nAnswer:\nOne.\n==="


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MANYEYES_GENERATION_KEY", raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 1.png and one outside."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (folder / "1.png", tmp_path / "outside.png"):
        Image.new("RGB", (8, 6), "red").save(path)
    return folder


def client(server: JudgeServer, cache: Path | None = None) -> ChatClient:
    spec = ServiceSpec(endpoint=server.endpoint, model="writer", key_from="NO_KEY", concurrency=2, readings=2)
    return ChatClient(spec, cache=cache, wait=lambda _seconds: None, keep_unreadable=True)


def description(item_id: str, image: str = "1.png", *captions: str) -> Description:
    return Description(item_id, "d.jsonl", image, captions or (f"A red square, {item_id}.",), ())


def write_lines(path: Path, *lines: dict[str, Any] | str) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_context_is_captions_and_boxes_to_three_decimals(tmp_path: Path) -> None:
    line = {"id": 7, "image": "a b.jpg", "captions": ["A dog\n runs. ", " "], "width": 200, "height": 100}
    path = write_lines(tmp_path / "d.jsonl", {**line, "boxes": [{"category": "dog", "box": [20, 10, 100, 50]}]})
    (item,) = read_descriptions(path)
    assert isinstance(item, Description)
    assert (item.id, item.image) == ("7", "a b.jpg")
    assert item.as_text(boxes=True) == "A dog runs.\n\ndog: [0.100, 0.100, 0.500, 0.500]"
    assert item.as_text(boxes=False) == "A dog runs."


def test_coco_files_give_the_same(tmp_path: Path) -> None:
    captions = {
        "images": [{"id": 5, "file_name": "5.jpg", "width": 200, "height": 100}],
        "annotations": [{"image_id": 5, "caption": "A dog runs."}, {"image_id": 9, "caption": "Another."}],
    }
    instances = {
        "annotations": [{"image_id": 5, "category_id": 18, "bbox": [20, 10, 80, 40]}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    for name, content in (("captions.json", captions), ("instances.json", instances)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    item, orphan = read_descriptions(tmp_path / "captions.json", instances=tmp_path / "instances.json")
    assert isinstance(item, Description)
    assert (item.id, item.image) == ("5", "5.jpg")
    assert item.as_text(boxes=True) == "A dog runs.\n\ndog: [0.100, 0.100, 0.500, 0.500]"
    assert isinstance(orphan, UnusableItem)
    assert "needed: it in the list of images" in orphan.reason
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": []}), encoding="utf-8")
    with pytest.raises(DataError, match="has no images"):
        list(read_descriptions(tmp_path / "captions.json"))


def test_a_line_that_is_no_description_is_put_aside_with_its_reason(tmp_path: Path) -> None:
    good = {"id": "1", "image": "1.png", "captions": ["A dog."]}
    outside = {**good, "boxes": [{"category": "dog", "box": [0, 0, 5, 1]}]}
    lines = ["\ufeff" + json.dumps(good), "{", {"id": "2"}, {**good, "captions": "A dog."}, outside, "[1]", "NaN"]
    path = write_lines(tmp_path / "d.jsonl", *lines)
    first, *others = read_descriptions(path)
    assert isinstance(first, Description)
    reasons = [item.reason for item in others if isinstance(item, UnusableItem)]
    assert len(reasons) == 6
    assert "d.jsonl:3 has no captions" in reasons[1]
    assert "is not inside its image" in reasons[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 parts"),
        ("Sure! Here it is.", "part 1 begins with 'Sure! Here"),
        ("Question:\na\n===", "1 parts"),
        ("Question:\na\n===\nQuestion:\nb\n===", 'part 2 begins with .*"Answer:"'),
        ("Question:\na\n===\nAnswer:\n\n===", "part 2"),
        (DIALOGUE.replace("A red square.", "The captions say so."), "The captions"),
        (DIALOGUE.replace("A red square.", "At [0.1, 0.2, 0.3, 0.4]."), "'\\[0.1,'"),
        (DIALOGUE.replace("A red square.", "I'm sorry, I cannot see."), "I'm sorry"),
        (f"{DIALOGUE}\n" * 11, "at most 20"),
    ],
)
def test_nonsense_is_refused_with_a_reason(text: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        read_pairs(text)


def test_what_the_prompts_show_is_read_as_they_say() -> None:
    for prompt, read in ((CONVERSATION, read_pairs), (DETAIL, read_description), (COMPLEX, read_one_pair)):
        for _, answer in prompt.examples:
            assert read(answer)
    assert read_pairs(DIALOGUE) == [("What is it?", "A red square."), ("How many?", "One.")]
    with pytest.raises(RefusedError, match="2 questions; one is needed"):
        read_one_pair(DIALOGUE)
    with pytest.raises(RefusedError, match="2 words; at least 25"):
        read_description("Two words.")


def test_items_become_records_or_are_refused_with_reason_and_text(images: Path, tmp_path: Path) -> None:
    def say(body: dict[str, Any], before: int) -> str | Trouble:
        asked = body["messages"][-1]["content"]
        if "filtered" in asked:
            return Trouble(status=400, body=b"content filter")
        return "Well ..." if "odd" in asked else DIALOGUE

    items = [
        description("a"),
        description("odd"),
        description("filtered"),
        description("missing", "2.png"),
        description("outside", "../outside.png"),
        description("a"),
        UnusableItem("d.jsonl:9", "d.jsonl", "no JSON"),
        description("b"),
    ]
    out = tmp_path / "out"
    facts = {"kind": "conversation", "name": "talks", "licence": "CC0-1.0"}
    with judge_server(say) as server:
        made = client(server, tmp_path / "kept")
        report = generate_dataset(items, sampler("conversation", images), made, out=out, **facts)
        asked = len(server.bodies)
        assert asked == 2 + 2 + 1
        assert CONVERSATION.messages("A red square, a.") in [body["messages"] for body in server.bodies]
        again = generate_dataset(
            items, sampler("conversation", images), client(server, tmp_path / "kept"), out=out, **facts
        )
        # Only what the service refused is asked again: that costs nothing.
        assert len(server.bodies) == asked + 1
    assert (report.records, report.refused) == (again.records, again.refused) == (2, 6)
    assert again.service.cached == 3
    snapshot = open_folder(out)
    records = list(RecordReader(snapshot.shards("talks-train")))
    assert [record.id for record in records] == ["talks/a", "talks/b"]
    assert [turn.text for turn in records[0].turns] == ["<image>\nWhat is it?", "A red square.", "How many?", "One."]
    assert records[0].images[0].data == (images / "1.png").read_bytes()
    digests = {"conversation 1": CONVERSATION.digest}
    told = {"model": "judge-2024-01-01", "prompts": digests, "source": "d.jsonl"}
    assert json.loads(records[0].provenance) == told
    lines = (out / "talks" / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    refused = {item.id: item for item in map(RefusedItem.model_validate_json, lines)}
    assert refused["odd"].text == "Well ..."
    assert "part 1 begins with 'Well ...'" in refused["odd"].reason
    assert "content filter" in refused["filtered"].reason
    assert "cannot be read" in refused["missing"].reason
    assert "outside of" in refused["outside"].reason
    assert refused["a"].reason.startswith("another item has this id")
    assert refused["d.jsonl:9"].reason == "no JSON"
    kept = GenerationReport.model_validate_json((out / "talks" / "generation.json").read_bytes())
    assert kept == again
    assert kept.prompts == digests


def test_a_run_that_ends_early_leaves_no_data_set_and_goes_on_where_it_was(images: Path, tmp_path: Path) -> None:
    broken = True

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        return Trouble(status=401) if broken and "d3" in body["messages"][-1]["content"] else DIALOGUE

    items = [description(f"d{number}") for number in range(6)]
    facts = {"kind": "conversation", "name": "talks", "licence": "CC0-1.0"}
    with judge_server(say) as server:
        with pytest.raises(Exception, match="a key that it takes"):
            generate_dataset(
                items, sampler("conversation", images), client(server, tmp_path / "kept"), out=tmp_path / "out", **facts
            )
        assert not (tmp_path / "out" / "talks").exists()
        broken, asked = False, len(server.bodies)
        second = client(server, tmp_path / "kept")
        report = generate_dataset(items, sampler("conversation", images), second, out=tmp_path / "out", **facts)
        assert report.records == 6
        assert report.service.cached >= 3
        assert len(server.bodies) - asked == 6 - report.service.cached


def test_command_says_first_what_it_costs_and_then_writes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": str(number), "image": "1.png", "captions": [f"Square {number}."]} for number in range(4)]
    path, out = write_lines(tmp_path / "d.jsonl", *lines), str(tmp_path / "out")
    with judge_server(lambda _body, _before: COMPLEX.examples[0][1]) as server:
        words = ["data", "generate", "complex", str(path), out, "--images", str(images), "--licence", "CC0-1.0"]
        words += ["--endpoint", server.endpoint, "--model", "writer", "--price-in", "2", "--price-out", "8"]
        assert call(monkeypatch, *words, "--dry-run") == 0
        assert server.bodies == []
        said = capsys.readouterr().out
        assert "4 questions to ask, 0 answered already" in said
        assert "cost: about 0." in said
        assert not Path(out).exists()
        assert call(monkeypatch, *words, "--limit", "3", "--max-cost", "1") == 0
        assert "3 records" in capsys.readouterr().out
        assert call(monkeypatch, *words, "--dry-run") == 0
        assert "1 questions to ask, 3 answered already" in capsys.readouterr().out
        assert call(monkeypatch, *words, "--max-cost", "1", "--name", "No Name") == 2
        assert call(monkeypatch, *words, "--concurrency", "0") == 2
    assert "--concurrency does not do" in capsys.readouterr().err
    record = RecordReader(open_folder(Path(out)).shards("generated-complex-train")).read(0)
    assert record.turns[0].text.startswith("<image>\nWhat can the seller do")


def test_prompts_to_draw_are_read_and_filtered_by_their_words() -> None:
    for _, answer in drawing_kinds.RECAPTION.examples:
        assert drawing_kinds.read_recaption(answer)
    assert drawing_kinds.read_prompts(drawing_kinds.DIALOGUE.examples[-1][1], answers=2)[0] == ""
    long = json.dumps({"request": "a", "prompt": "word " * 31})
    for text, said in ((long, "31 words"), ("{}", "a request and a prompt"), ("nonsense", "no JSON"), ("[]", "needed")):
        with pytest.raises(RefusedError, match=said):
            drawing_kinds.read_recaption(text)
    for text, said in (
        ('["a"]', "list of 2"),
        ('["", ""]', "nothing"),
        ('["", "two words"]', "2 words"),
        ("{}", "list"),
    ):
        with pytest.raises(RefusedError, match=said):
            drawing_kinds.read_prompts(text, answers=2)
    with pytest.raises(RefusedError, match="text without is needed"):
        drawing_kinds.read_recaption('{"request": "a <GEN>", "prompt": "b"}')


def test_dialogues_become_records_that_draw(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "d.jsonl",
        {"id": 1, "conversations": ["12 times 12?", "144.", "Where can I rest?", "At a lake."]},
        {"id": 2, "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        {"id": 3},
    )
    answer = drawing_kinds.DIALOGUE.examples[-1][1]
    with judge_server(lambda _body, _before: answer) as server:
        report = generate_dataset(
            drawing_kinds.read_dialogues(path),
            drawing_kinds.make_dialogue_drawing,
            client(server),
            kind="dialogue-drawing",
            out=tmp_path / "out",
            name="draws",
            licence="CC0-1.0",
        )
    assert (report.records, report.refused) == (1, 2)
    (record,) = RecordReader(open_folder(tmp_path / "out").shards("draws-train"))
    texts = [turn.text for turn in record.turns]
    assert texts[:3] == ["12 times 12?", "144.", "Where can I rest? <GEN>"]
    assert texts[3] == f"At a lake. <h> {json.loads(answer)[1]} </h>"


def test_a_benchmark_of_own_images_has_the_columns_and_references_of_the_published_one(
    images: Path, tmp_path: Path
) -> None:
    def say(body: dict[str, Any], before: int) -> str:
        system = body["messages"][0]["content"]
        answers = {CONVERSATION.system: DIALOGUE, COMPLEX.system: COMPLEX.examples[0][1]}
        return answers.get(system, "A square that is red.")

    items = [description(str(number)) for number in range(5)]
    drawn = llava_bench.draw_images(items, 2)
    assert drawn == llava_bench.draw_images(reversed(items), 2)
    with judge_server(say) as server:
        counted = rehearse(drawn, llava_bench.question_maker(images), client(server))
        report = llava_bench.generate_questions(
            drawn, client(server), images=images, out=tmp_path / "out", licence="CC0-1.0"
        )
        assert counted.calls == len(server.bodies) == 2 * 5
    assert report.records == 6
    row = BENCHMARKS["llava-bench-coco"]
    snapshot = open_folder(tmp_path / "out")
    assert snapshot.dataset(row.dataset).images == 6
    (shard,) = snapshot.shards(row.dataset)
    found = pq.read_table(shard).to_pylist()
    assert set(found[0]) == set(row.columns)
    assert [item["category"] for item in found[:3]] == ["conv", "detail", "complex"]
    references = read_references(tmp_path / "out" / row.name / "references.jsonl")
    assert [row.item_id(reference) for reference in references] == [row.item_id(item) for item in found]
    asked = JUDGINGS[row.name].ask(references[0], "A circle.", "official")
    assert "[Question]\nWhat is it?" in asked[1]["content"]
    assert "[Assistant 1]\nA square that is red." in asked[1]["content"]


def test_a_decompression_bomb_is_refused_before_anything_is_asked(images: Path, tmp_path: Path) -> None:
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, format="PNG")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (images / "bomb.png").write_bytes(bytes(bomb))
    with judge_server(lambda _body, _before: DIALOGUE) as server:
        facts = {"kind": "conversation", "name": "talks", "licence": "CC0-1.0"}
        report = generate_dataset(
            [description("a", "bomb.png")],
            sampler("conversation", images),
            client(server),
            out=tmp_path / "out",
            **facts,
        )
        assert (report.records, report.refused, server.bodies) == (0, 1, [])
