"""One line a step on a terminal, or one line an event in a log file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from manyeyes.harness.events import Event
from manyeyes.terminal import replace_unknown_characters

# Without a terminal, a running step says how far it is so often.
_LOG_INTERVAL_S = 30.0

_COLOURS = {"done": "green", "cached": "cyan", "failed": "red", "running": "yellow", "stopped": "magenta"}


@dataclass
class _Line:
    state: str
    began: float
    elapsed: float | None = None
    figure: str = ""
    eta_s: float | None = None
    logged: float = 0.0


class ProgressView:
    """Shows the steps of a run.

    Args:
        console: Where; decides by itself whether it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines: dict[str, _Line] = {}
        self._live: Live | None = None

    def begin(self, run_dir: Path | None = None) -> None:
        """Start showing the run in ``run_dir``, or steps that no pipeline runs."""
        replace_unknown_characters()
        if run_dir is not None:
            self.console.print(f"run {run_dir.name}, log: {_short(run_dir / 'pipeline.log')}", highlight=False)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._table)
            self._live.start()

    def update(self, events: list[Event]) -> None:
        """Take in new events."""
        for event in events:
            self._take(event)
        if self._live is None:
            now = time.time()
            for step, line in self._lines.items():
                if line.state == "running" and now - max(line.logged, line.began) >= _LOG_INTERVAL_S:
                    line.logged = now
                    self._log(step, line)

    def interrupt(self) -> None:
        """Show what runs as stopped; its end is no failure."""
        for step, line in self._lines.items():
            if line.state == "running":
                line.state, line.elapsed, line.eta_s = "stopped", time.time() - line.began, None
                if self._live is None:
                    self._log(step, line)

    def end(self) -> None:
        """Stop showing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take(self, event: Event) -> None:
        line = self._lines.get(event.step)
        if line is None and event.kind == "broken":
            # A process that was killed could not say its encoder's name; the task has the step's.
            line = next((row for name, row in self._lines.items() if _is_running(name, row, event.step)), None)
        if line is None:
            if event.kind in ("completed", "broken"):
                return
            line = self._lines[event.step] = _Line("running", event.time)
        if event.kind == "started":
            line.state, line.began, line.elapsed = "running", event.time, None
            return
        if event.kind == "progress":
            if event.done is not None or event.eta_s is not None:
                line.figure, line.eta_s = event.figure, event.eta_s
            return
        if event.kind in ("finished", "cached"):
            line.state = "done" if event.kind == "finished" else "cached"
            line.elapsed = event.time - line.began
            line.figure, line.eta_s = event.figure, None
        elif event.kind in ("failed", "broken"):
            if line.state in ("failed", "stopped"):
                return
            line.state, line.elapsed, line.eta_s = "failed", event.time - line.began, None
            line.figure = event.error.error if event.error else line.figure
        else:
            return
        if self._live is None:
            self._log(next(name for name, row in self._lines.items() if row is line), line)

    def _log(self, step: str, line: _Line) -> None:
        text = f"{step:<32} {line.state:<8} {_clock(self._elapsed(line)):>6}  {self._figure(line)}".rstrip()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for step, line in self._lines.items():
            colour = _COLOURS[line.state]
            state = f"[{colour}]{line.state}[/{colour}]"
            table.add_row(step.replace("[", r"\["), state, _clock(self._elapsed(line)), self._figure(line))
        return table

    @staticmethod
    def _elapsed(line: _Line) -> float:
        return time.time() - line.began if line.elapsed is None else line.elapsed

    @staticmethod
    def _figure(line: _Line) -> str:
        return f"{line.figure}, {_clock(line.eta_s)} left" if line.eta_s is not None else line.figure


def _is_running(name: str, line: _Line, step: str) -> bool:
    return line.state == "running" and name.partition("[")[0] == step


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
