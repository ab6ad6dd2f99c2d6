"""A toy bundle that several files look at; exporting takes seconds."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from manyeyes.recipe import Recipe, load_recipe
from manyeyes.runtime.bundle import Bundle, load_bundle
from manyeyes.runtime.bundle_contents import BundleManifest
from tests.export_toys import Toy, make_toy


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return load_recipe("tiny")


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Toy:
    own = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist share the folder above theirs, and one bundle: an export takes them 15 CPU seconds.
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "toy-bundle"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make_toy(folder.with_suffix(".part"), tiny_recipe)
            folder.with_suffix(".part").rename(folder)
    manifest = (folder / "bundle/manifest.json").read_text(encoding="utf-8")
    return Toy(folder / "checkpoint", folder / "bundle", BundleManifest.model_validate_json(manifest))


@pytest.fixture(scope="session")
def loaded_bundle(toy_bundle: Toy) -> Bundle:
    return load_bundle(toy_bundle.bundle, threads=1)
