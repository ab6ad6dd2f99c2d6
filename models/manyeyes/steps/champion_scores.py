"""The champion that an evaluation's report compares with. Its absence is a sentence, never an error."""

from __future__ import annotations

from manyeyes.errors import EvaluationError, RegistryError, RegistryUnreachableError
from manyeyes.evaluation.comparison import NO_CHAMPION, Champion
from manyeyes.steps.inputs import cache_dir


def find_champion(registry_model: str) -> Champion:
    """The registered scorecard of a model's champion.

    Args:
        registry_model: Name in the registry; empty: none is looked up.
    """
    if not registry_model:
        return NO_CHAMPION
    from manyeyes.registry.champion import champion_evidence

    try:
        evidence = champion_evidence(registry_model, work_dir=cache_dir() / "champions" / registry_model)
    except RegistryUnreachableError:
        return Champion(reason="The registry did not answer, so there is no champion to compare with.")
    except RegistryError as error:
        return Champion(reason=f"The champion of {registry_model} could not be read: {error.needed} is missing.")
    except EvaluationError:
        return Champion(reason=f"The champion of {registry_model} has a scorecard of another format.")
    if evidence is None:
        return Champion(reason=f"{registry_model} has no champion yet.")
    return Champion(name=f"{registry_model} version {evidence.version}", scorecard=evidence.scorecard)
