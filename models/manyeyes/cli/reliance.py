"""``manyeyes reliance``: what a model loses with each encoder."""

from __future__ import annotations

from pathlib import Path

import click

from manyeyes.cli.group import OutPath


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
