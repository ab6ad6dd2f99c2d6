"""Runs on an endpoint: parameters by name, starting one exactly once, finding one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from kfp_server_api import models

from manyeyes.data.curation.recipe import load_curation_recipe
from manyeyes.errors import EndpointError, PipelineError, did_you_mean
from manyeyes.kubeflow.endpoint import AnsweredError, Endpoint, UnknownOutcomeError
from manyeyes.recipe import load_recipe, parse_overrides, write_recipe_text

EXPERIMENT = "manyeyes"
# Linux allows 131,072 bytes for an argument; JSON inside JSON doubles quotes.
_MAX_VALUE_BYTES = 65_536


def find_pipeline_version(endpoint: Endpoint, name: str, version: str = "") -> models.V2beta1PipelineVersion:
    """A version of a pipeline on the endpoint, the newest by default.

    Raises:
        PipelineError: No such pipeline or version.
    """
    pipeline = endpoint.pipeline(name)
    if pipeline is None:
        raise PipelineError(
            f'pipeline "{name}" is not on {endpoint.settings.url}',
            "a pipeline that was uploaded",
            f"Upload it: manyeyes pipeline upload {name} --image REF@sha256:...",
        )
    answer = endpoint.pipelines.pipeline_service_list_pipeline_versions(
        pipeline.pipeline_id, sort_by="created_at desc", page_size=100
    )
    versions = answer.pipeline_versions or []
    if version:
        found = endpoint.version(pipeline.pipeline_id, version)
        if found is None:
            names = [item.display_name for item in versions]
            raise PipelineError(
                f'version "{version}" of {name} is not there',
                f"one of {', '.join(names[:5]) or 'none yet'}",
                f"{did_you_mean(version, names)}Without --version the newest runs.",
            )
        return found
    if not versions:
        raise PipelineError(
            f'pipeline "{name}" has no version', "one that was uploaded", f"Run: manyeyes pipeline upload {name} ..."
        )
    return versions[0]


def pipeline_parameters(version: models.V2beta1PipelineVersion) -> dict[str, Any]:
    """The form of a version: parameter name -> its definition in the compiled pipeline."""
    spec = version.pipeline_spec or {}
    spec = spec.get("pipeline_spec", spec)
    found: dict[str, Any] = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    return found


def check_run(version: models.V2beta1PipelineVersion, parameters: Mapping[str, Any]) -> None:
    """Refuse a run of a version whose workflow would become too large.

    Raises:
        PipelineError: It would.
    """
    from manyeyes.kubeflow.sizes import check_size

    stored = version.pipeline_spec or {}
    spec = stored.get("pipeline_spec", stored)
    check_size([spec, stored.get("platform_spec") or {}], parameters)


def run_parameters(
    definitions: Mapping[str, Any], *, given: Sequence[str], assignments: Sequence[str] = (), recipe: str = ""
) -> dict[str, Any]:
    """Check ``name=value`` pairs against a pipeline's form and turn them into values.

    Args:
        definitions: ``pipeline_parameters(...)``.
        given: ``name=value`` each; a curation recipe may be the path of a YAML file, which travels as text.
        assignments: ``a.b=c`` each; changes to the recipe, which travel in the parameter ``recipe_overrides``.
        recipe: A shipped recipe's name, or the path of a YAML file, which travels as text.

    Raises:
        PipelineError: No such parameter, a value of another type or outside the choices, or one that is missing.
        RecipeError: The file is no recipe.
    """
    values: dict[str, Any] = {}
    if recipe:
        is_file = recipe.endswith((".yaml", ".yml"))
        name = "recipe_text" if is_file else "recipe"
        if name not in definitions:
            raise PipelineError(f"--recipe {recipe} was given", f"a pipeline that takes {name}", "Leave it out.")
        text = write_recipe_text(load_recipe(recipe)) if is_file else recipe
        values[name] = _value_of(name, text, definitions[name])
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise PipelineError(f'parameter is "{pair}"', "name=value", "For instance: --param recipe=tiny")
        if name not in definitions:
            raise PipelineError(
                f'parameter is "{name}"',
                f"one of {', '.join(sorted(definitions))}",
                f"{did_you_mean(name, definitions)}Fields of the recipe go with --set.",
            )
        if name == "curate_recipe" and text.endswith((".yaml", ".yml")):
            # A file of this machine travels as text.
            name, text = "curate_recipe_text", load_curation_recipe(text).model_dump_json(exclude_defaults=True)
        values[name] = _value_of(name, text, definitions[name])
    if assignments:
        parse_overrides(list(assignments))
        if "recipe_overrides" not in definitions:
            raise PipelineError("--set was given", "a pipeline that takes recipe_overrides", "Leave it out.")
        lines = [line for line in (str(values.get("recipe_overrides", "")), *assignments) if line]
        values["recipe_overrides"] = "\n".join(lines)
    missing = [
        name
        for name, definition in definitions.items()
        if name not in values and "defaultValue" not in definition and not definition.get("isOptional")
    ]
    if missing:
        raise PipelineError(
            f"{', '.join(missing)} not given", "a value: there is no default", f"Add --param {missing[0]}=..."
        )
    for name, value in values.items():
        size = len(json.dumps(value))
        if size > _MAX_VALUE_BYTES:
            raise PipelineError(
                f"{name} takes {size:,} bytes as JSON",
                f"{_MAX_VALUE_BYTES:,} at most: a step gets it on its command line",
                "Shorten it, or split the run.",
            )
    return values


def _value_of(name: str, text: str, definition: Mapping[str, Any]) -> Any:
    kind = definition.get("parameterType", "STRING")
    literals = definition.get("literals") or []
    if literals and text not in [str(literal) for literal in literals]:
        raise PipelineError(
            f'{name} is "{text}"',
            f"one of {', '.join(map(str, literals))}",
            f"{did_you_mean(text, map(str, literals))}The image of this version knows no other.",
        )
    if kind == "STRING":
        return text
    wanted: dict[str, tuple[type, ...]] = {
        "NUMBER_INTEGER": (int,),
        "NUMBER_DOUBLE": (int, float),
        "BOOLEAN": (bool,),
        "LIST": (list,),
        "STRUCT": (dict,),
    }
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    types = wanted.get(kind, (object,))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
        raise PipelineError(f'{name} is "{text}"', f"a value of type {kind}", "Lists and maps are written as YAML.")
    return value


def start_run(
    endpoint: Endpoint,
    version: models.V2beta1PipelineVersion,
    *,
    pipeline: str,
    parameters: Mapping[str, Any],
    name: str = "",
    experiment: str = EXPERIMENT,
    service_account: str = "",
) -> tuple[models.V2beta1Run, bool]:
    """Start a run; one of that name is taken as it is.

    Args:
        endpoint: Where.
        version: Of the pipeline.
        pipeline: Its name.
        parameters: Values by name.
        name: Name of the run; made of the time by default, so that a run started twice by one command is found.
        experiment: Kubeflow experiment to list it under.
        service_account: Kubernetes account of its pods; the endpoint's default.

    Returns:
        The run, and whether it is new.
    """
    check_run(version, parameters)
    name = name or f"{pipeline}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    group = endpoint.experiment(experiment)
    body = models.V2beta1Run(
        display_name=name,
        experiment_id=group.experiment_id,
        pipeline_version_reference=models.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
        ),
        runtime_config=models.V2beta1RuntimeConfig(parameters=dict(parameters)),
        service_account=service_account or None,
    )
    try:
        return endpoint.create(
            lambda: endpoint.run(name), lambda: endpoint.runs.run_service_create_run(run=body), unique=False
        )
    except EndpointError as error:
        if not error.retry:
            raise
        raise EndpointError(
            error.found,
            f'to know whether run "{name}" was started',
            f"Run the same command again with --name {name}: that starts it only when it is not there.",
            retry=True,
        ) from error


def list_runs(endpoint: Endpoint) -> list[models.V2beta1Run]:
    """The newest twenty, without their tasks."""
    scope = {"namespace": endpoint.settings.namespace} if endpoint.settings.namespace else {}
    answer = endpoint.runs.run_service_list_runs(sort_by="created_at desc", page_size=20, **scope)
    return list(answer.runs or [])


def state_of(run: models.V2beta1Run) -> str:
    """What became of a run: Kubeflow's word, but for one that somebody ended, which it calls FAILED in the end."""
    state = str(run.state or "PENDING")
    before = [past.state for past in run.state_history or () if past.state != "FAILED"]
    return "CANCELED" if state == "FAILED" and before and before[-1] == "CANCELING" else state


def retry_run(endpoint: Endpoint, run: models.V2beta1Run) -> None:
    """Let a run go on where it failed: what went well stays, what failed and what was not started runs.

    Raises:
        PipelineError: It has not failed.
        EndpointError: The endpoint refuses, or it is unknown whether the run goes on.
    """
    state = state_of(run)
    if state not in ("FAILED", "CANCELED"):
        raise PipelineError(
            f"run {run.display_name} is {state.lower()}",
            "a run that failed or was stopped",
            f"Look at it: manyeyes pipeline status {run.run_id}",
        )
    try:
        endpoint.runs.run_service_retry_run(run.run_id)
    except (UnknownOutcomeError, AnsweredError):
        # The answer was lost, or somebody else was quicker.
        if state_of(find_run(endpoint, str(run.run_id))) not in ("PENDING", "RUNNING"):
            raise


def find_run(endpoint: Endpoint, name_or_id: str) -> models.V2beta1Run:
    """A run by id or name.

    Raises:
        PipelineError: There is none.
    """
    run = endpoint.run(name_or_id)
    if run is None:
        raise PipelineError(
            f'run is "{name_or_id}"', "a run of this endpoint", "List them with: manyeyes pipeline status"
        )
    return run
