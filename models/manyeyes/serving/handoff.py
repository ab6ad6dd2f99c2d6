"""Hands a bundle to other people's servers: an OCI image of its files, a Deployment, a KServe InferenceService.

The OCI image is written as the image layout of the standard (https://github.com/opencontainers/image-spec): a few JSON
files and one layer a file, which any client pushes. Equal files are equal layers, so two versions share what is equal.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import yaml

from manyeyes import __version__
from manyeyes.errors import BundleError
from manyeyes.registry.signing import BESIDE
from manyeyes.runtime.bundle_contents import (
    DEFAULT_VARIANT,
    MANIFEST,
    check_files,
    choose_variant,
    needed_files,
    pulled_variants,
    read_manifest,
)
from manyeyes.storage import hash_file, link_or_copy, new_folder

MODELS = "/models"
PORT = 8080
_USER = 10001
_GRACE_S = 45  # above the seconds that the server gives to running answers
_ARCHITECTURES = ("amd64", "arm64")
_OCI = "application/vnd.oci.image"


def write_oci_layout(bundle: Path, out: Path, *, tag: str, variant: str | None = None) -> str:
    """Write an OCI image layout with the bundle's files under ``/models``, for each architecture the same layers.

    Args:
        bundle: Its folder.
        out: Folder to write; appears when it is complete.
        tag: Of the image in the layout.
        variant: Its files alone; all when left out.

    Returns:
        Digest of the image.

    Raises:
        BundleError: A file is missing or is not what the manifest says, or there is no such variant.
        StorageError: No space, or no permission.
    """
    manifest, files = _checked_files(bundle, variant)
    with new_folder(out) as folder:
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        layers = [_write_layer(bundle, name, blobs) for name in _names(bundle, files)]
        images = []
        for architecture in _ARCHITECTURES:
            config = {
                "architecture": architecture,
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
                "history": [{"created_by": layer["annotations"]["org.opencontainers.image.title"]} for layer in layers],
            }
            image: dict[str, Any] = {
                "schemaVersion": 2,
                "mediaType": f"{_OCI}.manifest.v1+json",
                "config": _write_json(config, blobs, kind=f"{_OCI}.config.v1+json"),
                "layers": layers,
                "annotations": {"manyeyes.bundle": manifest["digest"], "manyeyes.recipe": manifest["recipe"]},
            }
            platform = {"architecture": architecture, "os": "linux"}
            images.append({**_write_json(image, blobs, kind=image["mediaType"]), "platform": platform})
        index: dict[str, Any] = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": images}
        whole = _write_json(index, blobs, kind=index["mediaType"])
        named = {**whole, "annotations": {"org.opencontainers.image.ref.name": tag}}
        (folder / "index.json").write_text(json.dumps({**index, "manifests": [named]}), encoding="utf-8")
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}', encoding="utf-8")
    return str(whole["digest"])


def _names(bundle: Path, files: dict[str, Any]) -> list[str]:
    """Files to hand on, with card, SBOM and signature where the bundle has them."""
    return sorted([*files, MANIFEST, *(name for name in BESIDE if (bundle / name).is_file())])


def _checked_files(bundle: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest, and what it says of the files to hand on, which are as it says."""
    manifest = read_manifest(bundle)
    # A folder that was pulled for one variant alone has no other files.
    if variant is None and DEFAULT_VARIANT not in (there := pulled_variants(bundle, manifest)):
        variant = there[0]
    files = manifest["files"]
    if variant is not None:
        files = needed_files(manifest, choose_variant(bundle, manifest, variant)[1])
    check_files(bundle, files)
    return manifest, files


def _write_layer(bundle: Path, name: str, blobs: Path) -> dict[str, Any]:
    """One file as a layer; weights do not compress. Nothing of the machine or the time is in it."""
    file, started = bundle / name, blobs / "layer"
    with started.open("wb") as target, tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(f"{MODELS[1:]}/{name}")
        entry.size, entry.mode = file.stat().st_size, 0o644
        with file.open("rb") as source:
            tar.addfile(entry, source)
    digest = hash_file(started)
    size = started.stat().st_size
    started.rename(blobs / digest)
    return {
        "mediaType": f"{_OCI}.layer.v1.tar",
        "digest": f"sha256:{digest}",
        "size": size,
        "annotations": {"org.opencontainers.image.title": name},
    }


def _write_json(content: dict[str, Any], blobs: Path, *, kind: str) -> dict[str, Any]:
    data = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def write_triton(bundle: Path, out: Path, *, name: str, variant: str | None = None) -> None:
    """Write a model repository of Triton: a model of the Python back end, with the bundle and this package's code.

    Args:
        bundle: Its folder; external data of a graph stays beside it.
        out: Folder to write, the repository; appears when it is complete.
        name: Of the model.
        variant: Its files alone; all when left out, and the default answers.

    Raises:
        BundleError: A file is missing or is not what the manifest says, there is no such variant, or ``name`` is none.
        StorageError: No space, or no permission.
    """
    from manyeyes.registry.carried import copy_code

    _check_name(name)
    _, files = _checked_files(bundle, variant)
    with new_folder(out) as folder:
        version = folder / name / "1"
        (version / "bundle").mkdir(parents=True)
        for file in _names(bundle, files):
            (version / "bundle" / file).parent.mkdir(exist_ok=True)
            link_or_copy(bundle / file, version / "bundle" / file)
        shutil.copyfile(Path(__file__).with_name("triton_model.py"), version / "model.py")
        copy_code(version / "code")
        (folder / name / "config.pbtxt").write_text(_TRITON.replace("NAME", name), encoding="utf-8")


# https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
_TRITON = """name: "NAME"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "question" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "images" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }
]
output [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def default_image() -> str:
    """The runtime image of this version."""
    return f"manyeyes-runtime:{__version__}"


def render_kubernetes(name: str, *, image: str, models: str, variant: str | None = None) -> str:
    """A Deployment of ``manyeyes serve`` and its Service, as YAML.

    Args:
        name: Of both.
        image: The runtime image.
        models: Reference of an image with the bundle's files under ``/models``; it is mounted as a volume (Kubernetes
            1.33 or newer).
        variant: Of the bundle, which answers; as for ``load_bundle``.

    Raises:
        BundleError: ``name`` or ``models`` is none.
    """
    _check_name(name)
    if not models or "://" in models.removeprefix("oci://"):
        raise BundleError(
            f"the place of the model is {models!r}", "an OCI image, oci://REGISTRY/NAME:TAG", "Name it with --uri."
        )
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "manyeyes"}
    container = {
        **_container(image, f"{MODELS}/models", variant),
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "scratch", "mountPath": "/tmp"},
        ],
    }
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "models", "image": {"reference": models.removeprefix("oci://"), "pullPolicy": "IfNotPresent"}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            # The new pod takes requests before the old one stops.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }
    return yaml.safe_dump_all([deployment, service], sort_keys=False)


def render_kserve(name: str, *, image: str, models: str, variant: str | None = None) -> str:
    """A KServe InferenceService whose container is ``manyeyes serve``, as YAML.

    Args:
        name: Of the service.
        image: The runtime image.
        models: Where the bundle's folder lies: ``oci://``, ``oci+native://``, ``s3://``, ``pvc://``, ...
        variant: Of the bundle, which answers; as for ``load_bundle``.

    Raises:
        BundleError: ``name`` or ``models`` is none.
    """
    _check_name(name)
    if "://" not in models:
        raise BundleError(f"the place of the model is {models!r}", "oci://, s3://, pvc://, ...", "Name it with --uri.")
    mounted = "/mnt/models"
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": _GRACE_S,
                "securityContext": _pod_security(),
                "storageUris": [{"uri": models, "mountPath": mounted}],
                "containers": [
                    {
                        **_container(image, mounted, variant),
                        "name": "kserve-container",
                        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
                    }
                ],
                "volumes": [{"name": "scratch", "emptyDir": {}}],
            }
        },
    }
    return yaml.safe_dump(service, sort_keys=False)


def _container(image: str, folder: str, variant: str | None) -> dict[str, Any]:
    probe = {"periodSeconds": 5, "timeoutSeconds": 5}
    return {
        "name": "serve",
        "image": image,
        "command": [
            *("manyeyes", "serve", folder, "--host", "0.0.0.0", "--port", str(PORT)),
            *(() if variant is None else ("--variant", variant)),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [
            {
                "name": "MANYEYES_API_KEYS",
                "valueFrom": {"secretKeyRef": {"name": "manyeyes-api-keys", "key": "keys", "optional": True}},
            }
        ],
        # Loading takes as long as the weights are large.
        "startupProbe": {"httpGet": {"path": "/ready", "port": "http"}, **probe, "failureThreshold": 120},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, **probe},
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, **probe, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod_security() -> dict[str, Any]:
    return {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "seccompProfile": {"type": "RuntimeDefault"}}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", name):
        raise BundleError(
            f"name is {name!r}", "up to 50 small letters, digits and dashes, a letter first", "Name it with --name."
        )
