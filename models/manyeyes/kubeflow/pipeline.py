"""The only module of the package that knows kfp: compiles pipelines and runs a compiled one on this machine.

``manyeyes run`` starts this module in a child process (``python -m manyeyes.kubeflow.pipeline RUN_DIR``), because
kfp.local prints pages, replaces ``builtins.print`` and changes the root logger: here all of that goes to
``pipeline.log``.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import yaml
from pydantic import Field

from manyeyes.data.curation.recipe import list_curation_recipes
from manyeyes.errors import OTHER_ERROR, USER_ERROR, ManyEyesError, PipelineError, did_you_mean
from manyeyes.harness.base import describe_failure, wait_for_runner_death
from manyeyes.harness.events import Artifact, ErrorReport, emit
from manyeyes.harness.inputs import PINNING_STEPS
from manyeyes.kubeflow.compact import compact, compact_for_cluster, step_of
from manyeyes.kubeflow.profiles import Profile
from manyeyes.recipe import list_recipes, load_recipe
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel
from manyeyes.terminal import replace_unknown_characters

REQUEST_FILE = "request.json"
IMAGE_DIGEST = "MANYEYES_IMAGE_DIGEST"
GIT_COMMIT = "MANYEYES_GIT_COMMIT"
# A compiled pipeline is a quarter of a megabyte; libyaml, where it is there, reads it ten times faster.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The shipped recipe that says most of each encoder.
_LARGEST = "eagle-x5-13b"
# Every pipeline: its name, and where its function is. The module is pipelines/<name>.py of a checkout.
PIPELINES: dict[str, str] = {
    "train": "pipelines.train:train",
    "evaluate": "pipelines.evaluate:evaluate",
    "search_encoders": "pipelines.search_encoders:search_encoders",
    "ablate": "pipelines.ablate:ablate",
    "balance": "pipelines.balance:balance",
    "curate": "pipelines.curate:curate",
    "validate": "pipelines.validate:validate",
    "promote": "pipelines.promote:promote",
    "rollback": "pipelines.rollback:rollback",
}


class RunRequest(StrictModel):
    """``request.json``: what the child process is to run."""

    pipeline: str = Field(description="Path of the compiled YAML.")
    name: str = Field(description="Pipeline name.")
    arguments: dict[str, Any] = Field(description="Pipeline parameters.")
    cache_dir: str = Field(description="Folder of the step cache.")
    use_cache: bool = Field(description="False: every step runs.")
    tracked: bool = Field(description="Whether an MLflow run is made around the steps.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of that MLflow run.")


# --- compiling ---------------------------------------------------------------------------------------------------


def compile_pipeline(
    name: str,
    out: Path,
    *,
    root: Path = Path(),
    image: str = "",
    profile: Profile | None = None,
    defaults: Mapping[str, str] | None = None,
    commit: str = "",
) -> Path:
    """Compile ``pipelines/<name>.py`` of a checkout and inject the drop-downs.

    The SDK cannot emit ``literals`` (``typing.Literal`` in a signature is refused), the backend and the UI read them:
    https://github.com/kubeflow/pipelines/pull/12839. Remove the injection when the SDK can.

    Args:
        name: Pipeline name.
        out: YAML file to write.
        root: The checkout.
        image: ``REF@sha256:...`` that the steps run in, and whose digest becomes their code digest. Empty: the tag of
            this version, as in the committed file.
        profile: What a cluster needs; none in the committed file.
        defaults: What the form offers in fields that the committed file leaves empty; for the fields that it has.
        commit: Of the checkout, which a registered version then names; no part of a cache key.

    Raises:
        PipelineError: No such pipeline, not in a checkout, or an image without a digest.
    """
    if name not in PIPELINES or not (root / "pipelines" / f"{name}.py").is_file():
        raise PipelineError(
            f'pipeline is "{name}", and {root.resolve()} has no pipelines/{name}.py',
            "a checkout of ManyEyes and one of its pipelines",
            f"{did_you_mean(name, PIPELINES)}Change to the checkout.",
        )
    digest = image_digest(image) if image else ""
    from kfp import compiler

    if str(root.resolve()) not in sys.path:
        sys.path.insert(0, str(root.resolve()))
    module, _, function = PIPELINES[name].partition(":")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(getattr(importlib.import_module(module), function), package_path=str(compiled))
        text = compiled.read_text(encoding="utf-8")
    documents = list(yaml.load_all(text, Loader=_LOADER))
    compact(documents[0])
    _inject(documents[0], "literals", {"recipe": list_recipes(), "curate_recipe": list_curation_recipes()})
    _inject(documents[0], "defaultValue", defaults or {})
    if digest:
        _put_image(documents[0], image, digest)
    if commit:
        _put_commit(documents[0], commit)
    if profile is not None:
        from manyeyes.kubeflow.profiles import apply_profile

        documents = apply_profile(documents, profile)
    if image or profile is not None:
        compact_for_cluster(documents)
        _put_growth(documents)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    body = yaml.safe_dump_all(documents, sort_keys=True, width=120, allow_unicode=True)
    write_file(out, "\n".join(comments) + "\n" + body)
    return out


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a compiled pipeline: the pipeline, and its Kubernetes part where there is one."""
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_LOADER))


def image_digest(image: str) -> str:
    """The 64 hexadecimal digits of ``REF@sha256:...``.

    Raises:
        PipelineError: An image without a digest: a tag may mean other code tomorrow, and Kubeflow's cache would not see
            it (https://github.com/kubeflow/pipelines/issues/13862).
    """
    match = re.fullmatch(r"[\w][\w.:/-]*@sha256:([0-9a-f]{64})", image)
    if match is None:
        raise PipelineError(
            f'image is "{image}"',
            "a reference with a digest: REGISTRY/NAME@sha256:<64 hexadecimal digits>",
            "Push the image and take the digest that the push prints, or ask: docker buildx imagetools inspect IMAGE",
        )
    return match[1]


def _inject(spec: dict[str, Any], key: str, values: Mapping[str, object]) -> None:
    parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, value in values.items():
        if name in parameters:
            parameters[name][key] = value


def _put_image(spec: dict[str, Any], image: str, digest: str) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        if "container" in executor:
            executor["container"]["image"] = image
            # The others have it in what is pinned for them.
            if step_of(executor) in PINNING_STEPS:
                variable = {"name": IMAGE_DIGEST, "value": f"sha256:{digest}"}
                executor["container"].setdefault("env", []).append(variable)


def _put_commit(spec: dict[str, Any], commit: str) -> None:
    # Kubeflow's cache looks at image, command and inputs. Where no other step reads it, it is not stored six times.
    for executor in spec["deploymentSpec"]["executors"].values():
        if "container" in executor and step_of(executor) == "register":
            executor["container"].setdefault("env", []).append({"name": GIT_COMMIT, "value": commit})


def _put_growth(documents: list[dict[str, Any]]) -> None:
    """Tell the first step how large the workflow becomes, so that it can refuse what was started from the form."""
    from manyeyes.kubeflow.sizes import SIZES, growth

    if "recipe" not in documents[0]["root"].get("inputDefinitions", {}).get("parameters", {}):
        return
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        if "container" in executor and step_of(executor) in PINNING_STEPS:
            variable = {"name": SIZES, "value": growth(documents, load_recipe(_LARGEST))}
            executor["container"].setdefault("env", []).append(variable)


# --- running, in the child process -------------------------------------------------------------------------------


def execute(run_dir: Path) -> int:
    """Run the request in ``run_dir`` with kfp.local; exit code 0, or 1 when a step failed."""
    request = RunRequest.model_validate_json((run_dir / REQUEST_FILE).read_text(encoding="utf-8"))
    from kfp import components, local

    # The image runs on a cluster only; here a task is a process in this environment.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task that uses custom or non-Python base")
    warnings.filterwarnings("ignore", message="Task .* have no effect in the current local runner")
    if " " in sys.executable:
        # kfp.local pastes sys.executable into a shell command without quotes.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        sys.executable = "python3"
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run_dir / "steps"),
        raise_on_error=False,
        enable_caching=request.use_cache,
        cache_root=request.cache_dir,
    )
    failed: list[str] = []
    with _watched_tasks(run_dir / "steps", failed):
        components.load_component_from_file(request.pipeline)(**request.arguments)
    return 1 if failed else 0


@contextmanager
def _watched_tasks(pipeline_root: Path, failed: list[str]) -> Iterator[None]:
    """Emit an event for each task that ends.

    kfp.local has no callback, and a cached task has no process that could speak for itself. All orchestrators of
    kfp 2.17 look ``execute_single_task`` up on its module for each task, so wrapping it there sees every task. Remove
    when kfp.local reports its tasks.
    """
    from kfp.local.orchestrator import task_executor

    original: Callable[..., Any] = task_executor.execute_single_task

    def watched(**call: Any) -> Any:
        root = pipeline_root / call["pipeline_resource_name"]
        component = call["task_spec"].component_ref.name.removeprefix("comp-")
        task = "/".join([*_iterations(call["pipeline_resource_name"]), call["task_name"]])
        began = time.time()
        outputs, status = original(**call)
        if status.name != "SUCCESS":
            failed.append(task)
            emit("broken", _name_of_failed(root / component) or call["task_name"].replace("-", "_"), task=task)
            return outputs, status
        artifacts = {
            key: Artifact(path=str(value.path), metadata=dict(value.metadata))
            for key, value in outputs.items()
            if hasattr(value, "uri")
        }
        parameters = {key: value for key, value in outputs.items() if key not in artifacts}
        # A task that ran wrote its executor's output after it began; a cached one has no folder in this run.
        ran = (root / component / "executor_output.json").exists()
        # One for each step that the task ran: each has its page.
        pages = {str(page.metadata["step"]): page for page in artifacts.values() if "step" in page.metadata}
        for name, page in pages.items() if pages else [(call["task_name"].replace("-", "_"), None)]:
            emit(
                "completed" if ran else "cached",
                name,
                task=task,
                figure=str(page.metadata.get("figure", "")) if page else "",
                seconds=time.time() - began,
                parameters=parameters,
                artifacts={**artifacts, "report": page} if page else artifacts,
            )
        return outputs, status

    task_executor.execute_single_task = watched
    try:
        yield
    finally:
        task_executor.execute_single_task = original


def _iterations(resource_name: str) -> list[str]:
    return resource_name.split("/")[1:]


def _name_of_failed(task_root: Path) -> str:
    path = task_root / "error.json"
    return ErrorReport.model_validate_json(path.read_text(encoding="utf-8")).step if path.is_file() else ""


class _Stopped(BaseException):
    """SIGTERM or the runner's death."""


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    # A second signal must not cut off the clearing up after the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def _end_group() -> None:
    # The steps' processes and shells are in this process's group: they get the signal, too.
    os.killpg(0, signal.SIGTERM)


def main(run_dir: Path) -> int:
    """Entry of the child process; returns its exit code."""
    replace_unknown_characters()
    signal.signal(signal.SIGTERM, _stop)
    lock = os.environ.get("MANYEYES_RUN_LOCK")
    if lock:
        threading.Thread(target=wait_for_runner_death, args=(Path(lock), _end_group), daemon=True).start()
    request = RunRequest.model_validate_json((run_dir / REQUEST_FILE).read_text(encoding="utf-8"))
    try:
        return _execute_tracked(run_dir, request) if request.tracked else execute(run_dir)
    except _Stopped:
        return 128 + signal.SIGTERM
    except (ManyEyesError, OSError) as error:
        record = describe_failure("start", error)
        emit("failed", "start", error=record)
        traceback.print_exception(error)
        return USER_ERROR if record.user_error else OTHER_ERROR


def _execute_tracked(run_dir: Path, request: RunRequest) -> int:
    from manyeyes.registry import tracking

    os.environ["MANYEYES_PARENT_RUN_ID"] = tracking.start_parent_run(run_dir.name, tags=request.tags)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        code = execute(run_dir)
        status = "FAILED" if code else "FINISHED"
        return code
    except _Stopped:
        status = "KILLED"
        raise
    finally:
        tracking.end_parent_run(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
