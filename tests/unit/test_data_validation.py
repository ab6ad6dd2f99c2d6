from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from data_samples import make_image, make_record, make_snapshot

from manyeyes.data.mixture import Mixture
from manyeyes.data.profile import PROFILE_COLUMNS, build_profile
from manyeyes.data.quarantine import read_quarantine
from manyeyes.data.records import Record, Turn
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.data.validation import (
    check_profile,
    list_suites,
    parse_suite,
    read_suite,
    validate_snapshot,
)
from manyeyes.data.validation_report import ValidationReport
from manyeyes.errors import RecipeError, SnapshotError
from manyeyes.recipe import MixturePart

# Images of the suite's least size, different for every sample.
GOOD = [dataclasses.replace(make_record(number), images=(make_image(number, size=(24, 16)),)) for number in range(600)]
TEST = [
    dataclasses.replace(make_record(number, prefix="test"), images=(make_image(5000 + number, size=(24, 16)),))
    for number in range(20)
]


def bad_records() -> dict[str, Record]:
    """One sample of each kind of badness, by a part of its reason."""
    base = {number: GOOD[number] for number in range(6)}
    cut = base[0].images[0].data[:60]
    truncated = dataclasses.replace(base[0].images[0], data=cut, sha256=hashlib.sha256(cut).hexdigest())
    return {
        "image 0 cannot be decoded": dataclasses.replace(base[0], images=(truncated,)),
        "turns 0 and 1 are both from human": dataclasses.replace(base[1], turns=(base[1].turns[0], *base[1].turns)),
        "1 <image> and 0 images": dataclasses.replace(base[2], images=()),
        "image 0 has sha256": dataclasses.replace(
            base[3], images=(dataclasses.replace(base[3].images[0], sha256="0" * 64),)
        ),
        "turn 1 (gpt) is empty": dataclasses.replace(
            base[4], turns=(base[4].turns[0], Turn("gpt", ""), *base[4].turns[2:])
        ),
    }


def validate(snapshot: Snapshot, out_dir: Path) -> ValidationReport:
    return validate_snapshot(
        snapshot, datasets=["toy-train"], eval_datasets=["toy-test"], suite="conversations", out_dir=out_dir
    )


def test_the_profile_says_what_each_sample_is(tmp_path: Path) -> None:
    record = make_record(7, pairs=3, num_images=2)
    text_only = make_record(8, pairs=1, num_images=0)
    snapshot = make_snapshot(tmp_path, {"train": [record, text_only], "test": [make_record(9)]})
    profile = build_profile(snapshot, ["toy-train"], eval_datasets=["toy-test"])
    assert tuple(profile.columns) == PROFILE_COLUMNS
    first, second = profile.to_dict("records")
    assert first["id"] == "toy/7"
    assert (first["n_images"], first["width"], first["height"], first["n_turns"]) == (2, 8, 6, 6)
    assert first["aspect"] == pytest.approx(8 / 6)
    assert first["n_placeholders"] == 2
    assert first["answer_chars"] == 3 * len("answer 0")
    assert first["sha256"] == record.images[0].sha256
    assert first["n_tokens"] == -1
    assert (second["n_images"], second["width"], second["sha256"]) == (0, 0, "")
    for row in (first, second):
        assert row["decode_ok"] is row["roles_ok"] is row["placeholders_ok"] is row["sha256_ok"] is True
        assert row["in_eval_set"] is False
        assert row["problem"] == ""


def test_the_profile_counts_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    snapshot = make_snapshot(tmp_path / "data", {"train": [make_record(8, pairs=1, num_images=0)]})
    profile = build_profile(snapshot, ["toy-train"], eval_datasets=[], tokenizer_path=tmp_path)
    assert profile["n_tokens"].tolist() == [4 + 2]  # question 0 of 8? | answer 0


def test_good_data_passes(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "data", {"train": GOOD, "test": TEST})
    report = validate(snapshot, tmp_path / "out")
    assert report.verdict == "passed"
    assert (report.rows, report.quarantined, report.contaminated_images) == (620, 0, 0)
    assert report.datasets == {"toy-train": 600, "toy-test": 20}
    assert all(outcome.success for outcome in report.expectations)
    written = (tmp_path / "out" / "validation.json").read_text(encoding="utf-8")
    assert ValidationReport.model_validate_json(written) == report
    assert read_quarantine(tmp_path / "out") == frozenset()
    assert "no sample had to be left out" in (tmp_path / "out" / "validation.html").read_text(encoding="utf-8").lower()


def test_few_bad_samples_are_quarantined_with_a_reason_each(tmp_path: Path) -> None:
    bad = bad_records()
    records = [*bad.values(), *GOOD[len(bad) :]]
    snapshot = make_snapshot(tmp_path / "data", {"train": records, "test": TEST})
    report = validate(snapshot, tmp_path / "out")
    assert report.verdict == "passed"
    assert report.quarantined == len(bad)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == [record.id for record in bad.values()]
    for line, reason in zip(lines, bad, strict=True):
        assert reason in line["reason"]
    outcomes = {outcome.name: outcome for outcome in report.expectations}
    assert not outcomes["images-decode"].success
    assert outcomes["images-decode"].examples == ("toy/0",)
    assert outcomes["turns-alternate"].unexpected_count == 2
    assert outcomes["one-placeholder-an-image"].examples == ("toy/1", "toy/2")  # toy/1 asks its question twice
    assert outcomes["images-unchanged"].examples == ("toy/3",)
    assert outcomes["training-samples-usable"].unexpected_percent == pytest.approx(100 * len(bad) / 600)
    quarantine = read_quarantine(tmp_path / "out")
    mixture = Mixture([MixturePart(dataset="toy-train")], snapshot, seed=0, quarantine=quarantine)
    assert len(mixture) == 600 - len(bad)
    page = (tmp_path / "out" / "validation.html").read_text(encoding="utf-8")
    assert "turns 0 and 1 are both from human" in page
    assert "1 &lt;image&gt; and 0 images" in page
    profile = pd.read_parquet(tmp_path / "out" / "profile.parquet")
    assert (profile["problem"] != "").sum() == len(bad)


def test_a_suite_is_checked_in_parts_as_it_is_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(tmp_path / "data", {"train": [*bad_records().values(), *GOOD[5:30]], "test": TEST})
    whole = validate(snapshot, tmp_path / "1")
    monkeypatch.setattr("manyeyes.data.validation._TOGETHER", 10)
    assert validate(snapshot, tmp_path / "2") == whole
    assert (tmp_path / "1" / "validation.html").read_bytes() == (tmp_path / "2" / "validation.html").read_bytes()


def test_many_bad_samples_fail_and_the_page_says_so(tmp_path: Path) -> None:
    bad = list(bad_records().values())
    snapshot = make_snapshot(tmp_path / "data", {"train": [*bad, *GOOD[len(bad) : 50]], "test": TEST})
    report = validate(snapshot, tmp_path / "out")
    assert report.verdict == "failed"
    assert [outcome.name for outcome in report.failures()] == ["training-samples-usable"]
    assert "not fit to train on" in (tmp_path / "out" / "validation.html").read_text(encoding="utf-8")
    assert "| training-samples-usable | critical | **no** | 5 (10.00%)" in report.as_markdown()


def test_one_bad_evaluation_sample_fails(tmp_path: Path) -> None:
    bad = dataclasses.replace(TEST[0], turns=TEST[0].turns[:1])
    report = validate(make_snapshot(tmp_path / "data", {"train": GOOD, "test": [bad, *TEST[1:]]}), tmp_path / "out")
    assert [outcome.name for outcome in report.failures()] == ["evaluation-samples-usable"]


def test_an_image_that_is_also_in_the_test_set_fails(tmp_path: Path) -> None:
    # As the second image of a sample, under another name and with another recorded sha256: only its bytes tell.
    leaked = dataclasses.replace(TEST[3].images[0], path="renamed.png")
    record = dataclasses.replace(make_record(0, num_images=2), images=(make_image(9, size=(24, 16)), leaked))
    report = validate(make_snapshot(tmp_path / "data", {"train": [record, *GOOD[1:]], "test": TEST}), tmp_path / "out")
    assert report.contaminated_images == 1
    assert report.verdict == "failed"
    (failure,) = report.failures()
    assert (failure.name, failure.examples) == ("no-contamination", ("toy/0",))


def test_repeated_ids_are_quarantined(tmp_path: Path) -> None:
    twin = dataclasses.replace(GOOD[1], id=GOOD[0].id)
    report = validate(make_snapshot(tmp_path / "data", {"train": [GOOD[0], twin, *GOOD[2:]], "test": TEST}), tmp_path)
    assert report.quarantined == 2
    assert read_quarantine(tmp_path) == frozenset({"toy-train#0", "toy-train#1"})


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "data", {"train": GOOD[:10], "test": TEST}).path
    shard = folder / "toy" / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"train-00000\.parquet has sha256"):
        validate(open_folder(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_a_plain_sentence() -> None:
    suite = parse_suite(
        json.dumps(
            {
                "name": "x",
                "expectations": [
                    {
                        "type": "expect_column_values_to_be_unique",
                        "kwargs": {"column": "widht"},
                        "severity": "critical",
                        "meta": {"name": "typo", "explanation": "Widths differ."},
                    },
                    {
                        "type": "expect_column_values_to_be_between",
                        "kwargs": {"column": "width", "min_value": 5},
                        "severity": "warning",
                        "meta": {"name": "wide", "explanation": "Images are wide."},
                    },
                ],
            }
        ),
        name="x",
    )
    typo, wide = check_profile(pd.DataFrame({"id": ["a", "b"], "width": [4, 9]}), suite)
    assert not typo.success
    assert typo.explanation.startswith('Could not be checked: the profile has no column "widht". Did you mean "width"?')
    assert "Traceback" not in typo.explanation
    assert (wide.success, wide.unexpected_count, wide.unexpected_percent, wide.examples) == (False, 1, 50.0, ("a",))


def test_an_expectation_that_cannot_be_computed_says_why_in_a_line() -> None:
    expectation = {
        "type": "expect_column_values_to_be_between",
        "kwargs": {"column": "id", "min_value": 5},
        "severity": "critical",
        "meta": {"name": "mixed", "explanation": "Ids are numbers."},
    }
    suite = parse_suite(json.dumps({"name": "x", "expectations": [expectation]}), name="x")
    (outcome,) = check_profile(pd.DataFrame({"id": ["a", "b"]}), suite)
    assert not outcome.success
    assert re.fullmatch(r"Could not be checked: [^\n]+\. \(Ids are numbers\.\)", outcome.explanation)


@pytest.mark.parametrize(
    ("type_", "kwargs"),
    [("expect_wonders", {}), ("expect_column_values_to_be_between", {"column": "id", "minimum": 3})],
)
def test_an_expectation_that_does_not_exist_is_refused(type_: str, kwargs: dict[str, object]) -> None:
    expectation = {
        "type": type_,
        "kwargs": kwargs,
        "severity": "info",
        "meta": {"name": "a", "explanation": "b"},
    }
    suite = parse_suite(json.dumps({"name": "x", "expectations": [expectation]}), name="x")
    with pytest.raises(RecipeError, match=type_):
        check_profile(pd.DataFrame({"id": ["a"]}), suite)


def test_an_unknown_suite_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match='Did you mean "conversations"'):
        read_suite("conversation")


@pytest.mark.parametrize("name", list_suites())
def test_every_suite_explains_all_its_expectations_and_names_columns_that_exist(name: str) -> None:
    suite = parse_suite(read_suite(name), name=name)
    assert suite.name == name
    for expectation in suite.expectations:
        assert expectation.meta["explanation"].endswith(".")
        assert set(expectation.columns()) <= set(PROFILE_COLUMNS)


def test_a_suite_without_names_is_refused() -> None:
    expectation = {"type": "expect_column_to_exist", "kwargs": {"column": "id"}, "severity": "info", "meta": {}}
    with pytest.raises(RecipeError, match=r"meta\.name"):
        parse_suite(json.dumps({"name": "x", "expectations": [expectation]}), name="x")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link", "rect"):
            self.open.append(tag)
        self.outside += [
            value or "" for name, value in attrs if name in ("src", "href") and "data:" not in (value or "")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_for_light_and_dark(tmp_path: Path) -> None:
    bad = bad_records()
    evil = dataclasses.replace(
        GOOD[10], turns=(Turn("human", "<image>\n<script>alert(1)</script>"), Turn("gpt", "<b>&</b>"))
    )
    snapshot = make_snapshot(tmp_path / "data", {"train": [evil, *bad.values()], "test": TEST})
    validate(snapshot, tmp_path / "out")
    page = (tmp_path / "out" / "validation.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert links.open == []
    assert links.outside == []
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "data:image/png;base64," in page
