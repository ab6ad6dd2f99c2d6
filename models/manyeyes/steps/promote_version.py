"""Makes a version the champion, for people who live in Kubeflow's UI. Never cached."""

from __future__ import annotations

from manyeyes.errors import RegistryError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.pages import Table, facts_table, step_page


def promote_version(
    reporter: Reporter,  # noqa: ARG001  (every step has one)
    *,
    model: str,
    version: str,
    reason: str,
    force: bool = False,
) -> StepResult:
    """Move ``champion`` to a version; the old champion becomes ``previous``.

    Args:
        reporter: Not needed.
        model: Name in the registry.
        version: Number or alias, for instance ``challenger``.
        reason: Why; kept with the version.
        force: Promote a version that the gate failed, too.

    Raises:
        RegistryError: No reason, no such model or version, or the gate failed it.
    """
    from manyeyes.registry import versions

    check_reason(reason, "promote")
    chosen = versions.describe(versions.parse_model_reference(model, version))
    before = versions.read_aliases(chosen.name)
    promoted = versions.promote(chosen.name, chosen.version, force=force, reason=reason.strip())
    return alias_report(
        f"{chosen.name} version {chosen.version} is champion",
        before=before,
        after=versions.read_aliases(chosen.name),
        about=[
            ("gate", promoted.verdict),
            ("forced", "yes" if force and promoted.verdict != "passed" else "no"),
            ("reason", reason.strip()),
        ],
    )


def alias_report(
    title: str, *, before: dict[str, int], after: dict[str, int], about: list[tuple[str, object]]
) -> StepResult:
    """Which alias moved from where to where.

    Args:
        title: What the registry says now.
        before: Version by alias.
        after: Version by alias.
        about: More facts.
    """
    rows = [
        [alias, _version(before.get(alias)), _version(after.get(alias)), "moved" if moved else "as it was"]
        for alias in sorted({*before, *after})
        for moved in [before.get(alias) != after.get(alias)]
    ]
    moves = [f"{alias} from {old} to {new}" for alias, old, new, what in rows if what == "moved"]
    aliases, facts = Table(["alias", "before", "now", ""], rows), facts_table(about)
    return StepResult(
        headline=f"{title}; " + (", ".join(moves) if moves else "no alias moved"),
        html=step_page(
            title, "; ".join(moves) or "No alias moved: it was so already.", {"Aliases": aliases, "About": facts}
        ),
        markdown=f"**{title}**\n\n{aliases.markdown()}\n\n{facts.markdown()}\n",
        values={"moves": moves},
    )


def check_reason(reason: str, verb: str) -> None:
    """Refuse to move an alias without a reason."""
    if not reason.strip():
        raise RegistryError("reason is empty", f"why to {verb}; it is kept with the version", "Write a sentence.")


def _version(number: int | None) -> str:
    return "none" if number is None else f"version {number}"


STEP = Step("promote_version", promote_version, imports=("manyeyes.registry.versions",))
