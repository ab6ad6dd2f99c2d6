from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from manyeyes.data.builders import BUILDERS, add_pretrained
from manyeyes.data.builders.__main__ import main
from manyeyes.data.builders.easy_vqa import (
    IN_A_SENTENCE,
    answer_in_a_sentence,
    balance,
    draw_validation_images,
    write_caption,
)
from manyeyes.data.records import check_record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot, hash_folder, open_folder, read_dvc_file
from manyeyes.errors import SnapshotError, SourceError

REPOSITORY = Path(__file__).parents[2]
PACKAGE = resources.files("easy_vqa") / "data"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    out = tmp_path_factory.mktemp("easy-vqa") / "data"
    BUILDERS["easy-vqa"](out)
    return open_folder(out)


def test_the_published_numbers_are_all_there(snapshot: Snapshot) -> None:
    counts = {name: (entry.rows, entry.images, entry.licence) for name, entry in snapshot.manifest.datasets.items()}
    assert counts == {
        "easy-vqa-train": (3800, 3800, "MIT"),
        "easy-vqa-val": (200, 200, "MIT"),
        "easy-vqa-test": (1000, 1000, "MIT"),
    }
    questions = {name: sum(len(record.turns) // 2 for record in RecordReader(snapshot.shards(name))) for name in counts}
    assert questions["easy-vqa-train"] + questions["easy-vqa-val"] == 38_575
    assert questions["easy-vqa-test"] == 9_673


def test_a_record_is_what_was_published(snapshot: Snapshot) -> None:
    published = json.loads((PACKAGE / "test" / "questions.json").read_text(encoding="utf-8"))
    record = RecordReader(snapshot.shards("easy-vqa-test")).read(123)
    check_record(record)
    assert (record.id, record.source) == ("easy-vqa/test/123", "easy-vqa")
    assert record.images[0].data == (PACKAGE / "test" / "images" / "123.png").read_bytes()
    pairs = [(question, answer) for question, answer, number in published if number == 123]
    texts = [turn.text for turn in record.turns]
    assert texts[0] == f"<image>\n{pairs[0][0]}"
    assert list(zip(texts[::2], texts[1::2], strict=True))[1:] == pairs[1:]
    assert texts[1] == pairs[0][1]


def test_validation_images_are_those_with_the_lowest_hashes(snapshot: Snapshot) -> None:
    held_out = {int(record.id.rpartition("/")[2]) for record in RecordReader(snapshot.shards("easy-vqa-val"))}
    trained = {int(record.id.rpartition("/")[2]) for record in RecordReader(snapshot.shards("easy-vqa-train"))}
    assert held_out | trained == set(range(4000))
    assert not held_out & trained
    highest_held_out = max(hashlib.sha256(f"easy-vqa-val/{number}".encode()).hexdigest() for number in held_out)
    lowest_trained = min(hashlib.sha256(f"easy-vqa-val/{number}".encode()).hexdigest() for number in trained)
    assert highest_held_out < lowest_trained
    assert held_out == draw_validation_images(set(range(4000)))


def test_a_second_build_gives_the_same_bytes_and_keeps_the_rest(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "data"
    shutil.copytree(snapshot.path, out)
    part = tmp_path / "parts" / "tiny-lm"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}", encoding="utf-8")
    add_pretrained(out, tmp_path / "parts")
    before = hash_folder(out)
    (out / "easy-vqa" / "val-00000.parquet").write_bytes(b"damaged")
    result = CliRunner().invoke(main, ["easy-vqa", str(out)])
    assert result.exit_code == 0, result.output
    assert f"md5 {before}" in result.output
    assert hash_folder(out) == before
    assert (out / "pretrained/tiny-lm/config.json").is_file()


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        ("is there a blue shape in the image?", "no", "There is no blue shape."),
        ("is there not a blue shape?", "yes", "There is no blue shape."),
        ("is no circle present?", "no", "There is a circle."),
        ("does the image contain a triangle?", "yes", "There is a triangle."),
        ("what color is the rectangle?", "teal", "The rectangle is teal."),
        ("what is the color of the shape?", "red", "The shape is red."),
        ("what is the gray shape?", "circle", "The gray shape is a circle."),
        ("what shape does the image contain?", "circle", "The shape is a circle."),
    ],
)
def test_an_answer_in_a_sentence_says_what_the_word_says(question: str, answer: str, sentence: str) -> None:
    assert answer_in_a_sentence(question, answer) == sentence


def test_a_question_about_nothing_that_easy_vqa_has_is_refused() -> None:
    with pytest.raises(SourceError, match="is there a cat"):
        answer_in_a_sentence("is there a cat?", "no")


def test_sentences_and_captions_agree_with_every_published_answer() -> None:
    published = json.loads((PACKAGE / "train" / "questions.json").read_text(encoding="utf-8"))
    pairs: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in published:
        pairs.setdefault(number, []).append((question, answer))
    captions = {number: caption for number, own in pairs.items() if (caption := write_caption(own)) is not None}
    assert len(captions) == 3542
    for number, caption in captions.items():
        _, colour, shape = caption.removesuffix(".").split()
        for question, answer in pairs[number]:
            sentence = answer_in_a_sentence(question, answer)
            named = set(sentence.lower().removesuffix(".").split())
            truth = {colour, shape, "shape"}
            if " no " in sentence:  # what is not there is neither its colour nor its shape
                assert not named & {colour, shape}, (caption, sentence)
            else:
                assert named - {"there", "is", "a", "the"} <= truth, (caption, sentence)


def test_the_sentences_are_the_same_questions_on_the_same_images(snapshot: Snapshot, tmp_path: Path) -> None:
    BUILDERS["easy-vqa-sentences"](tmp_path)
    built = open_folder(tmp_path)
    for split in ("train", "val", "test"):
        assert built.dataset(f"easy-vqa-sentences-{split}").rows == snapshot.dataset(f"easy-vqa-{split}").rows
    word = RecordReader(snapshot.shards("easy-vqa-test")).read(7)
    sentence = RecordReader(built.shards("easy-vqa-sentences-test")).read(7)
    check_record(sentence)
    assert (sentence.id, sentence.images) == (word.id.replace("easy-vqa", "easy-vqa-sentences"), word.images)
    assert [turn.text for turn in sentence.turns[0::2]] == [f"{turn.text} {IN_A_SENTENCE}" for turn in word.turns[0::2]]
    held_out = {record.id.rpartition("/")[2] for record in RecordReader(snapshot.shards("easy-vqa-val"))}
    captions = list(RecordReader(built.shards("easy-vqa-sentences-captions")))
    assert not held_out & {record.id.rpartition("/")[2] for record in captions}
    assert {len(record.turns) for record in captions} == {2}
    balanced = list(RecordReader(built.shards("easy-vqa-sentences-balanced")))
    assert not held_out & {record.id.rpartition("/")[2] for record in balanced}
    starts = Counter(turn.text[: len("There is a ")] for record in balanced for turn in record.turns[1::2])
    assert 0 < starts["There is no"] <= starts["There is a "]
    assert all(IN_A_SENTENCE in turn.text for record in balanced for turn in record.turns[0::2])


def test_balanced_questions_ask_as_often_for_what_is_not_there() -> None:
    pairs = [
        ("is there a red shape?", "no"),
        ("is there a blue shape?", "yes"),
        ("what color is the shape?", "blue"),
        ("is no green shape present?", "yes"),
        ("does the image not contain a teal shape?", "yes"),
        ("is there a circle?", "no"),
        ("is no circle present?", "yes"),
    ]
    kept = balance(pairs)
    assert [pair for pair in pairs if pair in kept] == kept
    assert pairs[1] in kept
    assert pairs[2] in kept
    assert len({pairs[0], pairs[3], pairs[4]} & set(kept)) == 1  # as many colours that are not there as are
    assert not {pairs[5], pairs[6]} & set(kept)  # no question about a shape that is there
    assert balance(list(reversed(pairs))) == list(reversed(kept))


def test_pretrained_parts_are_asked_for_by_name(snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotError, match="manyeyes step pretrain_language_model"):
        add_pretrained(snapshot.path, tmp_path / "empty")


def test_an_unknown_builder_offers_the_nearest(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["easy-vq", str(tmp_path)])
    assert result.exit_code == 2
    assert 'Did you mean "easy-vqa"' in result.output


def test_the_committed_snapshot_is_what_the_builder_makes(snapshot: Snapshot, tmp_path: Path) -> None:
    md5 = read_dvc_file(REPOSITORY / "data.dvc").md5
    remote = REPOSITORY / "infra/dvc-remote/files/md5"
    listing = json.loads((remote / md5[:2] / f"{md5[2:]}.dir").read_text(encoding="utf-8"))
    committed = {entry["relpath"]: entry["md5"] for entry in listing if entry["relpath"].startswith("easy-vqa/")}
    built = {
        f"easy-vqa/{path.name}": hashlib.md5(path.read_bytes()).hexdigest()
        for path in (snapshot.path / "easy-vqa").iterdir()
    }
    assert built == committed
