"""Click's own classes, with better messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from manyeyes.errors import did_you_mean
from manyeyes.storage import check_out


class CommandGroup(click.Group):
    """Offers the nearest spelling of an unknown command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a better message."""
        if self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f'no command "{args[0]}". {hint}See: {ctx.command_path} --help', ctx)
        return super().resolve_command(ctx, args)


class OutPath(click.Path):
    """Where a command writes: refused before its work where nothing can be written there.

    Args:
        file: A file, and not a folder.
    """

    def __init__(self, *, file: bool = False) -> None:
        super().__init__(path_type=Path)
        self._file = file

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As click does, then the check."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        check_out(path, file=self._file)
        return path
