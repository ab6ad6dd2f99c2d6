"""The Kubernetes manifests, as kubectl renders them, and the commands of infra/README.md."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.harness import trainjob
from manyeyes.harness.cluster import NODE
from manyeyes.kubeflow.workflow import _retries_off

INFRA = Path(__file__).parents[2] / "infra"
OVERLAYS = ("laptop", "cluster")
# The oldest that kubectl's kustomize here is at home in, and the newest that the schemas know.
VERSIONS = ("1.27", kubernetes_validate.latest_version().rpartition(".")[0])
KUBECTL = shutil.which("kubectl")
rendered = pytest.mark.skipif(
    KUBECTL is None, reason="no kubectl on the PATH: install Kubernetes' client, 1.27 or newer"
)


@cache
def render(overlay: str) -> list[dict[str, Any]]:
    assert KUBECTL is not None
    command = [KUBECTL, "kustomize", str(INFRA / "k8s/overlays" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of what makes them."""
    return {
        document["metadata"]["name"]: document["spec"]["template"]
        for document in render(overlay)
        if document["kind"] in ("Deployment", "StatefulSet")
    }


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def settings(overlay: str) -> dict[str, str]:
    (found,) = [
        document["data"]
        for document in render(overlay)
        if document["kind"] == "ConfigMap" and document["metadata"]["name"].startswith("mlflow-settings")
    ]
    return dict(found)


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    documents = render(overlay)
    assert len(documents) > 15
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@rendered
def test_the_validation_finds_an_unknown_field() -> None:
    document = next(document for document in render("cluster") if document["kind"] == "Deployment")
    misspelt = {**document, "spec": {**document["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_closed(overlay: str) -> None:
    assert {"mlflow", "postgres"} <= pods(overlay).keys()
    for name, pod in pods(overlay).items():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert not container["image"].endswith(":latest"), name
            assert re.search(r":[^/:]+$|@sha256:[0-9a-f]{64}$", container["image"]), name
        for container in pod["spec"]["containers"]:
            assert {"requests", "limits"} <= container["resources"].keys(), name
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), name


# As Kubeflow Pipelines 2.17.0 has it.
CONTROLLER = """
apiVersion: v1
kind: ConfigMap
metadata: {name: workflow-controller-configmap, namespace: kubeflow}
data:
  executor: "imagePullPolicy: IfNotPresent"
  workflowDefaults: |
    spec:
      ttlStrategy: {secondsAfterCompletion: 3600, secondsAfterSuccess: 3600, secondsAfterFailure: 3600}
      templateDefaults:
        retryStrategy: {limit: '2', retryPolicy: OnError}
"""


@rendered
def test_kubeflow_with_the_component_for_retries_tries_failed_pods_again_and_keeps_the_rest(tmp_path: Path) -> None:
    def render_controller(components: list[str]) -> dict[str, Any]:
        kustomization = {"resources": ["controller.yaml"], "components": components}
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        result = subprocess.run([str(KUBECTL), "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
        return dict(yaml.safe_load(result.stdout)["data"])

    (tmp_path / "controller.yaml").write_text(CONTROLLER, encoding="utf-8")
    shutil.copytree(INFRA / "k8s/components/kubeflow-retries", tmp_path / "kubeflow-retries")
    before, after = render_controller([]), render_controller(["kubeflow-retries"])
    workflows = [{"spec": yaml.safe_load(data["workflowDefaults"])["spec"]} for data in (before, after)]
    assert [_retries_off(workflow["spec"]) for workflow in workflows] == [True, False]
    del workflows[0]["spec"]["templateDefaults"]
    assert workflows[0] == workflows[1]
    assert {**before, "workflowDefaults": ""} == {**after, "workflowDefaults": ""}


@rendered
def test_the_component_for_trainjobs_grants_what_the_step_asks_and_lets_nodes_talk_to_each_other(
    tmp_path: Path,
) -> None:
    shutil.copytree(INFRA / "k8s/components/trainjob", tmp_path / "trainjob")
    kustomization = {"namespace": "runs", "components": ["trainjob"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    result = subprocess.run([str(KUBECTL), "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    made = {document["kind"]: document for document in yaml.safe_load_all(result.stdout)}
    for kind in ("Role", "RoleBinding", "NetworkPolicy"):
        for version in VERSIONS:
            kubernetes_validate.validate(made[kind], version, strict=True)
    granted = {
        (verb, resource, group)
        for rule in made["Role"]["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    }
    assert granted == {
        (verb, f"{resource}/{sub}" if sub else resource, group) for verb, resource, group, sub in trainjob.RIGHTS
    }
    assert made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == {trainjob.POD_LABEL: "true"}
    runtime = made["TrainingRuntime"]
    assert runtime["metadata"]["name"] == trainjob.RUNTIME
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == NODE
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["template"]["spec"]["backoffLimit"] == 0, "a job restarts nothing by itself"
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert [container["name"] for container in pod["containers"]] == [NODE]


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_never_written_down(overlay: str) -> None:
    assert not [document for document in render(overlay) if document["kind"] == "Secret"]
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    for pod in pods(overlay).values():
        for variable in [entry for container in containers(pod) for entry in container.get("env", ())]:
            if re.search("PASSWORD|SECRET|ACCESS_KEY", variable["name"]):
                secret = variable["valueFrom"]["secretKeyRef"]
                assert f"kubectl create secret generic {secret['name']} " in readme
                assert f"--from-literal={secret['key']}=" in readme
    assert "password" not in settings(overlay)["MLFLOW_BACKEND_STORE_URI"]
    assert re.fullmatch(r"postgresql\+psycopg2://[^:/]+@.*", settings(overlay)["MLFLOW_BACKEND_STORE_URI"])


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clients_and_probes_call_mlflow_by_a_name_that_it_goes_by(overlay: str) -> None:
    allowed = settings(overlay)["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "*" not in allowed
    (server,) = pods(overlay)["mlflow"]["spec"]["containers"]
    for kind in ("startupProbe", "readinessProbe"):
        (header,) = server[kind]["httpGet"]["httpHeaders"]
        assert header["name"] == "Host"
        assert header["value"] in allowed
        assert server[kind]["httpGet"]["path"] != "/health"
    profile = yaml.safe_load((INFRA / f"profiles/{overlay}.yaml").read_text(encoding="utf-8"))
    assert profile["env"]["MLFLOW_TRACKING_URI"].removeprefix("http://") in allowed


@rendered
def test_both_databases_of_mlflow_are_the_one_that_the_component_makes() -> None:
    (auth,) = [
        document["data"]["basic_auth.ini"]
        for document in render("cluster")
        if document["metadata"]["name"].startswith("mlflow-auth")
    ]
    uri = settings("cluster")["MLFLOW_BACKEND_STORE_URI"]
    assert f"database_uri = {uri}\n" in auth
    (server,) = pods("cluster")["postgres"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in server["env"]}
    assert uri.endswith(f"//{environment['POSTGRES_USER']}@postgres:5432/{environment['POSTGRES_DB']}")


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_let_through_that_no_policy_names(overlay: str) -> None:
    policies = [document for document in render(overlay) if document["kind"] == "NetworkPolicy"]
    denied = [policy for policy in policies if policy["metadata"]["name"] == "default-deny"]
    assert [policy["metadata"]["namespace"] for policy in denied] == ["manyeyes"]
    assert denied[0]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies:
        for rule in [*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())]:
            assert rule["ports"], policy["metadata"]["name"]
            for peer in [*rule.get("to", ()), *rule.get("from", ())]:
                assert peer, policy["metadata"]["name"]
                if "ipBlock" in peer:
                    assert peer["ipBlock"]["except"] == ["169.254.169.254/32"]


@rendered
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_a_run_may_do_is_named_one_by_one(overlay: str) -> None:
    roles = [document for document in render(overlay) if document["kind"] in ("Role", "ClusterRole")]
    assert [role["kind"] for role in roles] == ["Role"]
    for rule in roles[0]["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        if "secrets" in rule["resources"]:
            assert (rule["resourceNames"], rule["verbs"]) == (["mlpipeline-minio-artifact"], ["get"])
    (binding,) = [document for document in render(overlay) if document["kind"] == "RoleBinding"]
    (subject,) = binding["subjects"]
    accounts = {
        (document["metadata"]["namespace"], document["metadata"]["name"])
        for document in render(overlay)
        if document["kind"] == "ServiceAccount"
    }
    assert (subject.get("namespace"), subject["name"]) in accounts
    assert binding["metadata"]["namespace"] == roles[0]["metadata"]["namespace"] == subject["namespace"]


@rendered
def test_the_cluster_has_what_its_profile_names() -> None:
    profile = yaml.safe_load((INFRA / "profiles/cluster.yaml").read_text(encoding="utf-8"))
    claims = {
        (document["metadata"]["namespace"], document["metadata"]["name"])
        for document in render("cluster")
        if document["kind"] == "PersistentVolumeClaim"
    }
    named = {("manyeyes-runs", volume["claim"]) for volume in profile["volumes"] if "claim" in volume}
    assert named
    assert named <= claims
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    for secret in profile["secrets"]:
        if not secret.get("optional"):
            assert f"kubectl create secret generic {secret['name']} " in readme


def read_commands() -> list[list[str]]:
    """Each ``manyeyes`` command of the README's code blocks, as words."""
    text = (INFRA / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.split(" ")[0] in ("manyeyes", ".venv/bin/manyeyes")
    ]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, and those words."""
    command: click.Command = cli
    names: list[str] = []
    for word in words:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"no command {' '.join([*names, word])}"
        command, names = found, [*names, word]
    return command, names


def test_every_command_of_the_readme_exists() -> None:
    commands = read_commands()
    assert {tuple(find_command(words)[1]) for words in commands} >= {
        ("pipeline", "upload"),
        ("pipeline", "run"),
        ("pipeline", "status"),
        ("promote",),
        ("rollback",),
        ("pull",),
    }
    for words in commands:
        command, names = find_command(words)
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words
        result = CliRunner().invoke(cli, [*names, "--help"])
        assert result.exit_code == 0, result.output


def test_every_file_that_the_readme_names_exists() -> None:
    text = (INFRA / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])(?:infra/)?(k8s/[\w./-]+|profiles/|images/|dvc-remote/)", text))
    named |= {target.partition("#")[0] for target in re.findall(r"\]\(([^)#]+[^)]*)\)", text)}
    assert len(named) > 8
    for path in named:
        assert (INFRA / path.rstrip(".")).exists(), path
