from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyeyes.errors import PipelineError
from manyeyes.harness.base import Reporter, Step
from manyeyes.kubeflow.compact import compact_source
from manyeyes.kubeflow.pipeline import PIPELINES, compile_pipeline
from manyeyes.recipe import list_recipes, load_recipe
from tests.pinned_toys import pin
from tests.pipelines.checkout import ROOT


@pytest.mark.parametrize("name", PIPELINES)
def test_committed_pipeline_is_current(name: str, tmp_path: Path) -> None:
    fresh = compile_pipeline(name, tmp_path / f"{name}.yaml", root=ROOT)
    committed = ROOT / "pipelines" / "compiled" / f"{name}.yaml"
    assert committed.read_text(encoding="utf-8") == fresh.read_text(encoding="utf-8"), "run: manyeyes pipeline compile"


def test_every_pipeline_file_is_in_the_table_and_compiled() -> None:
    """A module that is left out of the table could not be compiled, uploaded or run by name."""
    modules = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
    assert set(PIPELINES) == modules
    assert {path.stem for path in (ROOT / "pipelines" / "compiled").glob("*.yaml")} == modules
    for name, place in PIPELINES.items():
        assert place == f"pipelines.{name}:{name}"


def form_of(name: str) -> dict[str, Any]:
    text = (ROOT / "pipelines" / "compiled" / f"{name}.yaml").read_text(encoding="utf-8")
    spec = next(yaml.load_all(text, Loader=yaml.CSafeLoader))
    found: dict[str, Any] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_form_is_short_described_and_reads_well_in_alphabetical_order(name: str) -> None:
    """The UI sorts the fields by name and shows no group: what belongs together must share a prefix."""
    form = form_of(name)
    assert len(form) <= 12
    for parameter, definition in form.items():
        assert definition.get("description", "").strip(), f"{parameter} is not described"
    shown = [parameter.partition("_")[0] for parameter in sorted(form)]
    runs_of_a_prefix = [prefix for prefix, _ in groupby(shown)]
    assert len(runs_of_a_prefix) == len(set(runs_of_a_prefix)), f"{sorted(form)} mixes its groups"
    # One spelling for one thing, on every form.
    assert not {"model_name", "registered_model", "md5", "remote", "overrides"} & set(form)


@pytest.mark.parametrize("name", PIPELINES)
def test_recipe_is_a_drop_down_wherever_it_is_asked_for(name: str) -> None:
    form = form_of(name)
    if "recipe" in form:
        assert form["recipe"]["literals"] == list_recipes()
        assert form["recipe"]["defaultValue"] in list_recipes()


@pytest.mark.parametrize("image", ["manyeyes-steps:0.1.0", "manyeyes-steps", "a@sha256:123", "a@sha256:" + "g" * 64])
def test_image_without_a_whole_digest_is_refused(image: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="digest"):
        compile_pipeline("train", tmp_path / "train.yaml", root=ROOT, image=image)
    assert not list(tmp_path.iterdir())


def test_image_goes_into_every_step_and_its_digest_as_code_digest_into_the_one_that_pins_it(tmp_path: Path) -> None:
    image = "registry.example:5000/team/steps@sha256:" + "7" * 64
    path = compile_pipeline("train", tmp_path / "train.yaml", root=ROOT, image=image)
    spec = next(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    for label, executor in spec["deploymentSpec"]["executors"].items():
        assert executor["container"]["image"] == image
        # The others have it in what is pinned for them.
        expected = [{"name": "MANYEYES_IMAGE_DIGEST", "value": "sha256:" + "7" * 64}]
        env = [own for own in executor["container"].get("env", []) if own["name"] != "MANYEYES_WORKFLOW_SIZES"]
        assert env == (expected if label == "exec-preflight" else []), label


def test_only_what_depends_on_the_world_outside_is_never_cached() -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text(encoding="utf-8"))
    groups = [spec["root"]["dag"], *(part["dag"] for part in spec["components"].values() if "dag" in part)]
    tasks = {name: task for group in groups for name, task in group["tasks"].items()}
    leaves = {name for name, task in tasks.items() if "dag" not in spec["components"][task["componentRef"]["name"]]}
    uncached = {name for name in leaves if not tasks[name]["cachingOptions"].get("enableCache")}
    assert uncached == {"preflight", "register", "summarise-run"}


def test_later_steps_take_what_their_cache_key_needs_and_nothing_that_changes_between_runs() -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text(encoding="utf-8"))
    for name, component in spec["components"].items():
        if "executorLabel" not in component or name in ("comp-preflight", "comp-summarise-run"):
            continue
        parameters = set(component["inputDefinitions"]["parameters"])
        assert "pinned" in parameters, name
        assert parameters <= {"pinned", "encoder", "kind", "registry_model"}, name


def test_a_run_is_pinned_in_the_order_of_preflights_outputs() -> None:
    from components.preflight.component import preflight as component
    from manyeyes.steps.resolve_data import resolve_data

    given = {"data_md5": "a" * 32, "data_remote": "nowhere"}
    values = resolve_data(Reporter("resolve_data"), recipe="tiny", **given).values
    assert tuple(values) == component.python_func.__annotations__["return"]._fields


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_is_pinned_for_a_step_that_a_pipeline_has_not(name: str) -> None:
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / f"{name}.yaml").read_text(encoding="utf-8"))
    steps = {part.removeprefix("comp-").replace("-", "_") for part in spec["components"]}
    for part, component in spec["components"].items():
        outputs = component.get("outputDefinitions", {}).get("parameters", {})
        pinned = set(outputs) - {"name", "version", "aliases", "verdict"} if part == "comp-preflight" else set()
        assert pinned - {"registry_model"} <= steps, part
        if "executorLabel" in component and outputs:
            source = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]["command"][-1]
            (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
            assert function.returns is not None
            fields = [ast.literal_eval(field.elts[0]) for field in function.returns.args[1].elts]  # type: ignore[attr-defined]
            assert set(fields) == set(outputs), part


def test_components_name_the_image_of_this_version() -> None:
    from manyeyes import __version__

    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / "train.yaml").read_text(encoding="utf-8"))
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {f"manyeyes-steps:{__version__}"}


@pytest.mark.parametrize("name", PIPELINES)
def test_pods_get_no_words_that_only_people_read(name: str) -> None:
    """Six copies of a step's source and definition lie in the status of the workflow."""
    spec = yaml.safe_load((ROOT / "pipelines" / "compiled" / f"{name}.yaml").read_text(encoding="utf-8"))
    for executor in spec["deploymentSpec"]["executors"].values():
        *shell, source = executor["container"]["command"]
        assert "    " not in "".join(shell)
        (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        assert ast.get_docstring(function) is None
        assert "#" not in source
    for component in spec["components"].values():
        assert "description" not in yaml.safe_dump(component)


def test_source_of_a_step_is_its_component_without_docstring_and_unused_imports() -> None:
    source = (
        "\nimport kfp\nfrom kfp import dsl\nfrom kfp.dsl import *\nfrom typing import *\n\n"
        "def step(\n    name: str,  # noqa: ARG001\n    report: dsl.Output[dsl.HTML],\n) -> NamedTuple(\n"
        '    "Outputs", [("a", str)]\n):\n    """Do it.\n\n    Args:\n        name: A name.\n    """\n'
        "    from pathlib import Path\n\n    return (str(Path(report.path) / name),)\n\n"
    )
    assert compact_source(source) == (
        "from kfp import dsl\nfrom typing import NamedTuple\n"
        "def step(name: str, report: dsl.Output[dsl.HTML]) -> NamedTuple('Outputs', [('a', str)]):\n"
        "    from pathlib import Path\n    return (str(Path(report.path) / name),)\n"
    )


def test_a_pod_of_a_cluster_runs_the_source_in_its_command(tmp_path: Path) -> None:
    image = "registry.example/steps@sha256:" + "7" * 64
    path = compile_pipeline("ablate", tmp_path / "ablate.yaml", root=ROOT, image=image)
    spec = next(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    container = spec["deploymentSpec"]["executors"]["exec-plan-ablation"]["container"]
    outputs = {
        "parameters": {"batches": {"outputFile": str(tmp_path / "batches")}},
        "artifacts": {
            "report": {
                "artifacts": [
                    {"name": "report", "type": {"schemaTitle": "system.HTML"}, "uri": f"{tmp_path}/made/report"}
                ]
            }
        },
        "outputFile": str(tmp_path / "output.json"),
    }
    values = {"pinned": pin(load_recipe("tiny"), "plan_ablation"), "ablate_grid": "seed=[1, 2]"}
    given = json.dumps({"inputs": {"parameterValues": values}, "outputs": outputs})
    python, *command = [given if part == "{{$}}" else part for part in (*container["command"], *container["args"])]
    assert python == "python3"
    (tmp_path / "made").mkdir()
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "output.json").read_text(encoding="utf-8"))
    assert len(written["parameterValues"]["batches"]) == 2
    assert (tmp_path / "made" / "report").is_file()


def test_a_pod_of_a_cluster_knows_its_run_by_where_its_outputs_go(tmp_path: Path) -> None:
    source = (
        "def told(out: str):\n    import os\n    from pathlib import Path\n"
        "    Path(out).write_text(os.environ['MANYEYES_PIPELINE_RUN'], encoding='utf-8')\n"
    )
    place = {"outputFile": f"{tmp_path}/v2/artifacts/train/run-1/told/execution-1/output_metadata.json"}
    given = json.dumps({"inputs": {"parameterValues": {"out": str(tmp_path / "run")}}, "outputs": place})
    command = ["-m", "manyeyes.kubeflow.component", source, "--executor_input", given, "--function_to_execute", "told"]
    inherited = {key: value for key, value in os.environ.items() if key != "MANYEYES_PIPELINE_RUN"}
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=inherited, check=True)
    assert (tmp_path / "run").read_text(encoding="utf-8") == "run-1"


def test_a_further_attempt_in_a_pod_keeps_what_the_gate_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyeyes.harness.base import LocalArtifact, StepResult
    from manyeyes.kubeflow import component
    from manyeyes.steps import gate as gate_step

    judged: list[str] = []

    def run(step: Step, *, report: LocalArtifact, outputs: dict[str, LocalArtifact], **_: Any) -> StepResult:
        judged.append(step.name)
        report.metadata["step"] = step.name
        outputs["gate"].metadata["verdict"] = "passed"
        return StepResult("passed")

    monkeypatch.setattr(component, "run_step", run)
    for _attempt in range(2):
        page, decision = LocalArtifact(str(tmp_path / "gate_report")), LocalArtifact(str(tmp_path / "gate"))
        arguments = {"gate_report": page, "gate": decision, "registry_model": "m"}
        component.run_component("gate", arguments, report="gate_report", once=True)
        assert (page.metadata, decision.metadata) == ({"step": "gate"}, {"verdict": "passed"})
    assert judged == [gate_step.STEP.name]
