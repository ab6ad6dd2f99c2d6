"""The verbs of the registry: ask, pull, promote, rollback."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyeyes.storage import is_there

if TYPE_CHECKING:
    from manyeyes.registry.versions import RegisteredVersion


def pulled_bundle(reference: str) -> Path:
    """Folder of a registered model's bundle on this machine, fetched when it is not there yet."""
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.registry.versions import describe, parse_model_reference, pull

    version = describe(parse_model_reference(reference))
    return pull(
        f"{version.name}/{version.version}", out_dir=cache_dir() / "bundles" / f"{version.name}-{version.version}"
    )


def pull_model(reference: str, out: Path) -> Path:
    """Fetch a bundle into ``out``."""
    from manyeyes.registry.versions import pull

    return pull(reference, out_dir=out)


def promote_model(reference: str, *, force: bool) -> str:
    """Make a version the champion; says what the registry holds now."""
    from manyeyes.registry.versions import promote

    return _in_words(promote(reference, force=force))


def rollback_model(reference: str) -> str:
    """Make the previous champion the champion again; says what the registry holds now."""
    from manyeyes.registry.versions import rollback

    return _in_words(rollback(reference))


def _in_words(version: RegisteredVersion) -> str:
    return f"{version.name} version {version.version} is now {' and '.join(version.aliases)} (gate: {version.verdict})"


ANSWER_TOKENS = 32
DRAWING_TOKENS = 512  # Mini-Gemini's own; a prompt for a picture has some 30 words


@click.command("ask")
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("question")
@click.option(
    "--max-new-tokens", type=int, help=f"Most tokens of the answer: {ANSWER_TOKENS}, and {DRAWING_TOKENS} with --draw."
)
@click.option("--draw", "source", metavar="PIPELINE", help="Draw with this diffusers folder or hub id (owner/name).")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/drawings"), show_default=True, help="For --draw."
)
@click.option("--seed", default=0, show_default=True, help="For --draw: of the first picture.")
@click.option("--draw-set", "assignments", multiple=True, metavar="A=C", help="For --draw: an argument of PIPELINE.")
def ask_command(
    model: str,
    image: Path,
    question: str,
    max_new_tokens: int | None,
    source: str | None,
    out: Path,
    seed: int,
    assignments: tuple[str, ...],
) -> None:
    """Ask MODEL[@ALIAS or /VERSION], or the bundle in the folder MODEL, QUESTION about IMAGE (- for none).

    With --draw the question ends with <GEN>, and what the answer holds between <h> and </h> is drawn into --out.
    """
    from manyeyes.runtime.bundle import load_bundle
    from manyeyes.runtime.vision import read_image

    images = [] if str(image) == "-" else [read_image(image, name="image")]
    if source is None:
        click.echo(
            load_bundle(_find_bundle(model)).answer(
                question, images=images, max_new_tokens=max_new_tokens or ANSWER_TOKENS
            )
        )
        return

    from manyeyes.drawing import DrawingWarning, draw, load_pipeline, request_drawing, save_images
    from manyeyes.recipe import parse_overrides

    settings = parse_overrides(list(assignments))
    pipeline = load_pipeline(source)
    answer = load_bundle(_find_bundle(model)).answer(
        request_drawing(question), images=images, max_new_tokens=max_new_tokens or DRAWING_TOKENS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrawingWarning)  # said below
        drawn = draw(answer, pipeline, seed=seed, settings=settings)
    click.echo(drawn.text)
    for problem in drawn.problems:
        click.echo(f"warning: {problem}", err=True)
    if not drawn.images:
        click.echo("the answer asks for no picture: nothing between <h> and </h>", err=True)
    for path in save_images(drawn, out):
        click.echo(str(path))


def _find_bundle(model: str) -> Path:
    if model.strip() and is_there(Path(model) / "manifest.json"):  # Path("") is the working directory
        return Path(model)
    from manyeyes.cli.registry import pulled_bundle

    return pulled_bundle(model)
