"""``manyeyes compare``: two models on the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyeyes.cli.group import OutPath
from manyeyes.errors import EvaluationError, ManyEyesError
from manyeyes.storage import is_there

if TYPE_CHECKING:
    from manyeyes.evaluation.report.compare_page import ReadImage
    from manyeyes.evaluation.results import Results


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
    from manyeyes.evaluation.compare import COMPARE_FILE, compare_results, write_comparison
    from manyeyes.evaluation.output import write_file
    from manyeyes.evaluation.report.compare_page import render_comparison, render_comparison_text, shown_images

    ours, theirs = _results(first), _results(second)
    comparison = compare_results(ours, theirs)
    names = list(comparison.benchmarks)
    wanted = shown_images(ours, theirs, names, examples=examples)
    read_image, missing = _images(wanted, comparison.data_md5, data_folder, data_remote)
    html = render_comparison(comparison, ours, theirs, read_image=read_image, images_missing=missing, examples=examples)
    text = render_comparison_text(comparison)
    write_comparison(comparison, out / COMPARE_FILE)
    write_file(out / "compare.html", html.encode())
    write_file(out / "compare.md", text.encode())
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    click.echo(text)
    if missing:
        click.echo(f"no pictures: {missing}", err=True)
    click.echo(f"page: {out / 'compare.html'}")


def _results(given: str) -> Results:
    from manyeyes.evaluation.results import read_results

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
    from manyeyes.registry.evidence import BUNDLE_SCORECARD, EVIDENCE_PATH, download
    from manyeyes.registry.references import ModelReference, find_version, parse_model_reference
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
    from manyeyes.evaluation.report.compare_images import read_images
    from manyeyes.harness.inputs import open_data

    found: dict[tuple[str, str], bytes] = {}
    missing = ""
    if any(wanted.values()):
        try:
            found = read_images(open_data(data_folder, data_md5=data_md5, data_remote=data_remote), wanted)
        except ManyEyesError as error:
            # The figures stand without the snapshot; the page and the command say that its pictures are missing.
            missing = f"{error.found}. Pass --data FOLDER with the snapshot {data_md5[:12]}."
    return (lambda benchmark, sha256: found.get((benchmark, sha256))), missing
