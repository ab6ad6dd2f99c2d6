"""``manyeyes judge``: answers that a language model judges, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyeyes.cli.group import OutPath

if TYPE_CHECKING:
    from manyeyes.errors import EvaluationError
    from manyeyes.evaluation.judging.ensembles import EnsembleReport, Scheme
    from manyeyes.evaluation.judging.scoring import JudgeReport
    from manyeyes.evaluation.score import ScoreReport
    from manyeyes.recipe.judge import JudgeSpec

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("judge")
@click.argument("benchmark")
@click.option("--references", type=_FILE, required=True, help="JSON Lines: id and the benchmark's own columns.")
@click.option("--predictions", type=_FILE, required=True, help='JSON Lines: {"id": ..., "prediction": "..."}.')
@click.option("--endpoint", help="OpenAI-compatible, for instance https://judge.example/v1.")
@click.option("--model", help="Name of the judge there.")
@click.option(
    "--key-from", metavar="VARIABLE", help="Environment variable with the key; MANYEYES_JUDGE_KEY by default."
)
@click.option("--temperature", type=float, help="What the benchmark's authors used by default.")
@click.option("--timeout", "timeout_s", type=float, help="Longest time for one request in seconds; 60 by default.")
@click.option("--concurrency", type=int, help="Requests at a time; 4 by default.")
@click.option("--rate", "requests_per_minute", type=float, help="Most requests a minute; no limit by default.")
@click.option("--price-in", type=float, help="Of a million prompt tokens, to count the cost.")
@click.option("--price-out", type=float, help="Of a million answered tokens.")
@click.option("--max-unjudged", type=float, help="Share without a verdict up to which a score is given; 0 by default.")
@click.option("--cache", type=_FOLDER, help="Keeps the judge's answers; judge in MANYEYES_CACHE by default.")
@click.option("--variant", help="Whose scoring; what papers report by default.")
@click.option("--other", type=_FILE, help="scienceqa: another model's predictions, to make one of both.")
@click.option(
    "--scheme",
    type=click.Choice(["complement", "judge"]),
    default="judge",
    show_default=True,
    help="With --other: fill in for it, or let the judge decide.",
)
@click.option("--out", type=OutPath(), help="Folder for score.json and items.jsonl; runs/judge/BENCHMARK by default.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def judge_command(
    benchmark: str,
    references: Path,
    predictions: Path,
    endpoint: str | None,
    model: str | None,
    cache: Path | None,
    variant: str | None,
    other: Path | None,
    scheme: Scheme,
    out: Path | None,
    as_json: bool,
    **settings: str | float | None,
) -> None:
    """Have PREDICTIONS judged against REFERENCES of BENCHMARK.

    llava-bench-coco, llava-bench-wild, mm-vet; mathvista, whose answers a judge extracts; scienceqa with --other. Run
    it again to ask only for what has no verdict yet: the exit code is 2 as long as that withholds the score.
    """
    from manyeyes.errors import EvaluationError
    from manyeyes.evaluation.benchmarks import find_benchmark
    from manyeyes.evaluation.judging.ensembles import BENCHMARK, score_ensemble
    from manyeyes.evaluation.judging.judge import Judge
    from manyeyes.evaluation.judging.scoring import find_judging, judge_predictions
    from manyeyes.evaluation.score import match_predictions, read_predictions, read_references, unmatched
    from manyeyes.harness.inputs import cache_dir

    folder = out or Path("runs") / "judge" / benchmark

    def make_judge() -> Judge:
        return Judge(_judge_spec(endpoint, model, settings), cache=cache or cache_dir() / "judge")

    if other is not None:
        if benchmark != BENCHMARK:
            raise EvaluationError(f"--other with {benchmark}", BENCHMARK, "Leave --other out.")
        ensemble = score_ensemble(
            read_references(references),
            read_predictions(predictions),
            read_predictions(other),
            scheme=scheme,
            judge=make_judge() if scheme == "judge" else None,
            variant=variant,
            out=folder,
        )
        click.echo(ensemble.model_dump_json(indent=2) if as_json else "\n".join(_ensemble_lines(ensemble)))
        for name, alone in (("--predictions", ensemble.ours), ("--other", ensemble.other)):
            if warning := unmatched(alone):
                click.echo(f"warning: {name}: {warning}", err=True)
        if ensemble.score is None:
            raise _withheld(ensemble.unjudged, ensemble.differed)
        return
    known, answers = read_references(references), read_predictions(predictions)
    find_judging(benchmark)
    if warning := unmatched(match_predictions(find_benchmark(benchmark), known, answers)):
        click.echo(f"warning: {warning}", err=True)
    report = judge_predictions(benchmark, known, answers, make_judge(), variant=variant, out=folder)
    click.echo(report.model_dump_json(indent=2) if as_json else "\n".join(_lines(report)))
    if report.score is None:
        raise _withheld(report.unjudged, _total(report))


def _judge_spec(endpoint: str | None, model: str | None, settings: dict[str, str | float | None]) -> JudgeSpec:
    import pydantic

    from manyeyes.errors import EvaluationError
    from manyeyes.recipe.judge import JudgeSpec

    if endpoint is None or model is None:
        raise EvaluationError(
            "no judge",
            "a language model behind an OpenAI-compatible endpoint",
            "Give --endpoint and --model, and the key in MANYEYES_JUDGE_KEY.",
        )
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return JudgeSpec.model_validate({"endpoint": endpoint, "model": model, **given})
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise EvaluationError(
            f"--{str(first['loc'][0]).replace('_', '-')} does not do", first["msg"], "See: manyeyes judge --help"
        ) from None


def _withheld(unjudged: int, total: int) -> EvaluationError:
    """No score came of it: an error, after what there is was printed."""
    from manyeyes.errors import EvaluationError

    return EvaluationError(
        f"{unjudged:,} of {total:,} items have no verdict, so there is no score",
        "a verdict for every item, or for all but the share of --max-unjudged",
        "Read the reasons, then run the same command again: it asks only for what has no verdict yet.",
    )


def _lines(report: JudgeReport) -> list[str]:
    lines = []
    if report.scored is None:
        lines.append(f"{report.benchmark}: no score, {report.unjudged:,} of {_total(report):,} items have no verdict")
    else:
        lines += _score_lines(report.benchmark, report.scored)
        if report.unjudged:
            lines.append(f"  {report.unjudged:,} of {_total(report):,} items have no verdict, and are in no figure")
    lines += [f"  {item_id}: {reason}" for item_id, reason in report.unjudged_reasons.items()]
    return [*lines, f"  judge {report.judge.in_words()}"]


def _total(report: JudgeReport) -> int:
    return report.judged + report.unjudged


def _ensemble_lines(report: EnsembleReport) -> list[str]:
    lines = _score_lines("first model alone", report.ours) + _score_lines("other model alone", report.other)
    if report.ensemble is None:
        lines.append(f"both, {report.scheme}: no score, {report.unjudged:,} items have no verdict")
    else:
        lines += _score_lines(f"both, {report.scheme}", report.ensemble)
    lines.append(
        f"  agreed {report.agreed:,}, differed {report.differed:,}, one answer {report.only_one:,}, "
        f"none {report.neither:,}; at least one is right on {report.upper_bound:.2f}% of all items"
    )
    lines += [f"  {item_id}: {reason}" for item_id, reason in report.unjudged_reasons.items()]
    return lines if report.judge is None else [*lines, f"  judge {report.judge.in_words()}"]


def _score_lines(name: str, report: ScoreReport) -> list[str]:
    low, high = report.ci95
    lines = [f"{name}: {report.score:.2f}% ({low:.2f} to {high:.2f}), {report.n:,} items"]
    for part, value in report.scores.items():
        low, high = report.scores_ci95[part]
        lines.append(f"  {part:<32} {value:9.2f} ({low:.2f} to {high:.2f})")
    lines.append(
        f"  missing {report.missing:,}, unexpected {report.unexpected:,}, duplicates {report.duplicates:,}, "
        f"empty {report.empty:,}"
    )
    return lines
