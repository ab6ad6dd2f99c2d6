"""Uploading pipelines and starting runs on an endpoint, over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from manyeyes.cli import main as command_line
from manyeyes.data.curation.recipe import load_curation_recipe, read_curation_text
from manyeyes.data.snapshot import read_dvc_file
from manyeyes.errors import EndpointError, PipelineError, RecipeError
from manyeyes.kubeflow.compact import step_of
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.endpoint_runs import run_parameters
from manyeyes.kubeflow.pipeline import GIT_COMMIT
from manyeyes.kubeflow.run import git_state, named_commit
from manyeyes.kubeflow.uploading import code_state, form_defaults, upload_pipeline, version_name
from manyeyes.recipe import load_recipe, read_recipe_text
from tests.pipelines.checkout import ROOT
from tests.pipelines.endpoint_toys import DIGEST, IMAGE, Answer, add_version, started_run
from tests.pipelines.kfp_server import Fault, Kubeflow

# --- upload ----------------------------------------------------------------------------------------------------------


def test_upload_makes_pipeline_and_version_and_the_second_time_does_nothing(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow
) -> None:
    upload = ("pipeline", "upload", "train", "--image", IMAGE, "--profile", "cluster", "--data-remote", "s3://data/dvc")
    first = manyeyes(*upload)
    assert first.code == 0, first.err
    md5 = read_dvc_file(ROOT / "data.dvc").md5
    assert f"the form offers snapshot {md5} in s3://data/dvc" in first.out
    assert "uploaded" in first.out
    (version,) = kubeflow.versions
    commit, dirty = code_state(ROOT)
    assert commit is not None
    assert version["display_name"].startswith(f"{command_line.__version__}-{commit[:12]}")
    assert version["display_name"].endswith("-0123456789ab")
    assert ("-dirty-" in version["display_name"]) == dirty
    executors = version["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {IMAGE}
    assert version["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]
    named = {step_of(executor) for executor in executors.values() if GIT_COMMIT in json.dumps(executor)}
    assert named == {"register"}
    register = next(executor for executor in executors.values() if step_of(executor) == "register")
    environment = {variable["name"]: variable["value"] for variable in register["container"]["env"]}
    assert environment[GIT_COMMIT] == f"{commit}-dirty" if dirty else commit
    assert json.dumps(version["pipeline_spec"]["pipeline_spec"]).count(commit) == 1, "no input of a step names it"

    form = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert (form["data_md5"]["defaultValue"], form["data_remote"]["defaultValue"]) == (md5, "s3://data/dvc")

    second = manyeyes(*upload)
    assert second.code == 0
    assert "was there already" in second.out
    assert len(kubeflow.pipelines) == len(kubeflow.versions) == 1
    assert kubeflow.calls("POST", "upload_version") == 1


@pytest.mark.parametrize("image", ["", "manyeyes-steps:0.1.0", "manyeyes-steps@sha256:abc"])
def test_upload_refuses_an_image_without_digest_before_it_asks_anything(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow, image: str
) -> None:
    answer = manyeyes("pipeline", "upload", "train", "--image", image)
    assert answer.code == 2
    assert f'image is "{image}"' in answer.err
    assert "@sha256:" in answer.err
    assert kubeflow.requests == []


def test_upload_names_the_nearest_pipeline(manyeyes: Callable[..., Answer]) -> None:
    answer = manyeyes("pipeline", "upload", "trian", "--image", IMAGE)
    assert answer.code == 2
    assert 'Did you mean "train"?' in answer.err


def test_a_registered_version_names_the_commit_and_says_that_the_tree_was_dirty(tmp_path: Path) -> None:
    assert named_commit(*git_state(tmp_path)) == ""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "data.dvc").write_text("one", encoding="utf-8")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert named_commit(*git_state(tmp_path)) == commit
    (tmp_path / "data.dvc").write_text("two", encoding="utf-8")
    assert named_commit(*git_state(tmp_path)) == f"{commit}-dirty"
    assert named_commit(*code_state(tmp_path)) == f"{commit}-dirty"
    assert named_commit(*git_state(tmp_path, "models")) == commit


def toy_checkout_of(folder: Path, url: str) -> Path:
    """As much of a checkout as says which snapshot it is."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(
        f"[core]\n    remote = there\n['remote \"there\"']\n    url = {url}\n", encoding="utf-8"
    )
    shutil.copyfile(ROOT / "data.dvc", folder / "data.dvc")
    return folder


def toy_profile(folder: Path, data_remote: str) -> str:
    path = folder / "profile.yaml"
    path.write_text(
        f"description: of a test\ndata_remote: {data_remote}\n"
        "volumes: [{path: /work/data, claim: data}, {path: /work/cache, size: 1Gi}]\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.mark.parametrize(
    ("own", "of_profile", "given", "expected"),
    [
        ("s3://own/dvc", "", "", "s3://own/dvc"),
        ("s3://own/dvc", "s3://profile/dvc", "", "s3://own/dvc"),
        ("../folder", "s3://profile/dvc", "", "s3://profile/dvc"),
        ("../folder", "/work/data/dvc", "", "/work/data/dvc"),
        ("s3://own/dvc", "s3://profile/dvc", "s3://given/dvc", "s3://given/dvc"),
        ("../folder", "s3://profile/dvc", "/work/data", "/work/data"),
        ("hub:own/data@v1", "s3://profile/dvc", "", "hub:own/data@v1"),
        ("../folder", "hub:team/data@0123abc", "", "hub:team/data@0123abc"),
        ("s3://own/dvc", "s3://profile/dvc", "hub:team/data@0123abc", "hub:team/data@0123abc"),
    ],
)
def test_the_form_offers_the_remote_that_pods_can_read(
    tmp_path: Path, own: str, of_profile: str, given: str, expected: str
) -> None:
    profile = toy_profile(tmp_path, of_profile) if of_profile else ""
    found = form_defaults(toy_checkout_of(tmp_path, own), profile=profile, data_remote=given)
    assert found == {"data_md5": read_dvc_file(ROOT / "data.dvc").md5, "data_remote": expected}


@pytest.mark.parametrize(
    ("own", "of_profile", "given", "named"),
    [
        ("../folder", "", "", "the checkout's default DVC remote"),
        ("gs://bucket/dvc", "", "", "the checkout's default DVC remote"),
        ("ssh://host/dvc", "", "", "which steps cannot read"),
        ("../folder", "/home/me/dvc", "", "data_remote is"),
        ("../folder", "/work/cache/dvc", "", "a folder of this machine"),
        ("s3://own/dvc", "", "infra/dvc-remote", "--data-remote is"),
        ("s3://own/dvc", "", "/work/data/dvc", "--data-remote is"),
        ("s3://own/dvc", "", "s3:///dvc", "--data-remote is"),
        ("s3://own/dvc", "", "hub:team/data", "which steps cannot read"),
    ],
)
def test_a_remote_that_pods_cannot_read_is_refused(
    tmp_path: Path, own: str, of_profile: str, given: str, named: str
) -> None:
    profile = toy_profile(tmp_path, of_profile) if of_profile else ""
    with pytest.raises(PipelineError, match="dvc remote add --default s3") as caught:
        form_defaults(toy_checkout_of(tmp_path, own), profile=profile, data_remote=given)
    assert named in caught.value.found


def test_upload_with_a_folder_as_remote_asks_the_endpoint_nothing(
    manyeyes: Callable[..., Answer], kubeflow: Kubeflow
) -> None:
    answer = manyeyes("pipeline", "upload", "--image", IMAGE, "--profile", "cluster")
    assert answer.code == 2
    assert "a folder of this machine" in answer.err
    assert kubeflow.requests == []


def test_a_pipeline_without_data_needs_no_remote(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    assert manyeyes("pipeline", "upload", "rollback", "--image", IMAGE).code == 0
    assert len(kubeflow.versions) == 1
    answer = manyeyes("pipeline", "upload", "rollback", "--image", IMAGE, "--data-remote", "s3://data/dvc")
    assert answer.code == 2
    assert "Leave it out" in answer.err


@pytest.mark.usefixtures("quick_compiler")
def test_upload_refuses_other_contents_under_the_same_name(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    kubeflow.versions[0]["description"] = "profile cluster; sha256 0000000000000000"
    with pytest.raises(PipelineError, match="is there with other contents"):
        upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)


def test_version_name_tells_two_uncommitted_changes_apart() -> None:
    clean = version_name("146dd53c0ffee0", DIGEST)
    assert clean.split("-")[1:] == ["146dd53c0ffe", "0123456789ab"]
    assert version_name("146dd53c0ffee0", DIGEST, changed="a" * 16) != version_name(
        "146dd53c0ffee0", DIGEST, changed="b" * 16
    )


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("takes_effect", [True, False])
@pytest.mark.parametrize("kind", ["drop", "timeout", 500, 502])
def test_upload_cut_off_in_the_middle_leaves_one_version(
    endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str, takes_effect: bool
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [
        Fault("POST", "/pipelines$", kind, takes_effect=takes_effect),
        Fault("POST", "upload_version", kind, takes_effect=takes_effect),
    ]
    done = upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert done.new
    assert len(kubeflow.pipelines) == len(kubeflow.versions) == 1
    assert kubeflow.calls("POST", "upload_version") == (1 if takes_effect else 2)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("status", [429, 503])
def test_busy_endpoint_is_asked_again(endpoint: Endpoint, kubeflow: Kubeflow, status: int) -> None:
    kubeflow.faults = [Fault("POST", "upload_version", status, times=2), Fault("GET", "/pipelines$", status, times=2)]
    upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert len(kubeflow.versions) == 1


@pytest.mark.usefixtures("quick_compiler")
def test_somebody_else_uploads_the_same_version_at_the_same_time(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    kubeflow.faults = [Fault("POST", "upload_version", 409, takes_effect=True)]
    done = upload_pipeline(endpoint, "train", image=IMAGE, root=ROOT)
    assert not done.new
    assert len(kubeflow.versions) == 1


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_passes_parameters_and_recipe_fields(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    answer = manyeyes(
        *("pipeline", "run", "train", "--param", "recipe=large", "--param", "rounds=3"),
        *("--set", "stages.sft.epochs=1", "--set", "model.fusion.strategy=channel-concat"),
    )
    assert answer.code == 0, answer.err
    (run,) = kubeflow.runs
    assert run["runtime_config"]["parameters"] == {
        "recipe": "large",
        "rounds": 3,
        "recipe_overrides": "stages.sft.epochs=1\nmodel.fusion.strategy=channel-concat",
    }
    assert run["pipeline_version_reference"] == {"pipeline_id": "p1", "pipeline_version_id": "v1"}
    assert run["run_id"] in answer.out
    assert "--follow" in answer.out


FORM = {
    "recipe": {"parameterType": "STRING", "defaultValue": "tiny", "literals": ["tiny", "large"]},
    "rounds": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
    "benchmarks": {"parameterType": "LIST", "defaultValue": []},
    "threshold": {"parameterType": "NUMBER_DOUBLE", "defaultValue": 0.5},
    "force": {"parameterType": "BOOLEAN", "defaultValue": False},
}


def test_parameters_get_the_types_of_the_form() -> None:
    given = ["rounds=2", "benchmarks=[a, b]", "threshold=1", "force=true"]
    assert run_parameters(FORM, given=given) == {
        "rounds": 2,
        "benchmarks": ["a", "b"],
        "threshold": 1,
        "force": True,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("recipes=tiny", 'Did you mean "recipe"?'),
        ("recipe=tinny", 'Did you mean "tiny"?'),
        ("rounds=many", "NUMBER_INTEGER"),
        ("rounds=true", "NUMBER_INTEGER"),
        ("force=1", "BOOLEAN"),
        ("benchmarks=a", "LIST"),
        ("recipe", "name=value"),
    ],
)
def test_wrong_parameter_says_what_is_right(pair: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        run_parameters(FORM, given=[pair])
    assert message in str(caught.value)


def test_a_value_that_no_command_line_takes_is_refused_before_anything_starts() -> None:
    with pytest.raises(PipelineError, match="65,536 at most"):
        run_parameters({"text": {"parameterType": "STRING"}}, given=[f"text={'x' * 200_000}"])


def test_a_curation_recipe_of_ones_own_travels_as_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ncap: 7\nduplicates: {near: {}}\n", encoding="utf-8")
    form = {
        "curate_recipe": {"literals": ["clean"], "defaultValue": "clean"},
        "curate_recipe_text": {"defaultValue": ""},
    }
    assert run_parameters(form, given=["curate_recipe=clean"]) == {"curate_recipe": "clean"}
    values = run_parameters(form, given=[f"curate_recipe={file}"])
    assert list(values) == ["curate_recipe_text"]
    assert read_curation_text(values["curate_recipe_text"]) == load_curation_recipe(str(file))
    file.write_text("{name: mine, capp: 7}", encoding="utf-8")
    with pytest.raises(RecipeError, match="capp; no such field"):
        run_parameters(form, given=[f"curate_recipe={file}"])


def test_recipe_file_travels_as_text_and_a_shipped_one_by_name(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("extends: tiny\nname: own\n", encoding="utf-8")
    values = run_parameters({**FORM, "recipe_text": {"defaultValue": ""}}, given=[], recipe=str(file))
    assert list(values) == ["recipe_text"]
    text = values["recipe_text"]
    assert read_recipe_text(text) == load_recipe(str(file))
    # Each quotation mark of it takes eight bytes, six times in each step that takes it.
    assert text.count('"') == 0
    assert "\n" not in text
    assert len(text) < len(load_recipe(str(file)).canonical_json()) / 2
    assert run_parameters(FORM, given=[], recipe="large") == {"recipe": "large"}
    with pytest.raises(PipelineError, match="takes recipe_text"):
        run_parameters(FORM, given=[], recipe=str(file))
    with pytest.raises(PipelineError, match='Did you mean "tiny"'):
        run_parameters(FORM, given=[], recipe="tinny")


def test_parameter_without_default_must_be_given() -> None:
    with pytest.raises(PipelineError, match="reason not given"):
        run_parameters({"reason": {"parameterType": "STRING"}}, given=[])
    with pytest.raises(PipelineError, match="takes recipe_overrides"):
        run_parameters(FORM, given=[], assignments=["a.b=1"])
    with pytest.raises(RecipeError, match="path=value"):
        run_parameters({"recipe_overrides": {"defaultValue": ""}}, given=[], assignments=["epochs"])


def test_run_of_a_pipeline_that_is_not_there_says_how_to_upload_it(manyeyes: Callable[..., Answer]) -> None:
    answer = manyeyes("pipeline", "run", "train")
    assert answer.code == 2
    assert "manyeyes pipeline upload train" in answer.err


def test_run_of_an_unknown_version_lists_what_there_is(manyeyes: Callable[..., Answer], kubeflow: Kubeflow) -> None:
    add_version(kubeflow)
    answer = manyeyes("pipeline", "run", "train", "--version", "0.1.0-abc-dee")
    assert answer.code == 2
    assert 'Did you mean "0.1.0-abc-def"?' in answer.err


@pytest.mark.parametrize(
    ("kind", "takes_effect"),
    [
        ("drop", True),
        ("drop", False),
        (500, True),
        (502, False),
        (504, True),
        ("timeout", True),
        (429, False),
        (503, False),
    ],
)
def test_run_whose_answer_is_lost_is_started_once(
    endpoint: Endpoint, kubeflow: Kubeflow, kind: int | str, takes_effect: bool
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/runs$", kind, takes_effect=takes_effect)]
    run, _ = started_run(endpoint, kubeflow)
    assert [each["run_id"] for each in kubeflow.runs] == [run.run_id]


def test_run_of_unknown_fate_is_not_started_again_until_its_name_is_given(
    endpoint: Endpoint, kubeflow: Kubeflow
) -> None:
    kubeflow.sleep_s = 0.8
    kubeflow.faults = [Fault("POST", "/runs$", "timeout")]
    with pytest.raises(EndpointError) as caught:
        started_run(endpoint, kubeflow, name="nightly-7")
    assert "--name nightly-7" in caught.value.do
    assert caught.value.retry
    assert kubeflow.runs == []
    assert started_run(endpoint, kubeflow, name="nightly-7")[1]
    assert not started_run(endpoint, kubeflow, name="nightly-7")[1]
    assert len(kubeflow.runs) == 1


def test_experiment_is_made_once(endpoint: Endpoint, kubeflow: Kubeflow) -> None:
    kubeflow.faults = [Fault("POST", "/experiments$", "drop", takes_effect=True)]
    started_run(endpoint, kubeflow)
    started_run(endpoint, kubeflow)
    assert [each["display_name"] for each in kubeflow.experiments] == ["manyeyes"]
    assert len(kubeflow.runs) == 2
