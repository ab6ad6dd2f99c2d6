"""The verbs of evaluation.

``manyeyes evaluate``: a model's scores on benchmarks.

``manyeyes score``: anyone's answers to a benchmark, without a model.

``manyeyes compare``: two models on the same questions.

``manyeyes reliance``: what a model loses with each encoder.

``manyeyes correlate``: which benchmarks measure the same thing.

``manyeyes judge``: answers that a language model judges, behind any OpenAI-compatible endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyeyes.cli.group import OutPath
from manyeyes.errors import EvaluationError, ManyEyesError
from manyeyes.storage import is_there

if TYPE_CHECKING:
    from manyeyes.recipe import Recipe
    from manyeyes.registry.pull import ModelLocation
if TYPE_CHECKING:
    from manyeyes.evaluation.compare import ReadImage, Results
if TYPE_CHECKING:
    from manyeyes.evaluation.judging.scoring import EnsembleReport, JudgeReport, Scheme
    from manyeyes.evaluation.score import ScoreReport
    from manyeyes.recipe.recipe import JudgeSpec


@click.command("evaluate")
@click.argument("model")
@click.option("--recipe", default="tiny", show_default=True, help="Says what is asked, and how.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--benchmarks", default="", metavar="A,B", help="Ask these; the recipe's own by default.")
@click.option("--max-items", type=click.IntRange(min=1), help="First N questions of each benchmark only.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="[BENCHMARK=]NAME",
    help="Whose scoring, of one benchmark or of all; what papers report by default.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="How many answer side by side, each with the whole model; one a CUDA device by default, else 1.",
)
@click.option("--data-md5", default="", help="Snapshot; the checkout's data.dvc says it by default.")
@click.option("--data-remote", default="", help="A folder, s3:// or hub:OWNER/NAME@COMMIT; the checkout's default.")
@click.option("--out", type=OutPath(), default=Path("runs/evaluation"), show_default=True)
def evaluate_command(
    model: str,
    recipe: str,
    assignments: tuple[str, ...],
    benchmarks: str,
    max_items: int | None,
    variants: tuple[str, ...],
    processes: int | None,
    data_md5: str,
    data_remote: str,
    out: Path,
) -> None:
    """Score MODEL on a recipe's benchmarks: a checkpoint's or a bundle's folder, s3://, or NAME[@ALIAS or /VERSION].

    Stopped or killed, the same command goes on where it stopped.
    """
    from manyeyes.cli.step import run_from_files
    from manyeyes.recipe import load_recipe, parse_overrides
    from manyeyes.registry.pull import locate_model

    loaded = load_recipe(recipe, overrides=parse_overrides(list(assignments)))
    asked = choose_benchmarks(loaded, names=benchmarks, max_items=max_items, variants=variants)
    location = locate_model(model)
    run_from_files(
        "evaluate",
        {"kind": location.kind, "model": model_folder(location), "processes": processes},
        recipe=asked,
        data_md5=data_md5,
        data_remote=data_remote,
        out=out,
    )


def choose_benchmarks(recipe: Recipe, *, names: str, max_items: int | None, variants: Sequence[str]) -> Recipe:
    """The recipe with other benchmarks, fewer items, other variants.

    Args:
        recipe: Left as it is.
        names: Benchmarks, separated by commas or spaces; empty: the recipe's own.
        max_items: Of each benchmark; the recipe's own limit for ``None``.
        variants: ``BENCHMARK=NAME`` or, for all that are asked, ``NAME``.

    Raises:
        EvaluationError: Unknown benchmark or variant, or a variant of a benchmark that is not asked.
    """
    from manyeyes.evaluation.benchmarks import find_benchmark
    from manyeyes.recipe import change_recipe

    named = list(dict.fromkeys(name for name in re.split(r"[,\s]+", names) if name))
    rows = {name: find_benchmark(name) for name in named or recipe.evaluation.benchmarks}
    chosen = dict(recipe.evaluation.variants)
    for text in variants:
        benchmark, equals, variant = text.rpartition("=")
        if equals and find_benchmark(benchmark).name not in rows:
            raise EvaluationError(
                f"--variant names {benchmark}", f"a benchmark that is asked: {', '.join(rows)}", "Add it to them."
            )
        for row in [rows[benchmark]] if equals else rows.values():
            chosen[row.name] = row.check_variant(variant)
    changes: dict[str, Any] = {} if max_items is None else {"evaluation.max_items": max_items}
    if named:
        # A rule of the gate may be about a benchmark that is not asked; nothing is judged here.
        changes |= {"evaluation.benchmarks": list(rows), "gate": [{"rule": "validation"}]}
    if variants:
        changes["evaluation.variants"] = chosen
    return change_recipe(recipe, changes) if changes else recipe


def model_folder(location: ModelLocation) -> Path:
    """Folder of a model on this machine, fetched when it is not there yet.

    Args:
        location: From ``locate_model``.

    Raises:
        CheckpointError: As ``fetch_model``, and so are the others.
        BundleError: It is another one than was located.
        RegistryError: The registry has lost it.
        StorageError: No space, or no permission.
    """
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.registry.pull import fetch_model

    if "://" not in location.place and not location.place.startswith("models:/"):
        return Path(location.place)
    folder = cache_dir() / "models" / location.digest[:16]
    if not folder.is_dir():
        fetch_model(location, folder)
    return folder


@click.command("score")
@click.argument("benchmark")
@click.option(
    "--references",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="JSON Lines: id and the benchmark's own columns; images may be left out.",
)
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help='JSON Lines: {"id": ..., "prediction": "..."}.',
)
@click.option("--variant", help="Whose scoring: official, lmms, vlmevalkit or cambrian; what papers report by default.")
@click.option("--seed", type=int, help="Turn on the random answer of parsers that fall back on one (MMMU).")
@click.option(
    "--out",
    type=OutPath(),
    help="Folder for score.json and items.jsonl; runs/score/BENCHMARK-VARIANT by default.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def score_command(
    benchmark: str,
    references: Path,
    predictions: Path,
    variant: str | None,
    seed: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score PREDICTIONS against REFERENCES of BENCHMARK."""
    from manyeyes.evaluation.benchmarks import find_benchmark
    from manyeyes.evaluation.score import read_predictions, read_references, score_predictions, unmatched

    row = find_benchmark(benchmark)
    folder = out or Path("runs") / "score" / f"{row.name}-{row.check_variant(variant)}"
    report = score_predictions(
        benchmark,
        read_references(references),
        read_predictions(predictions),
        variant=variant,
        seed=seed,
        out=folder,
    )
    if warning := unmatched(report):
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    mark = "%" if report.unit == "percent" else f" of {row.maximum:g} points"
    low, high = report.ci95
    click.echo(f"{row.title}, scored as {report.variant}: {report.score:.2f}{mark} ({low:.2f} to {high:.2f})")
    click.echo(f"  {row.metric}; {report.n:,} items in {report.clusters:,} clusters")
    for name, value in report.scores.items():
        low, high = report.scores_ci95[name]
        click.echo(f"  {name:<48} {value:9.2f} ({low:.2f} to {high:.2f})")
    counts = ("parse_failures", "missing", "unexpected", "duplicates", "empty")
    click.echo("  " + ", ".join(f"{name.replace('_', ' ')} {getattr(report, name):,}" for name in counts))
    click.echo(f"  every item: {report.per_item}")


@click.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--out", type=OutPath(), default=Path("runs/compare"), show_default=True)
@click.option("--data", "data_folder", default="", help="Folder of the snapshot, for the pictures.")
@click.option("--data-remote", default="", help="Where the snapshot is fetched from; the checkout's remote by default.")
@click.option("--examples", default=12, show_default=True, help="Most items shown, of each benchmark and side.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compare_command(
    first: str, second: str, out: Path, data_folder: str, data_remote: str, examples: int, as_json: bool
) -> None:
    """Compare the model SECOND with FIRST: folders that `manyeyes evaluate` wrote, or NAME[@ALIAS or /VERSION].

    Folders of `manyeyes score` compare too, with each other and where their references are the same.

    Writes compare.json, compare.html and compare.md into --out. Differences are paired by question and clustered by
    image, and corrected for the number of benchmarks.
    """
    from manyeyes.evaluation.compare import (
        COMPARE_FILE,
        compare_results,
        images_to_show,
        render_comparison,
        render_comparison_text,
        write_comparison,
    )
    from manyeyes.storage import write_file

    ours, theirs = _results(first), _results(second)
    comparison = compare_results(ours, theirs)
    names = list(comparison.benchmarks)
    wanted = images_to_show(ours, theirs, names, examples=examples)
    read_image, missing = _images(wanted, comparison.data_md5, data_folder, data_remote)
    html = render_comparison(comparison, ours, theirs, read_image=read_image, images_missing=missing, examples=examples)
    text = render_comparison_text(comparison)
    write_comparison(comparison, out / COMPARE_FILE)
    write_file(out / "compare.html", html)
    write_file(out / "compare.md", text)
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    click.echo(text)
    if missing:
        click.echo(f"no pictures: {missing}", err=True)
    click.echo(f"page: {out / 'compare.html'}")


def _results(given: str) -> Results:
    from manyeyes.evaluation.compare import read_results

    if given.strip() and is_there(Path(given)):  # Path("") is the working directory
        return read_results(Path(given))
    reference = given.strip().removeprefix("models:/")
    if not reference or reference.startswith(("/", ".")) or reference.count("/") > 1:
        raise EvaluationError(
            f'no folder "{given}"',
            "what `manyeyes evaluate` or `manyeyes score` wrote, or a registered model",
            "Check the path.",
        )
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.registry.references import (
        BUNDLE_SCORECARD,
        EVIDENCE_PATH,
        ModelReference,
        download,
        find_version,
        parse_model_reference,
    )
    from manyeyes.registry.tracking import connect

    tracking = connect()
    version = find_version(tracking, parse_model_reference(given))
    named = ModelReference(str(version.name), version=int(version.version))
    folder = cache_dir() / "evidence" / f"{named.name}-{named.version}"
    folder.mkdir(parents=True, exist_ok=True)
    evidence = download(tracking, version, EVIDENCE_PATH, folder)
    return read_results(evidence, name=f"{named.name}/{named.version}", scorecard=BUNDLE_SCORECARD)


def _images(wanted: dict[str, set[str]], data_md5: str, data_folder: str, data_remote: str) -> tuple[ReadImage, str]:
    """What reads the pictures, and why there are none."""
    from manyeyes.evaluation.compare import read_compared_images
    from manyeyes.harness.inputs import open_data

    found: dict[tuple[str, str], bytes] = {}
    missing = ""
    if any(wanted.values()):
        try:
            found = read_compared_images(open_data(data_folder, data_md5=data_md5, data_remote=data_remote), wanted)
        except ManyEyesError as error:
            # The figures stand without the snapshot; the page and the command say that its pictures are missing.
            missing = f"{error.found}. Pass --data FOLDER with the snapshot {data_md5[:12]}."
    return (lambda benchmark, sha256: found.get((benchmark, sha256))), missing


@click.command("reliance")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--recipe", default="tiny", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--data", "data_folder", default="", help="Folder of the snapshot; as the checkout says by default.")
@click.option("--data-md5", default="")
@click.option("--data-remote", default="")
@click.option("--out", type=OutPath(), default=Path("runs/reliance"), show_default=True)
def reliance_command(
    checkpoint: Path,
    recipe: str,
    assignments: tuple[str, ...],
    data_folder: str,
    data_md5: str,
    data_remote: str,
    out: Path,
) -> None:
    """Score CHECKPOINT with each encoder's features zeroed, and with those of another image.

    Asks a recipe's benchmarks two times an encoder and once more; --set evaluation.max_items=500 keeps it short.
    """
    from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
    from manyeyes.evaluation.reliance import measure_reliance, render_reliance_text, write_reliance
    from manyeyes.harness.inputs import open_data
    from manyeyes.model import checkpoint_digest
    from manyeyes.recipe import load_recipe, parse_overrides

    report = measure_reliance(
        TorchAnswerer(checkpoint),
        load_recipe(recipe, overrides=parse_overrides(list(assignments))),
        snapshot=open_data(data_folder, data_md5=data_md5, data_remote=data_remote),
        model_digest=checkpoint_digest(checkpoint),
        on_progress=lambda what: click.echo(what, err=True),
    )
    write_reliance(report, out)
    click.echo(render_reliance_text(report))
    click.echo(f"page: {out / 'reliance.html'}")


@click.command("correlate")
@click.argument("tables", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--groups", type=click.IntRange(min=1), default=4, show_default=True, help="How many groups to form.")
@click.option("--out", type=OutPath(), default=Path("runs/correlation"), show_default=True)
def correlate_command(tables: tuple[Path, ...], groups: int, out: Path) -> None:
    """Correlations, groups and principal components of benchmarks over many models.

    TABLES: CSV with a column of models and one a benchmark, JSON {model: {benchmark: score}}, or folders that
    `manyeyes evaluate` wrote, a model each. Writes correlation.json and correlation.html into --out.
    """
    from manyeyes.evaluation.compare import render_correlation
    from manyeyes.evaluation.statistics.correlation import CORRELATION_FILE, correlate, read_scores
    from manyeyes.storage import write_file

    found = correlate(read_scores(tables), groups=groups)
    write_file(out / "correlation.html", render_correlation(found))
    write_file(out / CORRELATION_FILE, found.model_dump_json(indent=2) + "\n")
    for number in sorted(set(found.groups.values())):
        click.echo(f"group {number + 1}: {', '.join(name for name, group in found.groups.items() if group == number)}")
    click.echo(f"page: {out / 'correlation.html'}")


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
@click.option("--max-cost", type=float, help="Most that the answers may cost; needs both prices.")
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
    from manyeyes.evaluation.judging.judge import Judge
    from manyeyes.evaluation.judging.scoring import BENCHMARK, find_judging, judge_predictions, score_ensemble
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
    from manyeyes.recipe.recipe import JudgeSpec

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
            f"--{str((first['loc'] or ('max_cost',))[0]).replace('_', '-')} does not do",
            first["msg"],
            "See: manyeyes judge --help",
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
