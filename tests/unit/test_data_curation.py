from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from manyeyes.cli.data import curate_command
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.curation.curate import add_prompt, curate
from manyeyes.data.curation.draw import allot, draw_mixture
from manyeyes.data.curation.noun_phrases import find_noun_phrases, thin_out
from manyeyes.data.curation.recipe import list_curation_recipes, load_curation_recipe, read_curation_text
from manyeyes.data.curation.report import CurationReport
from manyeyes.data.records import ImageFile, Record, Turn, read_image_file
from manyeyes.data.shards import RecordReader, write_shards
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.errors import DataError, RecipeError, StorageError
from tests.unit.data_samples import make_snapshot

SHORT, LETTER = "Answer the question using a single word or phrase.", "Answer with the letter."


def make_photo(seed: int, *, quality: int = 90, width: int = 96) -> ImageFile:
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, 72), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return read_image_file(buffer.getvalue(), path=f"{seed}.jpg")


def make_sample(number: int, source: str, question: str, answer: str, image: ImageFile | None = None) -> Record:
    asked = question if image is None else f"<image>\n{question}"
    images = () if image is None else (image,)
    return Record(f"{source}/{number}", source, images, (Turn("human", asked), Turn("gpt", answer)))


def make_samples() -> list[Record]:
    return [
        *(
            make_sample(n, "clevr_700k.json", f"How many are {n % 7} high?", str(n % 9), make_photo(n))
            for n in range(60)
        ),
        *(make_sample(n, "docvqa_39k", f"What is the total of {n}?", f"${n}", make_photo(100 + n)) for n in range(20)),
        *(make_sample(n, "openorca_994k.json", f"Explain {n}.", "It follows from the lemma.") for n in range(12)),
        *(make_sample(n, "llava150k", f"What is in {n}?", f"A red house {n}.", make_photo(200 + n)) for n in range(10)),
        # An exact duplicate; one that was encoded anew; another picture with the same words; half a benchmark's.
        make_sample(50, "llava150k", "What is in 3?", "A red house 3.", make_photo(203)),
        make_sample(51, "llava150k", "what is in 4", "A red house 4", make_photo(204, quality=50, width=100)),
        make_sample(52, "llava150k", "What is in 5?", "A red house 5.", make_photo(999)),
        make_sample(53, "llava150k", "What is in the last one?", "Что это? Красный дом", make_photo(998)),
        make_sample(54, "llava150k", "What was in the test?", "A blue house.", make_photo(997)),
        make_sample(55, "llava150k", "Who speaks?", "", None),
    ]


RECIPE = """
name: toy-mix
inputs: [{datasets: [toy-train]}]
answer_formats: true
cap: 40
ratio: {Counting: 2, OCR: 1, Language: 1, General: 1}
filters: {scripts: [latin]}
duplicates: {near: {}}
benchmarks: {names: [toy-test]}
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    test = [make_sample(0, "test", "What?", "A house.", make_photo(997, quality=60))]
    return make_snapshot(tmp_path_factory.mktemp("inputs"), {"train": make_samples(), "test": test}, rows_per_shard=30)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def curated(snapshot: Snapshot, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CurationReport, Path]:
    out = tmp_path_factory.mktemp("curated") / "out"
    return curate(read_curation_text(RECIPE), [snapshot], out, cache_dir=cache), out


def listed(out: Path) -> dict[str, tuple[bool, str, str]]:
    rows = pq.read_table(out / "toy-mix-samples.parquet").to_pylist()
    return {row["id"]: (row["drawn"], row["reason"], row["detail"]) for row in rows}


def test_every_sample_is_listed_with_its_reason(curated: tuple[CurationReport, Path]) -> None:
    report, out = curated
    rows = listed(out)
    assert len(rows) == report.samples == len(make_samples())
    assert rows["llava150k/53"][:2] == (False, "script")
    assert rows["llava150k/54"][1] == "benchmark"
    assert "near duplicate" in rows["llava150k/54"][2]
    assert rows["llava150k/55"][1] == "unusable"
    assert {rows[f"llava150k/{n}"][1] for n in (3, 50)} == {"duplicate", "drawn"}
    assert {rows[f"llava150k/{n}"][1] for n in (4, 51)} == {"near duplicate", "drawn"}
    assert {rows[f"llava150k/{n}"][1] for n in (5, 52)} == {"drawn"}
    assert any(detail.startswith("the same as toy-train#") for _, _, detail in rows.values())
    counts = Counter(reason for _, reason, _ in rows.values())
    assert {name: count for name, count in counts.items() if name != "drawn"} == report.reasons


def test_ratio_and_cap_hold(curated: tuple[CurationReport, Path]) -> None:
    report, _ = curated
    drawn = {row.category: row.drawn for row in report.sources}
    # 11 of General are left and the scarcest: a fifth each, two of Counting.
    assert drawn == {"Counting": 22, "OCR": 11, "Language": 11, "General": 11}
    assert report.reasons["cap"] == 20
    assert report.drawn == 55


def test_the_new_data_set_holds_what_the_list_says_with_prompts(curated: tuple[CurationReport, Path]) -> None:
    _, out = curated
    reader = RecordReader(open_folder(out).shards("toy-mix-train"))
    records = {record.id: record for record in reader}
    assert sorted(records) == sorted(name for name, (drawn, _, _) in listed(out).items() if drawn)
    questions = {record.source: record.turns[0].text for record in records.values()}
    assert questions["clevr_700k.json"].endswith(f"high?\n{SHORT}")
    assert questions["docvqa_39k"].endswith("\nGive the short answer directly.")
    assert "\n" not in questions["openorca_994k.json"]
    entry = open_folder(out).dataset("toy-mix-train")
    assert (entry.licence, "toy-mix" in entry.source) == ("CC0-1.0", True)


def test_answers_of_one_word_count_where_nothing_asks_for_them(curated: tuple[CurationReport, Path]) -> None:
    report, _ = curated
    assert (report.answers_before.one_word, report.answers_before.answers) == (80, 108)
    assert (report.answers_after.one_word, report.answers_after.answers) == (0, 55)


def test_what_is_drawn_depends_neither_on_order_nor_on_shards(
    curated: tuple[CurationReport, Path], tmp_path: Path
) -> None:
    records = [*reversed(make_samples())]
    test = [make_sample(0, "test", "What?", "A house.", make_photo(997, quality=60))]
    other = make_snapshot(tmp_path / "in", {"train": records, "test": test}, rows_per_shard=17)
    report = curate(read_curation_text(RECIPE), [other], tmp_path / "out", cache_dir=tmp_path / "cache")
    assert report.drawn_digest == curated[0].drawn_digest
    assert {name: row[:2] for name, row in listed(tmp_path / "out").items()} == {
        name: row[:2] for name, row in listed(curated[1]).items()
    }


def test_a_smaller_cap_draws_part_of_what_a_larger_one_draws(snapshot: Snapshot, cache: Path) -> None:
    def of(cap: int, seed: int = 0) -> set[int]:
        recipe = read_curation_text(f"{{name: a, seed: {seed}, cap: {cap}, inputs: [{{datasets: [toy-train]}}]}}")
        drawn = draw_mixture(recipe, [snapshot], cache_dir=cache)
        return set(np.flatnonzero(drawn.fate == 0).tolist())

    assert of(5) < of(15) < of(40)
    assert of(15) != of(15, seed=1)


def test_a_killed_copy_goes_on_and_gives_the_same_bytes(snapshot: Snapshot, cache: Path, tmp_path: Path) -> None:
    recipe = read_curation_text("{name: a, inputs: [{datasets: [toy-train]}]}")

    def stop(sentence: str, done: float) -> None:
        if sentence.startswith("copying") and done > 0.5:
            raise KeyboardInterrupt

    whole = tmp_path / "whole"
    curate(recipe, [snapshot], whole, cache_dir=cache, rows_per_shard=20)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        curate(recipe, [snapshot], cut, cache_dir=cache, rows_per_shard=20, progress=stop)
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".cut-a-"))
    kept = {path: path.stat().st_mtime_ns for path in left.glob("train-*.parquet")}
    assert len(kept) == 4
    assert not cut.exists()
    curate(recipe, [snapshot], cut, cache_dir=cache, rows_per_shard=20)
    assert not left.exists()
    times = {path.stat().st_mtime_ns for path in (cut / "a").iterdir()}
    assert set(kept.values()) <= times
    for path in (whole / "a").iterdir():
        assert path.read_bytes() == (cut / "a" / path.name).read_bytes()


def test_captions_are_thinned_out_by_what_they_name(tmp_path: Path) -> None:
    captions = [*(f"a dog in the garden number {n}" for n in range(8)), *(3 * ["a zebra"]), "an owl", "two axolotls"]
    records = [make_sample(n, "cc3m", "Describe.", text) for n, text in enumerate(captions)]
    snapshot = make_snapshot(tmp_path / "in", {"train": records})
    recipe = read_curation_text(
        "{name: a, duplicates: {exact: false}, noun_phrases: {sources: [cc*], min_count: 3, max_count: 5}}"
    )
    drawn = draw_mixture(recipe, [snapshot], cache_dir=tmp_path / "cache")
    kept = [captions[sample] for sample in np.flatnonzero(drawn.fate == 0)]
    assert sorted(text for text in kept if "dog" not in text) == 3 * ["a zebra"]
    assert sum("dog" in text for text in kept) == 5
    with pytest.raises(DataError, match=r"noun_phrases.sources is coco; a source of the inputs: cc3m"):
        draw_mixture(
            read_curation_text("{name: a, noun_phrases: {sources: [coco]}}"), [snapshot], cache_dir=tmp_path / "cache"
        )


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man in a red shirt is riding a brown horse", ["man", "red shirt", "brown horse"]),
        ("two dogs playing frisbee", ["dogs", "frisbee"]),
        ("", []),
    ],
)
def test_noun_phrases_have_no_article_and_no_number(caption: str, phrases: list[str]) -> None:
    assert find_noun_phrases(caption) == phrases


def test_frequent_phrases_take_those_that_are_drawn_first() -> None:
    samples = np.array([0, 1, 2, 3, 3, 4])
    phrases = np.array([7, 7, 7, 7, 9, 9], np.uint64)
    kept, unique, frequent = thin_out(samples, phrases, rank=np.array([4, 3, 2, 1, 0]), min_count=3, max_count=2)
    assert (kept.tolist(), unique, frequent) == ([2, 3], 2, 1)


def test_a_total_keeps_the_ratio_and_scarce_categories_limit_it() -> None:
    counts = {"a": 100, "b": 30, "c": 9}
    assert allot(counts, {"a": 50, "b": 50}, total=None) == {"a": 30, "b": 30}
    assert allot(counts, {"a": 3, "b": 1}, total=20) == {"a": 15, "b": 5}
    with pytest.raises(DataError, match="ratio names d, of which no sample is left"):
        allot(counts, {"a": 1, "d": 1}, total=None)


def test_a_question_that_says_how_to_answer_stays() -> None:
    asked = f"Is it red?\n{SHORT}"
    record = Record("a", "s", (), (Turn("human", asked), Turn("gpt", "Yes"), Turn("human", "Why?"), Turn("gpt", "So")))
    assert [turn.text for turn in add_prompt(record, "Give the short answer directly.").turns] == [
        asked,
        "Yes",
        "Why?\nGive the short answer directly.",
        "So",
    ]
    chosen = Record("b", "s", (), (Turn("human", "Which?"), Turn("gpt", "B"), Turn("human", "Why?"), Turn("gpt", "So")))
    assert [turn.text for turn in add_prompt(chosen, SHORT, LETTER).turns[::2]] == [
        f"Which?\n{LETTER}",
        f"Why?\n{SHORT}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, capp: 3}", r'capp; no such field. Did you mean "cap"'),
        ("{name: a, sources: {x: {promt: b}}}", r'sources.x.promt; no such field. Did you mean "prompt"'),
        ("{name: a, cap: 0}", r"cap is 0"),
        ("{name: A b}", "name is 'A b'"),
        ("{name: a, filters: {aspect: {min: 3, max: 2}}}", "min up to max; 3 is above 2"),
        ("{name: a, ratio: {Generl: 1}}", r'ratio names "Generl"'),
        ("{name: a, ratio: {OCR: 1}, sources: {x: {category: mine}}}", "a ratio for every category of sources; mine"),
        ("{cap: 3}", "name is missing"),
        ("[]", "holds list"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_curation_text(text)


@pytest.mark.parametrize("name", list_curation_recipes())
def test_recipes_of_the_package_are_recipes(name: str) -> None:
    assert load_curation_recipe(name).name == name


def test_filters_that_leave_nothing_and_an_input_as_target_are_refused(
    snapshot: Snapshot, cache: Path, tmp_path: Path
) -> None:
    recipe = read_curation_text("{name: a, inputs: [{datasets: [toy-train]}], filters: {text_chars: {min: 99999}}}")
    with pytest.raises(DataError, match="none of 108 samples is left"):
        curate(recipe, [snapshot], tmp_path / "out", cache_dir=cache)
    with pytest.raises(StorageError, match="is an input"):
        curate(recipe, [snapshot], snapshot.path, cache_dir=cache)


def test_the_command_writes_list_and_page(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text("{name: a, inputs: [{datasets: [toy-train]}]}", encoding="utf-8")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "r.yaml"), str(out), "--snapshot", str(snapshot.path), "--dry-run"]
    result = CliRunner().invoke(curate_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "106 of 108 samples of 4 sources drawn" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["a-curation.html", "a-curation.json", "a-samples.parquet"]
    assert json.loads((out / "a-curation.json").read_bytes())["drawn"] == 106
    missing = CliRunner().invoke(curate_command, arguments[:2])
    assert isinstance(missing.exception, RecipeError)
    assert "give --snapshot" in str(missing.exception)


def test_the_list_holds_its_values_and_no_leftover_memory(tmp_path: Path) -> None:
    """Of a dictionary in which a value is twice, Arrow writes bytes that nobody set; sources share categories."""
    sources = ("vqav2_83k", "llava150k", "mine", "others")
    snapshot = make_snapshot(tmp_path / "in", {"train": [make_sample(0, name, "Why?", "So.") for name in sources]})
    curate(read_curation_text("{name: a}"), [snapshot], tmp_path / "out", cache_dir=tmp_path / "cache")
    written = tmp_path / "out" / "a-samples.parquet"
    assert pq.read_table(written).column("category").to_pylist() == ["General", "General", "unsorted", "unsorted"]
    group = pq.ParquetFile(written).metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place).encodings for place in range(8)}
    assert "RLE_DICTIONARY" in columns["category"]  # what falls back to plain values has that page beside them


def test_provenance_travels(tmp_path: Path) -> None:
    records = [
        Record(f"a/{n}", "a", (), (Turn("human", f"q{n}"), Turn("gpt", "b")), provenance='{"model":"m"}')
        for n in (1, 2)
    ]
    write_shards(records, tmp_path / "in" / "toy", "train", provenance=True)
    write_snapshot_manifest(tmp_path / "in", provenance={"toy-train": Provenance("CC0-1.0", "made")})
    curate(
        read_curation_text("{name: a}"), [open_folder(tmp_path / "in")], tmp_path / "out", cache_dir=tmp_path / "cache"
    )
    reader = RecordReader(open_folder(tmp_path / "out").shards("a-train"))
    assert {record.provenance for record in reader} == {'{"model":"m"}'}
