"""Builds the images of Containerfile from a context of its own; run it with the checkout's Python (`make image`).

Two modes: build the images, or (``--collect DIR``) put every wheel that they need into a folder, for a machine without
network or for CI. Addresses, credentials and certificates are given at build time as secrets and stay in no image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = Path(__file__).with_name("Containerfile")
# Image, and the extra of the package that it installs.
IMAGES = {"steps": "steps", "runtime": "runtime"}


class BuildError(Exception):
    """What was found, what was needed, what to do."""

    def __init__(self, found: str, needed: str, do: str) -> None:
        super().__init__(f"{found}; needed: {needed}. {do}")


def main() -> int:
    """Build, or collect wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", dest="images", action="append", choices=list(IMAGES), help="default: both")
    parser.add_argument("--base", help="another base image than the Containerfile's, by digest")
    parser.add_argument("--unpinned-base", action="store_true", help="take a base without a digest; not for a release")
    parser.add_argument("--torch", choices=("cuda", "cpu"), default="cuda", help="which torch (default: cuda)")
    parser.add_argument("--pip-conf", type=Path, help="pip's settings while building, for instance an index for torch")
    parser.add_argument("--ca", type=Path, help="certificates that pip trusts while building")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are taken before any index is asked")
    parser.add_argument("--network", help="docker build's --network, for instance none")
    parser.add_argument("--prefix", default="", help="before the image's name, for instance registry.example/team/")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="collect every wheel in DIR and build nothing")
    options = parser.parse_args()
    options.images = options.images or list(IMAGES)
    try:
        if options.collect:
            collect_wheels(options.collect, images=options.images)
        else:
            build_images(options)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def build_images(options: argparse.Namespace) -> None:
    """Build the images that ``options`` names, and print the size and digest of each."""
    docker = find_docker()
    base = pinned_base(docker, options.base, unpinned=options.unpinned_base)
    version, revision = read_version(), read_revision()
    with tempfile.TemporaryDirectory(prefix="manyeyes-images-", dir=options.wheels and options.wheels.parent) as folder:
        context = Path(folder)
        make_context(context, wheels=options.wheels)
        for image in options.images:
            tag = f"{options.prefix}manyeyes-{image}:{version}"
            command = [docker, "build", "--file", str(CONTAINERFILE), "--target", image, "--tag", tag]
            arguments = {"BASE": base, "VERSION": version, "REVISION": revision, "TORCH": options.torch}
            for name, value in arguments.items():
                if name != "TORCH" or image == "steps":
                    command += ["--build-arg", f"{name}={value}"]
            for name, file in (("pip.conf", options.pip_conf), ("ca.pem", options.ca)):
                if file:
                    command += ["--secret", f"id={name},src={file}"]
            if options.network:
                command += ["--network", options.network]
            environment = {**os.environ, "DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"}
            if subprocess.run([*command, str(context)], env=environment, check=False).returncode:
                raise BuildError(f"{image} was not built", "docker build to succeed", "Its output is above.")
            print(describe(docker, tag), flush=True)


def find_docker() -> str:
    """The docker client, ``$DOCKER`` or the one on PATH; it must reach an engine and have BuildKit."""
    docker = shutil.which(os.environ.get("DOCKER", "docker"))
    if docker is None:
        raise BuildError("no docker client", "one on PATH", "Install Docker, or set DOCKER to another client's path.")
    client = _output([docker, "version", "--format", "{{.Client.Version}} {{.Server.Version}}"])
    if not client:
        raise BuildError(f"{docker} reaches no engine", "one that runs", "Start it, or set DOCKER_HOST.")
    # BuildKit is in the client up to 22, and in the plugin buildx from 23.
    if int(client.partition(".")[0]) >= 23 and not _output([docker, "buildx", "version"]):
        raise BuildError(f"{docker} {client.split()[0]} without buildx", "BuildKit", "Install docker-buildx-plugin.")
    return docker


def pinned_base(docker: str, given: str | None, *, unpinned: bool) -> str:
    """The base image with its digest; a tag without one is looked up in its registry."""
    base = given or re.findall(r"^ARG BASE=(\S+)$", CONTAINERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    if re.search(r"@sha256:[0-9a-f]{64}$", base):
        return base
    if unpinned:
        print(f"WARNING: base {base} has no digest: these images are not for a release", flush=True)
        return base
    _output([docker, "pull", "--quiet", base])
    digests = json.loads(_output([docker, "image", "inspect", "--format", "{{json .RepoDigests}}", base]) or "[]")
    if not digests:
        raise BuildError(
            f"base {base} has no digest in a registry",
            "NAME:TAG@sha256:...",
            "Name one with --base, or take it for tests only with --unpinned-base.",
        )
    print(f"base {base} is {digests[0]}", flush=True)
    return str(digests[0])


def make_context(context: Path, *, wheels: Path | None) -> None:
    """Fill the build context: requirements, constraints, the package's wheel, and wheels (linked, not copied)."""
    for image, extra in IMAGES.items():
        lines = requirements(_project(), extra)
        (context / f"{image}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    shutil.copyfile(ROOT / "constraints.txt", context / "constraints.txt")
    build_wheel(context / "dist")
    (context / "wheels").mkdir()
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        link(wheel, context / "wheels" / wheel.name)


def requirements(project: dict[str, Any], extra: str) -> list[str]:
    """What the package needs with one of its extras, without the package itself.

    Args:
        project: ``[project]`` of pyproject.toml.
        extra: Name of an extra; empty for the core alone.
    """
    return list(dict.fromkeys([*project["dependencies"], *(_expand(project, extra) if extra else ())]))


def _expand(project: dict[str, Any], extra: str) -> Iterator[str]:
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[([^]]+)\]", line)
        if own is None:
            yield line
        for inner in own.group(1).split(",") if own else ():
            yield from _expand(project, inner.strip())


def build_wheel(out: Path) -> None:
    """The package's wheel."""
    subprocess.run([*_PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)], check=True)


def collect_wheels(out: Path, *, images: list[str]) -> None:
    """Put every wheel that the images need into ``out``.

    What pip's index keeps on this machine's disk is linked, not copied; the rest comes as pip's settings say.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for image in images for line in requirements(_project(), IMAGES[image])]
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        wanted.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)), encoding="utf-8")
        resolve = ["install", "--dry-run", "--ignore-installed", "--quiet", "--quiet", "--report", str(report)]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*_PIP, *resolve, *constraints, "--requirement", str(wanted)], check=True)
        urls = [item["download_info"]["url"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    local = [Path(url.removeprefix("file://")) for url in urls if url.startswith("file://") and url.endswith(".whl")]
    for wheel in local:
        link(wheel, out / wheel.name)
    others = [url for url in urls if url.removeprefix("file://") not in {str(wheel) for wheel in local}]
    if others:
        subprocess.run([*_PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), *others], check=True)
    print(f"{len(urls)} wheels in {out}, {len(local)} of them linked from this machine's disk", flush=True)


def link(source: Path, target: Path) -> None:
    """A hard link; a copy where the two lie on different file systems."""
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def read_version() -> str:
    """Of the package."""
    text = (ROOT / "models" / "manyeyes" / "__init__.py").read_text(encoding="utf-8")
    return str(re.findall(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)[0])


def read_revision() -> str:
    """The git commit, with ``-dirty`` where the checkout differs from it; ``unknown`` outside git."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = commit and _output(["git", "-C", str(ROOT), "status", "--porcelain"])
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


def describe(docker: str, tag: str) -> str:
    """One line: tag, size, image id, and the registry's digest once it was pushed."""
    image = json.loads(_output([docker, "image", "inspect", tag]))[0]
    digest = ", ".join(image["RepoDigests"]) or "not pushed: no registry digest yet"
    return f"{tag}: {image['Size'] / 1e6:.0f} MB, id {image['Id']} ({digest})"


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


_PIP = [sys.executable, "-m", "pip"]


if __name__ == "__main__":
    sys.exit(main())
