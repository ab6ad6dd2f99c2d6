"""``manyeyes pipeline upload``: a version of a pipeline on an endpoint, named after code and image, never twice."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kfp_server_api import models

from manyeyes import __version__
from manyeyes.errors import PipelineError
from manyeyes.kubeflow.endpoint import Endpoint
from manyeyes.kubeflow.pipeline import compile_pipeline, image_digest
from manyeyes.kubeflow.profiles import load_profile

# What a compiled pipeline is made of.
_SOURCES = ("pipelines", "components", "models", "infra/profiles")


@dataclass(frozen=True)
class Uploaded:
    """A version on the endpoint.

    Attributes:
        pipeline: Name of the pipeline.
        version: Name of the version.
        version_id: Its id.
        new: False when it was there already.
        dirty: Whether the checkout differs from its commit.
    """

    pipeline: str
    version: str
    version_id: str
    new: bool
    dirty: bool


def upload_pipeline(endpoint: Endpoint, name: str, *, image: str, profile: str = "", root: Path = Path()) -> Uploaded:
    """Compile a pipeline and add it to the endpoint as a version; do nothing when that version is there.

    Args:
        endpoint: Where to.
        name: Pipeline name.
        image: ``REF@sha256:...``.
        profile: A profile's name or path; empty for none.
        root: The checkout.

    Raises:
        PipelineError: An image without a digest, no such pipeline or profile, or a version of that name with other
            contents.
        EndpointError: The endpoint refuses or does not answer.
    """
    digest = image_digest(image)
    settings = load_profile(profile, root=root) if profile else None
    with tempfile.TemporaryDirectory() as folder:
        file = compile_pipeline(name, Path(folder) / f"{name}.yaml", root=root, image=image, profile=settings)
        content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        commit, dirty = code_state(root)
        version = version_name(commit, digest, changed=content if dirty else "")
        pipeline_id = _pipeline_id(endpoint, name)
        mark = f"sha256 {content}"
        description = f"image {image}; profile {profile or 'none'}; commit {commit}; {mark}"

        def look() -> models.V2beta1PipelineVersion | None:
            return endpoint.version(pipeline_id, version)

        def make() -> models.V2beta1PipelineVersion:
            return endpoint.uploads.upload_pipeline_version(
                str(file), name=version, pipelineid=pipeline_id, description=description
            )

        found, new = endpoint.create(look, make, unique=True)
        if not new and found.description and "sha256 " in found.description and mark not in found.description:
            raise PipelineError(
                f'version "{version}" of {name} is there with other contents ({found.description})',
                "one version for one commit, image and profile",
                "Commit the change (a profile is part of the commit), or delete that version on the endpoint.",
            )
    return Uploaded(name, version, found.pipeline_version_id, new, dirty)


def _pipeline_id(endpoint: Endpoint, name: str) -> str:
    scope = {"namespace": endpoint.settings.namespace} if endpoint.settings.namespace else {}

    def make() -> models.V2beta1Pipeline:
        # ``name`` becomes a Kubernetes name where the endpoint keeps pipelines in Kubernetes.
        body = models.V2beta1Pipeline(
            display_name=name, name=name.replace("_", "-"), description=f"ManyEyes: {name}", **scope
        )
        return endpoint.pipelines.pipeline_service_create_pipeline(pipeline=body)

    found, _ = endpoint.create(lambda: endpoint.pipeline(name), make, unique=True)
    return str(found.pipeline_id)


def version_name(commit: str, digest: str, *, changed: str = "") -> str:
    """``<package version>-<git commit>-<image digest, first 12>``.

    Args:
        commit: Commit of the checkout, or "nogit".
        digest: Hexadecimal digits of the image's digest.
        changed: Where the checkout differs from the commit: digest of what is uploaded, so that two different changes
            never share a name.
    """
    code = f"{commit[:12]}-dirty-{changed[:8]}" if changed else commit[:12]
    return f"{__version__}-{code}-{digest[:12]}"


def code_state(root: Path) -> tuple[str, bool]:
    """Commit of the checkout ("nogit" outside git), and whether what makes a pipeline differs from it."""
    git = shutil.which("git")
    if git is None:
        return "nogit", False
    command = [git, "-C", str(root)]
    head = subprocess.run(
        [*command, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if head.returncode != 0:
        return "nogit", False
    status = [*command, "status", "--porcelain", "--", *_SOURCES]
    changes = subprocess.run(status, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return head.stdout.strip(), bool(changes.stdout.strip())
