"""The model card of a version: ``README.md`` in the hub's format, from what is known of the version and nothing else.

It is written when a version is registered. A bundle's manifest lists its files and so makes its digest, and scores and
verdict come after that digest, about it; so the card lies beside the listed files and changes no digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard
from manyeyes.pages import Table, render, short_count, span, two_decimals
from manyeyes.registry.gate import GateReport, gate_table
from manyeyes.registry.lineage import NOT_STATED, Lineage
from manyeyes.registry.signing import CARD
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT, describe_precision, read_variants
from manyeyes.sources import hub_id


def render_card(
    name: str,
    manifest: Mapping[str, Any],
    *,
    scorecard: Scorecard,
    report: GateReport,
    lineage: Lineage | None,
    tags: Mapping[str, str],
) -> str:
    """The card.

    Args:
        name: Of the registered model.
        manifest: The bundle's, from ``read_manifest``.
        scorecard: The bundle's.
        report: The gate's.
        lineage: What it was made of; ``None`` where nobody wrote that down, which the card says.
        tags: The version's; ``git_commit``, ``recipe_digest`` and ``copied_from`` are shown.
    """
    digests = {key: str(manifest[key]) for key in ("recipe_digest", "data_md5", "code_digest", "checkpoint_digest")}
    digests |= {key: tags[key] for key in ("recipe_digest", "git_commit", "copied_from") if tags.get(key)}
    rows = [
        ["recipe", str(manifest["recipe"])],
        ["bundle digest", str(manifest["digest"])],
        *([key.replace("_", " "), value] for key, value in digests.items()),
    ]
    parts = [[one.part, one.source, one.licence, one.said_by] for one in (lineage.pretrained if lineage else ())]
    datasets = [[one.name, one.use, one.licence, one.source] for one in (lineage.datasets if lineage else ())]
    passed = sum(rule.passed for rule in report.rules)
    against = f"compared with version {report.champion}" if report.champion else "there was no champion to compare with"
    return render(
        "card.md",
        front=f"---\n{_front(name, manifest, scorecard, lineage).to_yaml().strip()}\n---",
        title=name,
        name=name,
        description=lineage.description if lineage else "",
        about=_about(manifest),
        use=f"Answering questions about images, like those it was measured on: {_titles(scorecard)}.",
        limits=_limits(scorecard, lineage),
        scores=_scores(scorecard),
        scores_note="Of the bundle itself, which is what is served. Intervals are clustered by image; without the "
        "image, the same questions are asked.",
        variants=_variants(manifest),
        gate_summary=f"**{report.verdict}**: {passed} of {len(report.rules)} rules are met; {against}.",
        gate=gate_table(report),
        lineage=Table(("what", ""), rows, code=(1,)),
        parts=Table(("part", "source", "licence", "said by"), parts) if parts else None,
        no_parts="None: every weight was trained from scratch."
        if lineage
        else "Not stated: the version was registered without its lineage.",
        datasets=Table(("data set", "used for", "licence", "from"), datasets) if datasets else None,
    )


def _front(name: str, manifest: Mapping[str, Any], scorecard: Scorecard, lineage: Lineage | None) -> ModelCardData:
    """The hub's YAML. It takes one licence, which nobody stated for the whole, so it leads to the licences below."""
    bases = [hub_id(part.source) for part in (lineage.pretrained if lineage else ())]
    results = [_result(benchmark, score) for benchmark, score in scorecard.benchmarks.items()]
    return ModelCardData(
        license="other",
        license_name="licences-of-its-parts",
        license_link=f"{CARD}#made-of",
        base_model=list(dict.fromkeys(filter(None, bases))) or None,
        datasets=list(dict.fromkeys(one.name for one in lineage.datasets if one.use == "training"))
        if lineage
        else None,
        library_name="manyeyes",
        pipeline_tag="image-text-to-text",
        tags=["manyeyes", "onnx", str(manifest["recipe"])],
        metrics=["accuracy"] if results else None,
        model_name=name,
        eval_results=results or None,
    )


def _result(benchmark: str, score: BenchmarkScore) -> EvalResult:
    row = BENCHMARKS.get(benchmark)
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=(row.hub_id if row else "") or benchmark,
        dataset_name=row.title if row else benchmark,
        dataset_split=row.split if row else None,
        metric_type="accuracy" if score.unit == "percent" else "score",
        metric_name=f"{row.metric if row else 'score'}, 95% interval {span(score.ci95)}",
        metric_value=round(score.score, 2),
    )


def _about(manifest: Mapping[str, Any]) -> str:
    facts = manifest.get("model")
    sizes = (
        f"{short_count(facts['parameters'])} parameters; encoders: {', '.join(facts['encoders'])}; "
        f"{facts['visual_tokens']:,} visual tokens an image"
        if facts
        else "its size was not recorded"
    )
    size = sum(file["bytes"] for file in manifest["files"].values())
    return f"A multimodal language model as ONNX graphs ({size / 1e6:,.1f} MB in all variants): {sizes}."


def _titles(scorecard: Scorecard) -> str:
    return ", ".join(BENCHMARKS[name].title if name in BENCHMARKS else name for name in scorecard.benchmarks) or "none"


def _limits(scorecard: Scorecard, lineage: Lineage | None) -> list[str]:
    limits = [
        f"On {name} {_reached(score)}; {score.parse_failures:,} of {score.n:,} answers could not be read."
        for name, score in scorecard.benchmarks.items()
    ]
    limits += [f"{name} was skipped: {why}." for name, why in scorecard.skipped.items()]
    limits.append("Scores hold for these questions and images; other languages and kinds of image were not measured.")
    limits.append("Safety, bias and what happens with hostile images or questions were not measured.")
    if lineage:
        limits.append(f"A conversation has at most {lineage.max_length:,} tokens, those of its images included.")
        unstated = [one.part for one in lineage.pretrained if one.licence == NOT_STATED]
        unstated += [one.name for one in lineage.datasets if one.licence == NOT_STATED]
        if unstated:
            limits.append(f"The licence is not stated of: {', '.join(dict.fromkeys(unstated))}.")
    return limits


def _reached(score: BenchmarkScore) -> str:
    shown = f"it reaches {score.score:.2f}{score.mark}"
    return f"{shown} of {score.maximum:g}" if score.unit == "points" else shown


def _scores(scorecard: Scorecard) -> Table:
    rows = [
        [
            name,
            f"{score.score:.2f}{score.mark}",
            span(score.ci95),
            two_decimals(score.image_off),
            f"{score.n:,}",
            f"{score.images:,}",
            str(score.multiple_choice),
        ]
        for name, score in scorecard.benchmarks.items()
    ]
    header = ("benchmark", "score", "95% interval", "without the image", "questions", "images", "answers")
    return Table(header, rows, numbers=(1, 3, 4, 5))


def _variants(manifest: Mapping[str, Any]) -> Table | None:
    """Precision of each variant, and how closely it follows torch."""
    rows = []
    for name, variant in read_variants(manifest).items():
        parity = variant.parity
        equal = f"{100 * parity.token_match:.1f}% of {parity.items:,} answers" if parity else "not measured"
        rows.append([name if name != DEFAULT_VARIANT else "default", describe_precision(variant), equal])
    return Table(("variant", "precision", "token for token as torch"), rows)
