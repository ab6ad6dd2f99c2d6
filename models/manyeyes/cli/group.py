"""A group of commands that offers the nearest spelling of an unknown one."""

from __future__ import annotations

import click

from manyeyes.errors import did_you_mean


class Group(click.Group):
    """Offers the nearest spelling of an unknown command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a better message."""
        if self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f'no command "{args[0]}". {hint}See: {ctx.command_path} --help', ctx)
        return super().resolve_command(ctx, args)
