from __future__ import annotations

import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from infra.images.build import CONTAINERFILE, IMAGES, ROOT, BuildError, link, pinned_base, requirements

DIGEST = f"sha256:{'a' * 64}"


def fake_docker(folder: Path, *, digests: str) -> str:
    """A docker client that knows one image, with these registry digests (JSON)."""
    client = folder / "docker"
    client.write_text(f"#!/bin/sh\ncase \"$*\" in *RepoDigests*) echo '{digests}';; esac\n", encoding="utf-8")
    client.chmod(0o755)
    return str(client)


def test_requirements_of_an_extra_follow_the_packages_own_extras() -> None:
    project = {
        "name": "manyeyes",
        "dependencies": ["numpy>=2", "pillow>=11; sys_platform == 'linux'"],
        "optional-dependencies": {
            "data": ["pyarrow>=18"],
            "train": ["manyeyes[data]", "torch>=2.9"],
            "steps": ["manyeyes[train,data]", "mlflow[auth]>=3"],
        },
    }
    core = ["numpy>=2", "pillow>=11; sys_platform == 'linux'"]
    assert requirements(project, "") == core
    assert requirements(project, "steps") == [*core, "pyarrow>=18", "torch>=2.9", "mlflow[auth]>=3"]


def test_runtime_image_asks_for_no_torch_and_the_steps_image_does() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {image: " ".join(requirements(project, extra)) for image, extra in IMAGES.items()}
    for package in ("torch", "mlflow", "kfp"):
        assert package not in named["runtime"]
    for package in ("fastapi>=", "uvicorn>=", "model-signing>=", "pyopenssl>="):
        assert package in named["runtime"]
    for package in ("torch>=", "mlflow[auth]>=", "kfp>=", "great-expectations>=", "psycopg2-binary>="):
        assert package in named["steps"]


def test_every_pinned_package_takes_the_oldest_python_that_we_do() -> None:
    """Debian 12's, of which a base can be made, is 3.11.2."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    refuse = [
        f"{package.name} {package.version} asks for Python {asked}"
        for package in metadata.distributions(path=[sysconfig.get_path("purelib")])
        if canonicalize_name(package.name) in pinned
        and (asked := package.metadata.get("Requires-Python"))
        and not SpecifierSet(asked).contains(oldest.removeprefix(">=") + ".0")
    ]
    assert not refuse


def test_base_of_the_containerfile_is_pinned_by_digest() -> None:
    base = pinned_base("/no/docker/is/asked", None, unpinned=False)
    assert f"ARG BASE={base}\n" in CONTAINERFILE.read_text(encoding="utf-8")
    assert len(base.partition("@sha256:")[2]) == 64


def test_base_without_a_digest_is_looked_up_and_pinned(tmp_path: Path) -> None:
    docker = fake_docker(tmp_path, digests=f'["python@{DIGEST}"]')
    assert pinned_base(docker, "python:3.11", unpinned=False) == f"python@{DIGEST}"


def test_base_that_no_registry_knows_is_refused_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docker = fake_docker(tmp_path, digests="[]")
    with pytest.raises(BuildError, match="base mine:1 has no digest in a registry"):
        pinned_base(docker, "mine:1", unpinned=False)
    assert pinned_base(docker, "mine:1", unpinned=True) == "mine:1"
    assert "not for a release" in capsys.readouterr().out


def test_wheels_are_linked_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    link(tmp_path / "a.whl", tmp_path / "b.whl")
    link(tmp_path / "a.whl", tmp_path / "b.whl")
    assert (tmp_path / "b.whl").stat().st_ino == (tmp_path / "a.whl").stat().st_ino
