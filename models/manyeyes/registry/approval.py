"""Approval: a version that passed the gate waits until named persons let it become champion.

Whether it waits is said by the recipe that it was registered with, and recorded with it. All of it is read from the
history, so an alias or a tag that somebody moves approves nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime

from manyeyes.errors import RegistryError
from manyeyes.registry.history import (
    Approvals,
    History,
    Identity,
    MoveRecord,
    alias_move,
    moving,
    read_aliases_of,
    read_history,
)
from manyeyes.registry.references import CHAMPION
from manyeyes.registry.tracking import Tracking


def needed_approvals(history: History, version: int) -> Approvals | None:
    """What a version was registered to need; ``None`` where passing the gate is enough."""
    registered = history.of(version, "register")
    return registered[-1].approvals if registered else None


def approvers(history: History, version: int) -> list[Identity]:
    """Who approved a version since it was registered, waited anew or was rejected."""
    found: list[Identity] = []
    for record in history.of(version, "register", "challenge", "approve", "reject"):
        found = [*found, record.by] if record.action == "approve" else []
    return found


def is_approved(history: History, version: int) -> bool:
    """Whether as many persons approved a version as it needs, and one at least."""
    needs = needed_approvals(history, version) or Approvals()
    return len(approvers(history, version)) >= needs.count


def check_approver(history: History, version: int, who: Identity) -> int:
    """That somebody may approve a version.

    Returns:
        How many approvals are missing once this one is given.

    Raises:
        RegistryError: It was rejected, has this person's approval, or was registered by this person and needs another.
    """
    name, needs = f"{history.name}/{version}", needed_approvals(history, version) or Approvals()
    last = history.of(version, "register", "challenge", "reject")[-1:]
    if last and last[0].action == "reject":
        raise RegistryError(
            f"{name} was rejected by {last[0].by.name} on {last[0].at[:10]}: {last[0].reason}",
            "a version that waits for approval",
            "Approve another one: what was rejected stays rejected.",
        )
    given = approvers(history, version)
    if who.name in [other.name for other in given]:
        raise RegistryError(
            f"{who.name} approved {name} already",
            f"{needs.count} persons" if len(given) < needs.count else "one approval by each person",
            "Ask somebody else: another user of MLflow, or of the machine where MLflow has no users.",
        )
    registered = history.of(version, "register")
    if needs.four_eyes and registered and registered[-1].by.name == who.name:
        raise RegistryError(
            f"{who.name} registered {name}",
            "approval by somebody else (four_eyes)",
            "Ask another person, with a user of their own in MLflow.",
        )
    return needs.count - len(given) - 1


def check_approved(tracking: Tracking, name: str, version: int) -> None:
    """Refuse a version that nobody approved: for whoever serves or fetches a champion.

    Args:
        tracking: The registry, from ``connect()``.
        name: Of the registered model.
        version: Number, as the alias gives it.

    Raises:
        RegistryError: The history has no approval of it, or not as many as it needs, or is damaged.
        RegistryUnreachableError: The store does not answer.
    """
    history = read_history(tracking, name)
    if history.problems or not is_approved(history, version):
        why = history.problems[0] if history.problems else f"{len(approvers(history, version))} approvals"
        raise RegistryError(
            f"{name}/{version} is not approved ({why})",
            "a version with as many approvals in its history as it needs, and one at least",
            f"Approve it: manyeyes approve {name}/{version} --reason ...; what happened: manyeyes history {name}",
        )


def audit(tracking: Tracking, name: str) -> list[str]:
    """What speaks against the aliases of a model, one sentence each; empty when the history explains them.

    Raises:
        RegistryError: No such model, or its history was deleted.
        RegistryUnreachableError: The store does not answer.
    """
    history = read_history(tracking, name)
    aliases, under_way = read_aliases_of(tracking, name), moving(tracking, name)
    found = list(history.problems)
    if not history.records:
        return [f"{name} has no history, and aliases: {', '.join(sorted(aliases))}"] if aliases else []
    if aliases != history.aliases:
        last = history.records[-1]
        moves = ", ".join(
            alias_move(alias, history.aliases.get(alias), aliases.get(alias))
            for alias in sorted({*aliases, *history.aliases})
            if aliases.get(alias) != history.aliases.get(alias)
        )
        how = "a move is under way, or was left half done" if under_way else "moved by other means than ManyEyes"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found.append(f"{how}, after record {last.number} of {last.at} and before {now}: {moves}")
    found += [_outside(history, record) for record in history.records if record.action == "outside"]
    champion = aliases.get(CHAMPION)
    if champion is not None and needed_approvals(history, champion) and not is_approved(history, champion):
        found.append(f"champion is version {champion}, which needs approval and has none")
    return found


def _outside(history: History, record: MoveRecord) -> str:
    before = history.records[record.number - 2].at if record.number > 1 else "the beginning"
    moves = ", ".join(alias_move(alias, *ends) for alias, ends in record.moves.items())
    return f"moved by other means, between {before} and {record.at} (record {record.number}): {moves}"


def waits(history: History, version: int) -> bool:
    """Whether a version needs approval that it does not have."""
    return needed_approvals(history, version) is not None and not is_approved(history, version)
