"""The champion that an evaluation's report compares with. Its absence is a sentence, never an error."""

from __future__ import annotations

from manyeyes.errors import EvaluationError, RegistryError, RegistryUnreachableError
from manyeyes.evaluation.report.comparison import NO_CHAMPION, Champion
from manyeyes.harness.inputs import cache_dir


def find_champion(registry_model: str) -> Champion:
    """The registered scorecard of a model's champion.

    Args:
        registry_model: Name in the registry, for its champion of today; ``NAME/VERSION`` for the champion that an
            earlier step found; empty: none is looked up.

    Raises:
        RegistryError: Neither of these.
    """
    if not registry_model:
        return NO_CHAMPION
    from manyeyes.registry.pull import champion_evidence
    from manyeyes.registry.references import parse_model_reference

    reference = parse_model_reference(registry_model)
    if reference.alias is not None:
        raise RegistryError(
            f'champion is "{registry_model}"', "NAME or NAME/VERSION", f"For instance: {reference.name}"
        )
    work_dir = cache_dir() / "champions" / reference.name
    try:
        evidence = champion_evidence(reference.name, reference.version, work_dir=work_dir)
    except RegistryUnreachableError:
        return Champion(reason="The registry did not answer, so there is no champion to compare with.")
    except RegistryError as error:
        return Champion(reason=f"The champion of {registry_model} could not be read: {error.needed} is missing.")
    except EvaluationError:
        return Champion(reason=f"The champion of {registry_model} has a scorecard of another format.")
    if evidence is None:
        return Champion(reason=f"{registry_model} has no champion yet.")
    return Champion(name=f"{reference.name} version {evidence.version}", scorecard=evidence.scorecard)
