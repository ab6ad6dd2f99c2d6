"""From the options of ``manyeyes run`` to the parameters of a compiled pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from manyeyes.errors import PipelineError
from manyeyes.harness.inputs import locate_data
from manyeyes.recipe import load_recipe, parse_overrides

# libyaml's loader reads the large file of a search in a tenth of the time; not every build of PyYAML has it.
_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_form(path: Path) -> dict[str, Any]:
    """The form of a compiled pipeline: parameter name -> its definition.

    Raises:
        PipelineError: Not a compiled pipeline.
    """
    try:
        spec = next(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader), None)
    except yaml.YAMLError:
        spec = None
    if not isinstance(spec, dict) or "root" not in spec:
        raise PipelineError(f"{path} is no compiled pipeline", "what kfp compiles", "Run: manyeyes pipeline compile")
    found: dict[str, Any] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return found


def local_parameters(
    path: Path,
    *,
    recipe: str,
    assignments: Sequence[str],
    data_md5: str,
    data_remote: str,
    registry_model: str,
    given: Sequence[str],
) -> dict[str, Any]:
    """What a pipeline is run with on this machine; wrong input is refused here, before anything starts.

    Args:
        path: The compiled pipeline.
        recipe: A recipe's name or the path of a YAML file, which travels as text.
        assignments: ``a.b=c`` each.
        data_md5: Snapshot; empty: the checkout's own.
        data_remote: Where it is; empty: the checkout's own.
        registry_model: Name in the registry; empty: the recipe's own.
        given: ``name=value`` each, for the pipeline's other parameters.

    Raises:
        PipelineError: Not a compiled pipeline, or a parameter that it has not, of another type, or missing.
        RecipeError: A recipe that is wrong.
        SnapshotError: Neither an option nor the checkout says which snapshot.
    """
    from manyeyes.kubeflow.endpoint_runs import run_parameters

    # resolve_data checks it again, for those who start a pipeline elsewhere.
    checked = load_recipe(recipe, overrides=parse_overrides(list(assignments)))
    form = read_form(path)
    values: dict[str, Any] = {}
    if "recipe" in form:
        is_file = recipe.endswith((".yaml", ".yml"))
        values["recipe_text" if is_file else "recipe"] = checked.canonical_json() if is_file else recipe
        values["recipe_overrides"] = "" if is_file else "\n".join(assignments)
    elif assignments:
        raise PipelineError("--set was given", "a pipeline that takes a recipe", "Leave it out.")
    if "data_md5" in form:
        values["data_md5"], values["data_remote"] = locate_data(data_md5, data_remote)
    if registry_model and "registry_model" in form:
        values["registry_model"] = registry_model
    elif registry_model:
        raise PipelineError("--registry-model was given", "a pipeline that takes registry_model", "Leave it out.")
    rest = {
        name: {**definition, "isOptional": True} if name in values else definition for name, definition in form.items()
    }
    return values | run_parameters(rest, given=given)
