"""Scores a model on the recipe's benchmarks, with the image and without; once for torch, once for the bundle.

Its report compares with the champion, whose absence is a sentence, never an error.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from manyeyes.errors import EvaluationError, RegistryError, RegistryUnreachableError
from manyeyes.evaluation.benchmarks import Benchmark, load_benchmarks
from manyeyes.evaluation.report.comparison import NO_CHAMPION, Champion
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.harness.base import Reporter, Step, StepResult, num_threads
from manyeyes.harness.events import EXAMPLE_FILE, VARIANTS, ExampleSummary
from manyeyes.harness.inputs import Pinned, cache_dir, parse_pinned, work_dir
from manyeyes.runtime.bundle_contents import (
    DEFAULT_VARIANT,
    ModelFacts,
    describe_precision,
    pulled_variants,
    read_manifest,
    read_variants,
    variant_digest,
    variant_files,
)

if TYPE_CHECKING:
    from manyeyes.evaluation.answering.asking import EvaluationProgress
    from manyeyes.evaluation.answering.encoder_cache import FeatureSettings


def find_champion(registry_model: str) -> Champion:
    """The registered scorecard of a model's champion.

    Args:
        registry_model: Name in the registry, for its champion of today; ``NAME/VERSION`` for the champion that an
            earlier step found; empty: none is looked up.

    Raises:
        RegistryError: Neither of these.
    """
    if not registry_model:
        return NO_CHAMPION
    from manyeyes.registry.pull import champion_evidence
    from manyeyes.registry.references import parse_model_reference

    reference = parse_model_reference(registry_model)
    if reference.alias is not None:
        raise RegistryError(
            f'champion is "{registry_model}"', "NAME or NAME/VERSION", f"For instance: {reference.name}"
        )
    work_dir = cache_dir() / "champions" / reference.name
    try:
        evidence = champion_evidence(reference.name, reference.version, work_dir=work_dir)
    except RegistryUnreachableError:
        return Champion(reason="The registry did not answer, so there is no champion to compare with.")
    except RegistryError as error:
        return Champion(reason=f"The champion of {registry_model} could not be read: {error.needed} is missing.")
    except EvaluationError:
        return Champion(reason=f"The champion of {registry_model} has a scorecard of another format.")
    if evidence is None:
        return Champion(reason=f"{registry_model} has no champion yet.")
    return Champion(name=f"{reference.name} version {evidence.version}", scorecard=evidence.scorecard)


def evaluate(
    reporter: Reporter,
    *,
    kind: Literal["torch", "bundle"],
    model: Path,
    pinned: str,
    scorecard: Path,
    other_scorecard: Path | None = None,
    processes: int | None = None,
    registry_model: str = "",
    frozen_encoders: Sequence[str] = (),
    facts: ModelFacts | None = None,
) -> StepResult:
    """Write ``scorecard.json``, ``items.parquet``, and ``report`` as ``html``, ``md`` and ``json``.

    Of a bundle with variants the same of each other one in ``variants/NAME``, and ``report`` compares them. Of a folder
    that was pulled for one variant alone, that one.

    Args:
        reporter: Shows the progress.
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: Its folder.
        pinned: From ``preflight``.
        scorecard: Folder to write.
        other_scorecard: Folder of the same model's other scorecard; the report shows the difference.
        processes: How many answer side by side; MANYEYES_EVALUATION_PROCESSES, else one a CUDA device, else 1.
        registry_model: Name in the registry; the report compares with its champion of today. Empty: with none.
        frozen_encoders: Encoders of a checkpoint whose features are kept, and read where a stage or a trial kept them.
        facts: The model's size and cost, where they are known; counted when left out.
    """
    inputs = parse_pinned(pinned)
    benchmarks = load_benchmarks(inputs.recipe.evaluation, snapshot=inputs.snapshot)
    facts = facts or _facts(kind, model)
    names = [DEFAULT_VARIANT] if kind == "torch" else pulled_variants(model, read_manifest(model))
    folders = {name: scorecard / VARIANTS / name if place else scorecard for place, name in enumerate(names)}
    cards = {
        name: _score(
            reporter,
            inputs,
            kind=kind,
            model=model,
            variant=name,
            out=out,
            processes=processes,
            registry_model=registry_model,
            frozen_encoders=frozen_encoders,
            benchmarks=benchmarks,
            facts=facts,
        )
        for name, out in folders.items()
    }
    if len(cards) > 1:
        _compare_variants(benchmarks, model, cards, folders)
    card = cards.pop(names[0])
    digest = card.model.digest
    _keep_example(benchmarks[0], scorecard)
    headline = ", ".join(
        [
            f"{name} {score.score:.1f}{score.mark}, without image {score.image_off:.1f}{score.mark}"
            for name, score in card.benchmarks.items()
        ]
        + [f"{name} skipped" for name in card.skipped]
        + [
            f"{variant}: {name} {score.score:.1f}{score.mark}"
            for variant, other in cards.items()
            for name, score in other.benchmarks.items()
        ]
    )
    return StepResult(
        headline=headline,
        metrics={
            **card.metrics(),
            **{
                f"{variant}.{name}.score": score.score
                for variant, other in cards.items()
                for name, score in other.benchmarks.items()
            },
        },
        html=(scorecard / "report.html").read_text(encoding="utf-8"),
        markdown=(scorecard / "report.md").read_text(encoding="utf-8") + _difference(card, other_scorecard),
        metadata={
            "model_digest": digest,
            "kind": kind,
            "recipe_digest": card.recipe_digest,
            "data_md5": inputs.data_md5,
        },
    )


def _compare_variants(
    benchmarks: Sequence[Benchmark], bundle: Path, cards: Mapping[str, Scorecard], folders: Mapping[str, Path]
) -> None:
    """Put the variants, the first of which has the report, side by side into it."""
    from manyeyes.evaluation.outcomes import read_outcomes
    from manyeyes.evaluation.report.contents import VariantRow, VariantScore
    from manyeyes.evaluation.report.writing import read_report, write_report
    from manyeyes.registry.gate import compare_outcomes

    manifest = read_manifest(bundle)
    variants = read_variants(manifest)
    outcomes = {name: read_outcomes(folder / "items.parquet") for name, folder in folders.items()}
    first = next(iter(folders))
    rows = []
    for name, card in cards.items():
        scores = {}
        for benchmark, score in card.benchmarks.items():
            found = compare_outcomes(
                benchmark, outcomes[name].of(benchmark), outcomes[first].of(benchmark), variant=score.variant
            )
            scores[benchmark] = VariantScore(
                score=score.score,
                ci95=score.ci95,
                difference=found.difference,
                difference_ci95=(found.low, found.high),
            )
        size = sum(manifest["files"][file]["bytes"] for file in variant_files(variants[name]))
        rows.append(VariantRow(name=name, precision=describe_precision(variants[name]), bytes=size, scores=scores))
    report = read_report(folders[first] / "report.json").model_copy(update={"variants": rows})
    write_report(folders[first], report, benchmarks)


def _score(
    reporter: Reporter,
    inputs: Pinned,
    *,
    kind: Literal["torch", "bundle"],
    model: Path,
    variant: str,
    out: Path,
    processes: int | None,
    registry_model: str,
    frozen_encoders: Sequence[str],
    benchmarks: Sequence[Benchmark],
    facts: ModelFacts | None,
) -> Scorecard:
    from manyeyes.evaluation.answering.answerers import AnswererSpec
    from manyeyes.evaluation.answering.asking import open_answerer
    from manyeyes.evaluation.answering.encoder_cache import encoder_cache_settings
    from manyeyes.evaluation.evaluate import evaluate as evaluate_model

    digest = _digest(kind, model, variant)
    spec = AnswererSpec(
        kind=kind,
        model=model,
        threads=num_threads(),
        encoder_cache=encoder_cache_settings(
            work_dir() / "images", kind=kind, model_digest=digest, code_digest=inputs.code_digest
        ),
        features=_feature_settings(inputs, frozen_encoders, benchmarks) if frozen_encoders else None,
        variant=variant if kind == "bundle" else None,
    )

    def show(progress: EvaluationProgress) -> None:
        words = _in_words(progress, inputs.recipe.evaluation.benchmarks)
        reporter.progress(
            words if variant == DEFAULT_VARIANT else f"{variant}: {words}",
            done=progress.done / progress.total,
            eta_s=progress.eta_s if progress.questions_per_s else None,
        )

    with open_answerer(spec, processes=processes) as answerer:
        return evaluate_model(
            answerer,
            inputs.recipe,
            snapshot=inputs.snapshot,
            out_dir=out,
            code_digest=inputs.code_digest,
            model_digest=digest,
            on_progress=show,
            work_dir=work_dir() / "evaluate",
            facts=facts,
            benchmarks=benchmarks,
            champion=find_champion(registry_model),
        )


def _feature_settings(inputs: Pinned, encoders: Sequence[str], benchmarks: Sequence[Benchmark]) -> FeatureSettings:
    from manyeyes.evaluation.answering.encoder_cache import FeatureSettings
    from manyeyes.training.stage import FEATURES

    images = {digest for benchmark in benchmarks for item in benchmark.items for digest in item.image_sha256s}
    return FeatureSettings(work_dir() / FEATURES, tuple(encoders), len(images), inputs.code_digest)


def _in_words(progress: EvaluationProgress, benchmarks: Sequence[str]) -> str:
    place = f"{benchmarks.index(progress.benchmark) + 1}/{len(benchmarks)} " if len(benchmarks) > 1 else ""
    known = f" ({progress.from_cache:,} known)" if progress.from_cache else ""
    speed = f", {progress.questions_per_s:,.1f} questions/s" if progress.questions_per_s else ""
    return (
        f"{place}{progress.benchmark} {progress.condition}: {progress.done:,} of {progress.total:,}{known}, "
        f"{progress.score:.1f}% right{speed}"
    )


def _digest(kind: Literal["torch", "bundle"], model: Path, variant: str) -> str:
    if kind == "torch":
        from manyeyes.model import checkpoint_digest

        return checkpoint_digest(model)
    return variant_digest(read_manifest(model), variant)


def _facts(kind: Literal["torch", "bundle"], model: Path) -> ModelFacts | None:
    if kind == "torch":
        from manyeyes.estimate.skeleton import count_checkpoint

        return count_checkpoint(model)
    found = read_manifest(model).get("model")
    return None if found is None else ModelFacts.model_validate(found)


def _keep_example(benchmark: Benchmark, folder: Path) -> None:
    """One image and question of a benchmark, for a person to try."""
    item = benchmark.items[0]
    images = benchmark.read_images(item.record)
    if images:
        with Image.open(io.BytesIO(images[0])) as opened:
            image = folder / f"example.{(opened.format or 'png').lower()}"
        image.write_bytes(images[0])
        example = ExampleSummary(image=image.name, question=item.question, reference=item.reference)
        (folder / EXAMPLE_FILE).write_text(example.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _difference(card: Scorecard, other: Path | None) -> str:
    if other is None:
        return ""
    before = read_scorecard(other / "scorecard.json")
    lines = [
        f"- {name}: {score.score - before.benchmarks[name].score:+.2f} points against {before.model.kind}"
        for name, score in card.benchmarks.items()
        if name in before.benchmarks
    ]
    return "\n\n" + "\n".join(lines) + "\n"


_LIGHT = ("pyarrow.parquet", "onnxruntime", "manyeyes.evaluation.evaluate", "manyeyes.registry.tracking")

# A bundle is scored without torch, whose import takes seconds.
STEPS: dict[str, Step] = {
    "torch": Step(
        "evaluate", evaluate, imports=("manyeyes.evaluation.answering.torch_answerer", *_LIGHT), outputs=("scorecard",)
    ),
    "bundle": Step("evaluate", evaluate, imports=_LIGHT, outputs=("scorecard",)),
}
