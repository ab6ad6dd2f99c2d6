"""A bundle goes through an image registry and is served from what a client pulls, by the runtime image.

Started by ``.ci/containers``, like ``test_containers.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from manyeyes.recipe import load_recipe
from manyeyes.registry.signing import sign_bundle
from manyeyes.runtime.bundle import load_bundle
from manyeyes.storage import hash_file
from tests.cli_calls import call
from tests.export_toys import change_decoder, make_toy, picture
from tests.integration.containers_engine import DOCKER, HARDENED, RUNTIME, docker
from tests.integration.servers import image_registry
from tests.invariants.test_runtime_engine import QUESTIONS
from tests.ports import free_port
from tests.serving_toys import as_uri
from tests.signing_keys import Keys, make_keys

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not RUNTIME, reason="no image: run .ci/containers, which builds it and runs this"),
    pytest.mark.skipif(
        not (shutil.which("docker-registry") and shutil.which("skopeo")),
        reason="no docker-registry or no skopeo: run .ci/services, or apt-get install docker-registry skopeo",
    ),
]
TOKENS = 12


@dataclass(frozen=True)
class Pushed:
    """A version of a model in a registry.

    Attributes:
        bundle: What was handed over.
        image: Name, tag and all, for a client.
        digest: What ``manyeyes handoff`` said of it.
        uploaded: Blobs that the registry was sent for it.
    """

    bundle: Path
    image: str
    digest: str
    uploaded: int


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "release")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Iterator[list[Pushed]]:
    """Two versions that differ in their decoder, handed over and pushed as docs/serving.md says."""
    folder = tmp_path_factory.mktemp("versions")
    first = make_toy(folder / "1", load_recipe("tiny")).bundle
    second = change_decoder(first, folder / "2" / "bundle")
    pushed = []
    with image_registry(folder) as (port, log), pytest.MonkeyPatch.context() as patch:
        for bundle in (first, second):
            sign_bundle(bundle, key_file=keys.private)
            layout = bundle.with_name("oci")
            assert call(patch, "handoff", str(bundle), str(layout), "--to", "oci", "--name", "latest") == 0
            (named,) = json.loads((layout / "index.json").read_text(encoding="utf-8"))["manifests"]
            image, before = f"127.0.0.1:{port}/team/model:{bundle.parent.name}", count_uploads(log)
            command = ["skopeo", "copy", "--all", "--preserve-digests", f"oci:{layout}:latest", f"docker://{image}"]
            done = subprocess.run([*command, "--dest-tls-verify=false"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            pushed.append(Pushed(bundle, image, named["digest"], count_uploads(log) - before))
        yield pushed


def count_uploads(log: Path) -> int:
    return len(re.findall(r'"PUT /v2/\S+/blobs/uploads/\S+ HTTP/1.1" 201 ', log.read_text(encoding="utf-8")))


def answers_of(bundle: Path) -> list[str]:
    """What the bundle answers in this process, for each picture and question."""
    loaded = load_bundle(bundle, threads=1)
    return [loaded.answer(text, images=[image], max_new_tokens=TOKENS) for image, text in asked()]


def asked() -> list[tuple[bytes, str]]:
    return [(picture(seed), text) for seed in range(3) for text in QUESTIONS]


def test_versions_share_what_is_equal_and_keep_the_digest_that_handoff_says(versions: list[Pushed]) -> None:
    first, second = versions
    # Each file, manifest and signature are a layer; each of two architectures has a configuration.
    files = sum(path.is_file() for path in first.bundle.rglob("*"))
    assert first.uploaded == files + 2
    assert second.uploaded == 3 + 2, "decoder, manifest and signature"
    print(f"blobs uploaded: {first.uploaded} for the first version, {second.uploaded} for the second")
    for version in versions:
        command = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{version.image}"]
        index = subprocess.run(command, capture_output=True, check=True).stdout
        assert f"sha256:{hashlib.sha256(index).hexdigest()}" == version.digest


def test_runtime_image_serves_what_an_engine_pulls_and_ends_when_told(
    versions: list[Pushed], keys: Keys, tmp_path: Path
) -> None:
    version = versions[1]
    models = tmp_path / "models"
    docker("pull", "--quiet", version.image)
    made = docker("create", version.image, "nothing").strip()
    try:
        docker("cp", f"{made}:/models", str(models))
    finally:
        docker("rm", made)
        docker("image", "rm", version.image)
    assert files_of(models) == files_of(version.bundle)
    keys.public.chmod(0o644)
    port = free_port()
    options = [*HARDENED, "--network=host", f"--mount=type=bind,source={keys.public},target=/key.pem,readonly"]
    options += [f"--mount=type=bind,source={models},target=/models,readonly"]
    command = ["manyeyes", "serve", "/models", "--port", str(port), "--threads", "1", "--verify-key", "/key.pem"]
    server = docker("run", "--detach", *options, RUNTIME, *command).strip()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            wait_until_ready(server, client)
            (model,) = client.models.list().data
            found = [ask(client, model.id, image, text) for image, text in asked()]
        expected = answers_of(version.bundle)
        assert found == expected != answers_of(versions[0].bundle)
        assert len(set(found)) > 3, "answers that depend on nothing prove nothing"
        docker("kill", "--signal=TERM", server)
        assert docker("wait", server) == "0\n", docker("logs", server)
        # What nobody signed is not served.
        (models / "chat.json").write_text("{}", encoding="utf-8")
        refused = subprocess.run(
            [DOCKER, "run", "--rm", *options, RUNTIME, *command], capture_output=True, text=True, check=False
        )
        assert (refused.returncode, "chat.json" in refused.stderr) == (2, True), refused.stderr
    finally:
        docker("rm", "--force", server)


def files_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def wait_until_ready(server: str, client: openai.OpenAI) -> None:
    for _ in range(600):
        try:
            client.models.list()
        except openai.APIError:
            assert docker("inspect", "--format", "{{.State.Running}}", server) == "true\n", docker("logs", server)
            time.sleep(0.2)
        else:
            return
    raise AssertionError(docker("logs", server))


def ask(client: openai.OpenAI, model: str, image: bytes, text: str) -> str:
    content = [{"type": "image_url", "image_url": {"url": as_uri(image)}}, {"type": "text", "text": text}]
    message: Any = {"role": "user", "content": content}
    answer = client.chat.completions.create(model=model, messages=[message], max_tokens=TOKENS)
    return answer.choices[0].message.content or ""
