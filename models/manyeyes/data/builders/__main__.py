"""``python -m manyeyes.data.builders NAME OUT [--pretrained DIR]``: the same as ``manyeyes data build``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from manyeyes.data.builders import BUILDERS, add_pretrained
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import USER_ERROR, ManyEyesError, SnapshotError, did_you_mean
from manyeyes.terminal import replace_unknown_characters


@click.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--pretrained",
    type=click.Path(path_type=Path),
    help="Folder with one sub-folder a pretrained part, to be copied into the snapshot.",
)
def main(name: str, out: Path, pretrained: Path | None) -> None:
    """Build the data set NAME into the snapshot folder OUT."""
    try:
        if name not in BUILDERS:
            raise SnapshotError(
                f'builder is "{name}"', f"the builders are {', '.join(BUILDERS)}", did_you_mean(name, BUILDERS)
            )
        BUILDERS[name](out)
        if pretrained is not None:
            add_pretrained(out, pretrained)
        snapshot = open_folder(out)
    except ManyEyesError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(USER_ERROR)
    for dataset, entry in snapshot.manifest.datasets.items():
        click.echo(f"{dataset}: {entry.rows} records, {entry.images} images, {len(entry.shards)} shards")
    click.echo(f"{out}: md5 {snapshot.md5}")


if __name__ == "__main__":
    replace_unknown_characters()
    main()
