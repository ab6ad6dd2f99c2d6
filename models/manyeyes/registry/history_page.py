"""Shows the history of a model: when each version was champion, how it scored, and every move."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from manyeyes.pages import Stretch, Table, Text, Timeline, render
from manyeyes.registry.history import History, MoveRecord, alias_move, read_history
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.references import CHAMPION, ModelReference, find_alias, find_version
from manyeyes.registry.tracking import connect

Scores = Mapping[int, Mapping[str, str]]
_KINDS = {
    **{"adopt": "quiet", "outside": "bad", "rollback": "warn", "reject": "warn"},
    **{"promote": "good", "approve": "good"},
}


def load_history(name: str) -> History:
    """The history of a registered model.

    Raises:
        RegistryError: No such model, or its history was deleted.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    if find_alias(tracking, name, CHAMPION) is None:
        find_version(tracking, ModelReference(name, None, 1))  # says which models there are
    return read_history(tracking, name)


def registered_scores(name: str) -> Scores:
    """Score by benchmark of each version, as registered.

    Raises:
        RegistryUnreachableError: The registry does not answer.
    """
    with registry_errors():
        found = connect().client.search_model_versions(f"name='{name}'")
    return {
        int(version.version): {
            key.removeprefix("score."): value for key, value in version.tags.items() if key.startswith("score.")
        }
        for version in found
    }


def history_json(history: History) -> str:
    """``manyeyes history --json``: the records as they stand in the chain, and what is wrong with it."""
    return json.dumps(
        {
            "model": history.name,
            "aliases": history.aliases,
            "problems": list(history.problems),
            "records": [record.model_dump(mode="json") for record in history.records],
        },
        indent=2,
        ensure_ascii=False,
    )


def history_text(history: History) -> str:
    """One line a record, for a terminal."""
    lines = [
        f"{record.number:>4}  {_when(record)}  {_what(record):<22}  {_moves(record)}  by {_who(record)}"
        + (f": {record.reason}" if record.reason else "")
        for record in history.records
    ]
    lines += [f"problem: {problem}" for problem in history.problems]
    return "\n".join(lines) or f'"{history.name}" has no history yet: its next move begins one'


def render_history(history: History, scores: Scores, *, now: datetime | None = None) -> str:
    """One HTML file without scripts or references.

    Args:
        history: From ``load_history``.
        scores: From ``registered_scores``.
        now: Until when the last champion has been one.
    """
    now = now or datetime.now(UTC)
    reigns = _reigns(history.records, now)
    begun = min((start for _, start, _, _ in reigns), default=now)
    names = sorted({name for version, *_ in reigns for name in scores.get(version, {})})
    rows: dict[int, list[Stretch]] = {}
    for version, start, end, record in reigns:
        stretch = Stretch(
            (start - begun).total_seconds(),
            (end - begun).total_seconds(),
            _KINDS.get(record.action, "on"),
            f"{_what(record)}, {_when(record)}",
        )
        rows.setdefault(version, []).append(stretch)
    champion = history.aliases.get(CHAMPION)
    champions: list[list[str | Text]] = [
        [
            Text(f"version {version}", kind="strong" if version == champion and end == now else ""),
            start.strftime("%Y-%m-%d %H:%M"),
            "today" if end == now else end.strftime("%Y-%m-%d %H:%M"),
            Text(_what(record), detail=record.reason, kind=_KINDS.get(record.action, "")),
            *(scores.get(version, {}).get(name, "") for name in names),
        ]
        for version, start, end, record in reversed(reigns)
    ]
    moves: list[list[str | Text]] = [
        [
            str(record.number),
            _when(record),
            Text(_what(record), detail=record.reason, kind=_KINDS.get(record.action, "")),
            _moves(record),
            Text(record.by.name, detail=_TRUST[record.by.source]),
            Text((record.gate_digest or "")[:12], kind="code") if record.gate_digest else "",
        ]
        for record in reversed(history.records)
    ]
    return render(
        "history.html",
        title=f"History of {history.name}",
        sentence=f"Version {champion} is champion" if champion else "There is no champion",
        count=len(history.records),
        problems=list(history.problems),
        times=Timeline(
            [(f"version {version}", stretches, "", "") for version, stretches in sorted(rows.items())],
            (now - begun).total_seconds(),
        ),
        champions=Table(("champion", "from", "until", "by", *names), champions, numbers=range(4, 4 + len(names))),
        moves=Table(("", "when (UTC)", "what", "aliases", "who", "gate report"), moves, stacked=True),
    )


_TRUST = {"mlflow": "known to MLflow", "environment": "as the machine says"}


def _reigns(records: Sequence[MoveRecord], now: datetime) -> list[tuple[int, datetime, datetime, MoveRecord]]:
    """Each champion, from when to when, and the record that made it champion."""
    found: list[tuple[int, datetime, datetime, MoveRecord]] = []
    for record in records:
        champion, at = record.aliases.get(CHAMPION), datetime.fromisoformat(record.at)
        if found and found[-1][0] == champion and found[-1][2] == now:
            continue
        if found and found[-1][2] == now:
            version, start, _, by = found[-1]
            found[-1] = (version, start, at, by)
        if champion is not None:
            found.append((champion, at, now, record))
    return found


def _what(record: MoveRecord) -> str:
    words = {"adopt": "taken over", "outside": "moved by other means"}.get(record.action, record.action)
    forced = " by force" if record.forced else ""
    return f"{words} version {record.version}{forced}" if record.version else words


def _moves(record: MoveRecord) -> str:
    return ", ".join(alias_move(alias, *ends) for alias, ends in record.moves.items()) or "no alias moved"


def _when(record: MoveRecord) -> str:
    return record.at[:19].replace("T", " ")


def _who(record: MoveRecord) -> str:
    return f"{record.by.name} ({record.by.source})"
