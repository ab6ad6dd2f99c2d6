"""``manyeyes score``: anyone's answers to a benchmark, without a model."""

from __future__ import annotations

from pathlib import Path

import click

from manyeyes.cli.group import OutPath


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
