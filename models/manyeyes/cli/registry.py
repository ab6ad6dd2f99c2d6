"""The verbs of the registry: ask, pull, sign, verify, promote, rollback, approve, reject, history, audit."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyeyes.cli.group import CommandGroup, OutPath
from manyeyes.errors import NOT_PROMOTED, OTHER_ERROR
from manyeyes.storage import is_there

if TYPE_CHECKING:
    from manyeyes.registry.versions import RegisteredVersion

KEY = click.Path(path_type=Path)
VERIFY_KEY = "MANYEYES_VERIFY_KEY"


def pulled_bundle(reference: str, variant: str | None = None) -> Path:
    """Folder of a registered model's bundle on this machine, fetched when it is not there yet.

    Args:
        reference: ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``.
        variant: Fetch this variant alone; everything when left out.
    """
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.serving.hosting import RegistrySource

    source = RegistrySource(reference, kept=cache_dir() / "bundles", variant=variant)
    return source.fetch(source.find())


@click.command("pull")
@click.argument("model")
@click.argument("out", type=OutPath())
@click.option("--variant", help="Fetch the files of this variant alone, for instance int4.")
@click.option("--require-approved", is_flag=True, help="Refuse a version that nobody approved.")
@click.option("--verify-key", type=KEY, help=f"Refuse a bundle that this public key does not vouch for; {VERIFY_KEY}.")
def pull_command(model: str, out: Path, variant: str | None, require_approved: bool, verify_key: Path | None) -> None:
    """Fetch the bundle of MODEL[@ALIAS or /VERSION] into the folder OUT; MODEL alone means its champion."""
    from manyeyes.registry.versions import pull

    pulled = pull(model, out_dir=out, variant=variant, require_approved=require_approved, verify_key=verify_key)
    click.echo(str(pulled))


@click.command("sign")
@click.argument("model")
@click.option("--key-file", type=KEY, help="Private key, PEM; MANYEYES_SIGNING_KEY (a path, or the key) by default.")
def sign_command(model: str, key_file: Path | None) -> None:
    """Sign MODEL/VERSION or MODEL@ALIAS, or the bundle in the folder MODEL, with a key.

    The signature is over manifest, model card and SBOM; the manifest has the sha256 of every other file.
    """
    from manyeyes.registry.signing import SIGNATURE, sign_bundle

    if _is_bundle(model):
        from manyeyes.runtime.bundle_contents import check_files, read_manifest

        check_files(Path(model), read_manifest(Path(model))["files"])
        sign_bundle(Path(model), key_file=key_file)
        click.echo(f"signed: {Path(model) / SIGNATURE}")
        return
    from manyeyes.registry.pull import sign_version
    from manyeyes.registry.references import parse_model_reference

    click.echo(f"signed: {sign_version(parse_model_reference(model), key_file=key_file)}")


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify-key", type=KEY, help=f"Public key, PEM; {VERIFY_KEY} by default.")
def verify_command(bundle: Path, verify_key: Path | None) -> None:
    """Check the bundle in the folder BUNDLE: its signature, and every file."""
    from manyeyes.registry.signing import verify_bundle, wanted_key

    key = wanted_key(verify_key)
    if key is None:
        raise click.UsageError(f"name the public key: --verify-key PUBLIC.pem, or {VERIFY_KEY}")
    verify_bundle(bundle, key=key)
    click.echo(f"{bundle} is as the owner of {key} signed it")


@click.command("promote")
@click.argument("model")
@click.option("--force", is_flag=True, help="Promote a version that the gate failed, too.")
@click.option("--reason", default="", help="Why; kept in the history.")
@click.option("--to", metavar="NAME", default="", help="Copy it to this registered model and judge it there.")
@click.option("--to-uri", metavar="URI", default="", help="Copy it to this MLflow server or store and judge it there.")
def promote_command(model: str, force: bool, reason: str, to: str, to_uri: str) -> None:
    """Make MODEL/VERSION or MODEL@ALIAS the champion, here or in another environment.

    With --to or --to-uri it is copied with its evidence, and the gate compares it with that champion; exit code 3 where
    the gate does not pass it there.
    """
    from manyeyes.registry.versions import parse_model_reference, promote

    if not (to or to_uri):
        _tell(promote(model, force=force, reason=reason))
        return
    if force:
        raise click.UsageError("--force goes with a version that is there; with --to the gate decides")
    from manyeyes.harness.inputs import cache_dir
    from manyeyes.registry.environments import copy_version

    reference = parse_model_reference(model)
    copied = copy_version(reference, to or reference.name, to_uri=to_uri, cache_dir=cache_dir())
    _tell(copied)
    if copied.verdict != "passed":
        sys.exit(NOT_PROMOTED)


@click.command("rollback")
@click.argument("model")
@click.option("--reason", default="", help="Why; kept in the history.")
def rollback_command(model: str, reason: str) -> None:
    """Make MODEL's previous champion the champion again; of another MODEL/VERSION, nothing is done."""
    from manyeyes.registry.versions import rollback

    _tell(rollback(model, reason=reason))


@click.command("approve")
@click.argument("model")
@click.option("--reason", required=True, help="Why; kept in the history.")
def approve_command(model: str, reason: str) -> None:
    """Approve MODEL/VERSION, which waits for it; with the last approval that it needs it becomes the champion."""
    from manyeyes.registry.versions import approve

    _tell(approve(model, reason=reason))


@click.command("reject")
@click.argument("model")
@click.option("--reason", required=True, help="Why; kept in the history.")
def reject_command(model: str, reason: str) -> None:
    """Refuse MODEL/VERSION, which waits for approval."""
    from manyeyes.registry.versions import reject

    _tell(reject(model, reason=reason))


@click.group(cls=CommandGroup)
def registry() -> None:
    """Look after a registered model."""


@registry.command("audit")
@click.argument("model")
def audit_command(model: str) -> None:
    """Look for aliases of MODEL that were moved around its history; exit code 1 where there are some."""
    from manyeyes.registry.approval import audit
    from manyeyes.registry.history_page import load_history
    from manyeyes.registry.tracking import connect

    load_history(model)  # says which models there are
    findings = audit(connect(), model)
    for finding in findings:
        click.echo(finding)
    if findings:
        sys.exit(OTHER_ERROR)
    click.echo(f"{model}: the history explains every alias")


@click.command("history")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="The records as JSON.")
@click.option("--html", "page", type=OutPath(file=True), help="Also write a page with a timeline and scores.")
def history_command(model: str, as_json: bool, page: Path | None) -> None:
    """Who moved which alias of MODEL when, and why."""
    from manyeyes.registry.history_page import (
        history_json,
        history_text,
        load_history,
        registered_scores,
        render_history,
    )
    from manyeyes.storage import write_file

    history = load_history(model)
    click.echo(history_json(history) if as_json else history_text(history))
    if page is not None:
        write_file(page, render_history(history, registered_scores(model)))
        click.echo(f"page: {page}", err=True)


def _tell(version: RegisteredVersion) -> None:
    for note in version.notes:
        click.echo(note, err=True)
    aliases = " and ".join(version.aliases) or "without an alias"
    click.echo(f"{version.name} version {version.version} is now {aliases} (gate: {version.verdict})")


ANSWER_TOKENS = 32
DRAWING_TOKENS = 512  # Mini-Gemini's own; a prompt for a picture has some 30 words


@click.command("ask")
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("question")
@click.option(
    "--variant", help="Which of the bundle's variants, for instance int4; of a registered one, it alone is fetched."
)
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
    variant: str | None,
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
        bundle = load_bundle(_find_bundle(model, variant), variant=variant)
        click.echo(bundle.answer(question, images=images, max_new_tokens=max_new_tokens or ANSWER_TOKENS))
        return

    from manyeyes.drawing import DrawingWarning, draw, load_pipeline, request_drawing, save_images
    from manyeyes.recipe import parse_overrides

    settings = parse_overrides(list(assignments))
    pipeline = load_pipeline(source)
    answer = load_bundle(_find_bundle(model, variant), variant=variant).answer(
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


def _is_bundle(model: str) -> bool:
    return bool(model.strip()) and is_there(Path(model) / "manifest.json")  # Path("") is the working directory


def _find_bundle(model: str, variant: str | None) -> Path:
    if _is_bundle(model):
        from manyeyes.registry.signing import verify_signature, wanted_key

        key = wanted_key()
        if key is not None:
            verify_signature(Path(model), key=key)
        return Path(model)
    from manyeyes.cli.registry import pulled_bundle

    return pulled_bundle(model, variant)
