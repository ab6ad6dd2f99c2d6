"""Makes the previous champion the champion again, for people who live in Kubeflow's UI. Never cached."""

from __future__ import annotations

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.steps.promote_version import alias_report, check_reason


def restore_previous(
    reporter: Reporter,  # noqa: ARG001  (every step has one)
    *,
    model: str,
    reason: str,
) -> StepResult:
    """Swap ``champion`` and ``previous``.

    Args:
        reporter: Not needed.
        model: Name in the registry. NAME/VERSION is refused where that version was not champion before.
        reason: Why; kept with the version.

    Raises:
        RegistryError: No reason, no such model or version, no earlier champion, or another one than was named.
    """
    from manyeyes.registry import versions

    check_reason(reason, "roll back")
    reference = versions.parse_model_reference(model)
    name = versions.describe(reference).name  # refuses a model without a champion, and a version that is not there
    before = versions.read_aliases(name)
    restored = versions.rollback(str(reference) if reference.names_version else name, reason=reason.strip())
    return alias_report(
        f"{name} version {restored.version} is champion again",
        before=before,
        after=versions.read_aliases(name),
        about=[("gate", restored.verdict), ("reason", reason.strip())],
    )


STEP = Step("restore_previous", restore_previous, imports=("manyeyes.registry.versions",))
