"""The engine and the images that ``.ci/containers`` names in the environment."""

from __future__ import annotations

import os
import subprocess

STEPS = os.environ.get("MANYEYES_TEST_STEPS_IMAGE", "")
RUNTIME = os.environ.get("MANYEYES_TEST_RUNTIME_IMAGE", "")
DOCKER = os.environ.get("DOCKER", "docker")
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp"]


def docker(*arguments: str) -> str:
    """What the client prints; it must succeed."""
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_hardened(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    """What a command prints in a container that may write to ``/tmp`` alone and has no network."""
    return docker("run", "--rm", "--network=none", *HARDENED, *options, image, *command)
