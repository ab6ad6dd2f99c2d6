"""``manyeyes data import``, ``sources``, ``contamination``, ``curate``, ``diff``, ``self-chat``: what data is there."""

from __future__ import annotations

from pathlib import Path

import click

from manyeyes.cli.group import OutPath

_REMOTE = click.option(
    "--remote", default="", help="A folder, s3:// or hub:OWNER/NAME@COMMIT; the checkout's default by default."
)


@click.command("contamination")
@click.argument("snapshot")
@_REMOTE
@click.option(
    "--benchmarks",
    "benchmarks",
    multiple=True,
    required=True,
    metavar="NAME_OR_PATH,...",
    help="Data sets of the snapshot, or Parquet files or folders, to compare with.",
)
@click.option("--dataset", "datasets", multiple=True, help="Training data; all but the benchmarks by default.")
@click.option("--out", type=OutPath(), default=Path("runs/contamination"), show_default=True)
@click.option("--radius", default=7, show_default=True, help="Most bits in which dHashes differ, 0 to 7.")
@click.option("--max-difference", default=16.0, show_default=True, help="Most levels of 255 at 64x64.")
@click.option(
    "--min-entropy", default=3.0, show_default=True, help="Bits a pixel below which images are not decidable."
)
@click.option("--words", default=13, show_default=True, help="Of an n-gram.")
@click.option("--min-share", default=0.5, show_default=True, help="Of a benchmark text's n-grams in one training text.")
def contamination_command(
    snapshot: str,
    remote: str,
    benchmarks: tuple[str, ...],
    datasets: tuple[str, ...],
    out: Path,
    radius: int,
    max_difference: float,
    min_entropy: float,
    words: int,
    min_share: float,
) -> None:
    """Compare the training data of SNAPSHOT with benchmarks: images, near duplicates and texts.

    SNAPSHOT is a folder, a .dvc file, one of a git revision (data.dvc@HEAD~1), or an md5. Of a remote one a shard after
    the other is fetched; MANYEYES_SHARDS_GB bounds what they take of the disk. What was found of a shard is known.

    Writes contamination.json, .html and .md, pairs.jsonl, and contaminated.jsonl: the samples to leave out.
    """
    import pydantic

    from manyeyes.data.contamination.findings import Thresholds
    from manyeyes.data.contamination.search import find_contamination
    from manyeyes.data.diff import open_version
    from manyeyes.errors import DataError
    from manyeyes.harness.inputs import cache_dir

    try:
        thresholds = Thresholds(
            radius=radius, max_difference=max_difference, min_entropy=min_entropy, words=words, min_share=min_share
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise DataError(f"{name} is {first['input']}", first["msg"], f"Correct --{name.replace('_', '-')}.") from error
    opened = open_version(snapshot, remote=remote, hashed=True)
    named = [name for names in benchmarks for name in names.split(",") if name]
    report = find_contamination(
        opened,
        datasets=list(datasets) or [name for name in opened.manifest.datasets if name not in named],
        benchmarks=named,
        out_dir=out,
        cache_dir=cache_dir() / "fingerprints",
        thresholds=thresholds,
        progress=lambda sentence, done: click.echo(f"{100 * done:3.0f}% {sentence}", err=True),
    )
    click.echo(report.as_markdown(), nl=False)
    click.echo(f"report: {out / 'contamination.html'}")


@click.command("curate")
@click.argument("recipe")
@click.argument("out", type=OutPath())
@click.option(
    "--snapshot", default="", help="Of the inputs for which the recipe names none: a folder, a .dvc file or an md5."
)
@_REMOTE
@click.option("--dry-run", is_flag=True, help="Draw, and write list and page alone.")
def curate_command(recipe: str, out: Path, snapshot: str, remote: str, dry_run: bool) -> None:
    """Draw a training mixture by the curation recipe RECIPE into the snapshot in OUT, as <name>-train.

    RECIPE is a YAML file, or cambrian-7m, llava-cc3m-595k or clean. Beside the data set are <name>-curation.html, .json
    and <name>-samples.parquet: every sample, and why it was left out. Stopped with Ctrl-C, the same command goes on.
    """
    from manyeyes.data.curation.curate import curate, open_inputs, write_curation_report
    from manyeyes.data.curation.draw import draw_mixture
    from manyeyes.data.curation.recipe import load_curation_recipe
    from manyeyes.storage import cache_dir

    loaded = load_curation_recipe(recipe)
    snapshots = open_inputs(loaded, snapshot=snapshot, remote=remote)
    kept = cache_dir()

    def progress(sentence: str, done: float) -> None:
        click.echo(f"{100 * done:3.0f}% {sentence}", err=True)

    if dry_run:
        report = write_curation_report(
            draw_mixture(loaded, snapshots, cache_dir=kept, progress=progress), loaded, snapshots, out=out
        )
    else:
        report = curate(loaded, snapshots, out, cache_dir=kept, progress=progress)
    click.echo(report.as_markdown(), nl=False)
    click.echo(f"report: {out / f'{loaded.name}-curation.html'}")


@click.command("diff")
@click.argument("before")
@click.argument("after")
@_REMOTE
@click.option("--ids", default=10, show_default=True, type=click.IntRange(min=0), help="Of each kind to name.")
@click.option("--json", "as_json", is_flag=True, help="JSON.")
def diff_command(before: str, after: str, remote: str, ids: int, as_json: bool) -> None:
    """What came, went and changed from the snapshot BEFORE to the snapshot AFTER, by data set.

    Each is a snapshot's folder, a .dvc file, one of a git revision (data.dvc@HEAD~1), or an md5. Shards that both have
    are not read.
    """
    from manyeyes.data.diff import compare_snapshots, open_version

    difference = compare_snapshots(
        open_version(before, remote=remote),
        open_version(after, remote=remote),
        names=(before, after),
        most_ids=ids,
        progress=lambda sentence, done: click.echo(f"{100 * done:3.0f}% {sentence}", err=True),
    )
    click.echo(difference.model_dump_json(indent=2) + "\n" if as_json else difference.as_text(), nl=False)


@click.command("self-chat")
@click.argument("language_model", type=click.Path(path_type=Path))
@click.argument("out", type=OutPath())
@click.option("--count", default=256, show_default=True, type=click.IntRange(min=1), help="Conversations.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(min=0))
@click.option("--licence", required=True, help="SPDX name of the language model's licence, for instance Apache-2.0.")
def self_chat_command(language_model: Path, out: Path, count: int, seed: int, licence: str) -> None:
    """Let the chat model in LANGUAGE_MODEL write conversations into the snapshot in OUT, as self-chat-train.

    Mixed into training they keep its language while it learns to see. Stopped with Ctrl-C, the same command goes on.
    """
    from manyeyes.training.self_chat import write_self_chat

    left_out = write_self_chat(
        out,
        language_model=language_model,
        licence=licence,
        count=count,
        seed=seed,
        on_progress=lambda done: click.echo(f"{done} of {count}", err=True),
    )
    click.echo(f"{count} conversations in {out}; {left_out} left out (no end in time, or said before)")


@click.command("import")
@click.argument("source_path", metavar="SOURCE")
@click.argument("out", type=OutPath())
@click.option("--images", default="", metavar="ROOT", help="What names of images are relative to; where the data is.")
@click.option("--kind", default="", help="json, jsonl, parquet, arrow, webdataset, folder or coco; guessed by default.")
@click.option("--source", default="", metavar="NAME", help="The published set that it is (manyeyes data sources).")
@click.option("--name", default="", help="Of the data set; --source, or the file's name, by default.")
@click.option("--split", default="train", show_default=True, help="Of the data set, and the one that is read.")
@click.option("--licence", default="", help="SPDX name; the source's by default.")
@click.option("--answer-format", is_flag=True, help="Put Cambrian-1's sentence about the answer behind questions.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1))
def import_command(
    source_path: str,
    out: Path,
    images: str,
    kind: str,
    source: str,
    name: str,
    split: str,
    licence: str,
    answer_format: bool,
    processes: int,
) -> None:
    """Import SOURCE (a file, a folder, s3:// or hub:ID@REVISION) into the snapshot in OUT, as NAME-SPLIT.

    Every item is kept or put in quarantine.jsonl with its reason. Stopped, the same command goes on.
    """
    from manyeyes.data.importing import import_data
    from manyeyes.data.importing.hub import fetch_hub_files

    if source_path.startswith("hub:"):
        source_path, name = fetch_hub_files(source_path, source=source), name or source
    report = import_data(
        source_path,
        out,
        images=images,
        kind=kind,
        source=source,
        name=name,
        split=split,
        licence=licence,
        answer_format=answer_format,
        processes=processes,
        on_progress=lambda sentence, done: click.echo(f"{100 * done:3.0f}% {sentence}", err=True),
    )
    click.echo(report.as_markdown(), nl=False)
    click.echo(f"report: {out / report.dataset.removesuffix(f'-{split}') / 'import.html'}")


@click.command("sources")
@click.argument("name", required=False)
def sources_command(name: str | None) -> None:
    """The published data sets that are known; all that is known of NAME."""
    from manyeyes.data.sources_table import SOURCES, describe_source

    if name is not None:
        click.echo(describe_source(name))
        return
    for known, row in SOURCES.items():
        where = row.hub_id or "-"
        click.echo(
            f"{known:<24} {row.category:<9} {row.samples:>10,} {row.licence:<16} {where:<42} {', '.join(row.used_by)}"
        )
