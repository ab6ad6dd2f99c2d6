"""``manyeyes correlate``: which benchmarks measure the same thing."""

from __future__ import annotations

from pathlib import Path

import click

from manyeyes.cli.group import OutPath


@click.command("correlate")
@click.argument("tables", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--groups", type=click.IntRange(min=1), default=4, show_default=True, help="How many groups to form.")
@click.option("--out", type=OutPath(), default=Path("runs/correlation"), show_default=True)
def correlate_command(tables: tuple[Path, ...], groups: int, out: Path) -> None:
    """Correlations, groups and principal components of benchmarks over many models.

    TABLES: CSV with a column of models and one a benchmark, JSON {model: {benchmark: score}}, or folders that
    `manyeyes evaluate` wrote, a model each. Writes correlation.json and correlation.html into --out.
    """
    from manyeyes.evaluation.output import write_file
    from manyeyes.evaluation.report.correlation_page import render_correlation
    from manyeyes.evaluation.statistics.correlation import CORRELATION_FILE, correlate, read_scores

    found = correlate(read_scores(tables), groups=groups)
    write_file(out / "correlation.html", render_correlation(found).encode())
    write_file(out / CORRELATION_FILE, found.model_dump_json(indent=2).encode() + b"\n")
    for number in sorted(set(found.groups.values())):
        click.echo(f"group {number + 1}: {', '.join(name for name, group in found.groups.items() if group == number)}")
    click.echo(f"page: {out / 'correlation.html'}")
