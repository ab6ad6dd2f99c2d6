"""A toy bundle that several files look at; exporting takes seconds."""

from __future__ import annotations

import pytest

from manyeyes.recipe import Recipe, load_recipe
from manyeyes.runtime.bundle import Bundle, load_bundle
from tests.export_toys import Toy, make_toy


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return load_recipe("tiny")


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy-bundle"), tiny_recipe)


@pytest.fixture(scope="session")
def loaded_bundle(toy_bundle: Toy) -> Bundle:
    return load_bundle(toy_bundle.bundle, threads=1)
