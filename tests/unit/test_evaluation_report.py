"""Reports: what stands in JSON stands in HTML and Markdown; nothing is compared in silence that does not compare."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from manyeyes.errors import EvaluationError, RegistryError, RegistryUnreachableError
from manyeyes.estimate.skeleton import count_both, count_facts, count_model
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.outcomes import GROUPS
from manyeyes.evaluation.report.comparison import Champion, Published, compare_scorecard, load_published, weigh_cost
from manyeyes.evaluation.report.contents import Report, describe_reproduction, merge_runs
from manyeyes.evaluation.report.tables import verdict
from manyeyes.evaluation.report.writing import build_report, read_report, render_html, render_markdown, write_report
from manyeyes.pages import short_count
from manyeyes.recipe import load_recipe
from manyeyes.registry import pull as registry_champion
from manyeyes.steps.evaluate import find_champion
from tests.report_toys import make_evaluation

NAMES = ["mme", "mmbench", "seed", "gqa", "ocrbench", "easy-vqa"]
CHAMPION = "toy version 3"


@pytest.fixture(scope="module")
def report() -> Report:
    card, outcomes, benchmarks = make_evaluation(NAMES)
    other, _, _ = make_evaluation(NAMES[:5], seed=1, digest="k" * 64, kind="bundle")
    return build_report(
        card, outcomes, benchmarks, recipe=load_recipe("tiny"), champion=Champion(CHAMPION, scorecard=other)
    )


def figures(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    """Every number of a JSON document, by where it stands."""
    if isinstance(value, dict):
        return {place: each for key, part in value.items() for place, each in figures(part, (*path, key)).items()}
    if isinstance(value, list):
        return {
            place: each
            for number, part in enumerate(value)
            for place, each in figures(part, (*path, str(number))).items()
        }
    return {path: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def missing(found: Report, text: str) -> list[tuple[str, ...]]:
    """Figures of a report that a text lacks."""
    # The recipe is text, in which some figure or other could hide.
    text = text.replace(found.reproduction.recipe, "")
    there = set(re.findall(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text))
    there |= {number.lstrip("+-") for number in there} | set(re.findall(r"\d+\.\d+ [TGM]\b", text))
    there |= set(re.findall(r"[✓✗]|\(\d\.\d\d\)", text))
    absent = []
    for path, value in figures(found.model_dump(mode="json")).items():
        if path[0] == "format_version" or path[-2:] == ("scorecard", "format_version"):
            continue
        words = {f"{value:.2f}", f"{value:+.2f}", f"{value:,.2f}", f"{value:g}"}
        if isinstance(value, int):
            words = {f"{value:,}", f"{value}"}
        if path[-1] in ("parameters", "flops_per_sample"):
            words.add(short_count(value))
        if "scores" in path and path[0] == "details":
            words = {verdict(value)}
        if not words & there:
            absent.append(path)
    return absent


def test_every_figure_in_json_stands_in_html_and_in_markdown(report: Report) -> None:
    assert len(figures(report.model_dump(mode="json"))) > 500
    assert missing(report, render_html(report, {})) == []
    assert missing(report, render_markdown(report)) == []


@pytest.mark.parametrize(
    "place",
    [
        ("scorecard", "benchmarks", "gqa", "scores", "a part"),
        ("scorecard", "benchmarks", "mme", "conditions", "grey", "parse_failures"),
        ("comparison", "rows", 5, "cells", "gqa", "score"),
        ("scorecard", "model", "facts", "parts", "encoders.clip"),
    ],
)
def test_a_figure_that_is_changed_in_json_changes_the_pages(report: Report, place: tuple[str | int, ...]) -> None:
    changed = json.loads(report.model_dump_json())
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = 31_337
    another = Report.model_validate(changed)
    for render in (lambda each: render_html(each, {}), render_markdown):
        assert missing(another, render(report)) == [tuple(map(str, place))]
        assert missing(another, render(another)) == []


def test_files_are_written_and_the_json_is_read_back(tmp_path: Path) -> None:
    card, outcomes, benchmarks = make_evaluation(["gqa"])
    written = build_report(card, outcomes, benchmarks)
    write_report(tmp_path, written, benchmarks)
    assert read_report(tmp_path / "report.json") == written
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert "<script" not in html
    assert "<b>I cannot say</b>" not in html
    assert "<b>I cannot say</b>" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert html.count('src="data:image/png') == len(written.details["gqa"].worst) + len(written.details["gqa"].best)
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EvaluationError, match="is not a report"):
        read_report(tmp_path / "report.json")


def test_examples_show_what_was_answered_under_each_condition(report: Report) -> None:
    html, markdown = render_html(report, {}), render_markdown(report)
    answer = report.details["gqa"].worst[0].answers[0]
    assert list(answer.answers) == ["image-on", "image-off", "grey", "other-image"]
    lines = ("without: a guess ✗", "grey image: a grey guess (0.30)", "another's image: (nothing) ✗")
    assert "".join(f'<div class="quiet">{line}</div>' for line in lines) in unescape(html)
    assert "| a guess ✗ | a grey guess (0.30) | (nothing) ✗ |" in markdown
    (unread,) = report.details["gqa"].unread
    assert unread.prediction == "<b>I cannot say</b> | what it is"
    assert "&lt;b&gt;I cannot say&lt;/b&gt; | what it is" in html
    assert "&lt;b>I cannot say&lt;/b> \\| what it is" in markdown


def test_what_differs_is_noted(report: Report) -> None:
    rows = {row.name: row for row in report.comparison.rows}

    def said(name: str, benchmark: str) -> str:
        return " ".join(report.comparison.notes[number - 1] for number in rows[name].cells[benchmark].notes)

    assert said("this model", "gqa") == ""
    # Asked with LLaVA's prompts and scored as LLaVA scored it: nothing differs.
    assert said("LLaVA-1.5-7B", "gqa") == ""
    assert "GQA testdev" not in said("Eagle-X5-7B", "gqa")
    assert "Scored as lmms there, as cambrian here." in said("Eagle-X5-7B", "gqa")
    assert "Eagle's prompts there; LLaVA's here." in said("Eagle-X5-7B", "gqa")
    assert "Images and videos together" in said("LLaVA-1.5-7B", "seed")
    assert "Champion: asked with another prompt" in said(f"champion: {CHAMPION}", "gqa")
    assert report.comparison.unpublished == ["easy-vqa"]
    assert "easy-vqa" not in rows[f"champion: {CHAMPION}"].cells
    assert rows["LLaVA-1.5-7B"].cells["gqa"].ci95 is None


def test_a_cut_or_chosen_benchmark_is_not_set_beside_published_ones_in_silence() -> None:
    card, _, _ = make_evaluation(["gqa"])
    score = card.benchmarks["gqa"]
    for changes, note in (
        ({"n_total": score.n + 1}, "All questions there; some of them here."),
        ({"multiple_choice": "prefill"}, "Answers were written there, and chosen after one prefill here."),
    ):
        changed = card.model_copy(update={"benchmarks": {"gqa": score.model_copy(update=changes)}})
        compared = compare_scorecard(changed, prompts={"gqa": "llava"})
        (row,) = [row for row in compared.rows if row.name == "LLaVA-1.5-7B"]
        assert [compared.notes[number - 1] for number in row.cells["gqa"].notes] == [note]


def test_the_champion_itself_and_no_champion_are_sentences() -> None:
    card, _, _ = make_evaluation(["gqa"])
    itself = compare_scorecard(card, prompts={}, champion=Champion(CHAMPION, scorecard=card))
    assert itself.champion == f"This model is the champion: {CHAMPION}."
    assert [row.kind for row in itself.rows if row.kind != "published"] == ["this"]
    none = compare_scorecard(card, prompts={}, champion=Champion(reason="toy has no champion yet."))
    assert none.champion == "toy has no champion yet."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RegistryUnreachableError("a", "b", "c"), "The registry did not answer"),
        (RegistryError("a", "its files", "c"), "its files is missing"),
        (EvaluationError("a", "b", "c"), "a scorecard of another format"),
    ],
)
def test_a_registry_that_fails_is_a_sentence(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(registry_champion, "champion_evidence", fail)
    found = find_champion("toy")
    assert found.scorecard is None
    assert sentence in found.reason
    monkeypatch.setattr(registry_champion, "champion_evidence", lambda *_, **__: None)
    assert find_champion("toy").reason == "toy has no champion yet."


def test_score_against_cost_takes_benchmarks_that_all_models_shown_have() -> None:
    card, _, _ = make_evaluation(["gqa", "mme", "easy-vqa"])
    compared = compare_scorecard(card, prompts={})
    found = weigh_cost(compared)
    assert found is not None
    # easy-VQA is published by nobody; with MME beside GQA there are as many models as with GQA alone.
    assert found.benchmarks == ["gqa", "mme"]
    (llava,) = [point for point in found.points if point.name == "LLaVA-1.5-7B"]
    assert llava.score == pytest.approx((62.0 + 1510.7 / 20) / 2)
    assert all(point.visual_tokens for point in found.points)
    assert weigh_cost(compare_scorecard(make_evaluation(["easy-vqa"])[0], prompts={})) is None


def test_the_recipe_in_a_report_is_the_one_that_was_asked(report: Report, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(report.reproduction.recipe, encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")).digest == load_recipe("tiny").digest
    prompt = report.details["gqa"].prompt
    assert prompt == "USER: <image>\nQuestion 0 on picture 0?\nAnswer with a word. ASSISTANT:"


def test_a_command_line_is_kept_without_folders_and_addresses() -> None:
    found = describe_reproduction(
        "torch",
        benchmarks=["gqa"],
        recipe=None,
        data_md5="d" * 32,
        argv=["/opt/bin/manyeyes", "evaluate", "/home/me/model", "--out=/tmp/there", "--data-remote", "s3://mine/data"],
    )
    assert found.started_as == "manyeyes evaluate model --out=there --data-remote s3://..."
    other = describe_reproduction("torch", benchmarks=[], recipe=None, data_md5="d", argv=["/usr/bin/pytest", "x"])
    assert other.started_as == ""
    assert {"python", "manyeyes", "torch", "transformers", "timm"} <= set(found.runs[0].versions)


def test_runs_of_one_machine_become_one() -> None:
    (first,) = describe_reproduction("torch", benchmarks=["gqa"], recipe=None, data_md5="d").runs
    second = first.model_copy(update={"benchmarks": ["mme", "gqa"], "finished": "9999-01-01 00:00"})
    elsewhere = first.model_copy(update={"machine": first.machine.model_copy(update={"cores": 999})})
    merged = merge_runs([first, second, elsewhere])
    assert [run.benchmarks for run in merged] == [["gqa", "mme"], ["gqa"]]
    assert merged[0].finished == "9999-01-01 00:00"


def test_published_scores_give_the_group_averages_that_are_printed_beside_them() -> None:
    # Cambrian-1's main table and Eagle's README print these averages: General, Knowledge, OCR & chart, vision-centric.
    printed = {
        "Cambrian-1-8B": (73.1, 61.3, 71.3, 65.0),
        "Cambrian-1-13B": (73.7, 60.2, 71.3, 62.2),
        "Cambrian-1-34B": (76.8, 67.0, 71.9, 68.5),
        "LLaVA-NeXT-8B (by Cambrian-1)": (72.5, 55.6, 63.9, 56.6),
        "LLaVA-NeXT-13B (by Cambrian-1)": (69.9, 53.7, 62.9, 55.9),
        "LLaVA-NeXT-34B (by Cambrian-1)": (76.0, 62.5, 67.7, 64.0),
        "Mini-Gemini-8B-HD (by Cambrian-1)": (72.7, 55.7, 62.9, 51.5),
        "Mini-Gemini-13B-HD (by Cambrian-1)": (70.7, 54.1, 60.8, 49.4),
        "Mini-Gemini-34B-HD (by Cambrian-1)": (76.2, 62.4, 68.1, 63.8),
        "Eagle-X4-8B-Plus": (73.8, 64.2, 76.6, None),
        "Eagle-X4-13B-Plus": (74.6, 63.0, 75.1, None),
        "Eagle-X5-34B-Plus": (76.3, 68.6, 75.4, None),
    }
    published = load_published()
    models = {model.name: published.scores_of(model) for model in published.models}
    for model, averages in printed.items():
        for names, average in zip(GROUPS.values(), averages, strict=True):
            if average is not None:
                percents = [100 * models[model][name].score / BENCHMARKS[name].maximum for name in names]
                assert sum(percents) / 4 == pytest.approx(average, abs=0.16), (model, names)


def test_every_benchmark_that_a_system_reports_has_a_published_score() -> None:
    published = load_published()
    has: dict[str, set[str]] = {}
    for model in published.models:
        for name, score in published.scores_of(model).items():
            has.setdefault(name, set()).add(score.prompts)
    for name, row in BENCHMARKS.items():
        assert set(row.reported_by) <= has.get(name, set()), name


def test_a_published_score_above_the_maximum_is_refused() -> None:
    wrong = load_published().model_dump(mode="json")
    wrong["models"][3]["scores"][0]["values"]["gqa"] = 620
    with pytest.raises(ValueError, match="gqa is 620"):
        Published.model_validate(wrong)


@pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "Mini-Gemini-7B-HD"])
def test_published_sizes_are_those_of_the_recipe(name: str) -> None:
    from manyeyes.model import build_skeleton
    from manyeyes.model.language_model import language_model_config

    (model,) = [model for model in load_published().models if model.name == name]
    recipe = load_recipe(model.counted)
    config = language_model_config(recipe.model.language_model.source, snapshot_path=None)
    facts = count_model(build_skeleton(recipe.model, text_config=config).config)
    assert (facts.parameters, facts.visual_tokens, facts.flops_per_sample) == (
        model.parameters,
        model.visual_tokens,
        model.flops_per_sample,
    )
    assert sum(facts.parts.values()) == facts.parameters
    if name == "LLaVA-1.5-7B":
        assert count_both(recipe) == (count_facts(recipe), facts)
        # 576 + 128 tokens through Vicuna's layers (embeddings left out) and one through its head, 577 through 23 of
        # CLIP's blocks, 576 through the projector; attention's two products.
        length, hidden = 576 + 128, 4096
        expected = 2 * length * (6_738_415_616 - 2 * 32_000 * hidden) + 2 * 32_000 * hidden
        expected += 2 * 577 * 290_909_184 + 2 * 576 * 20_979_712
        expected += 32 * 4 * length**2 * hidden + 23 * 4 * 577**2 * 1024
        assert facts.flops_per_sample == pytest.approx(expected, rel=2e-3)
