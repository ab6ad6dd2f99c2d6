"""A checkout of toy size: real easy-VQA records, a language model that learned next to nothing, its own DVC remote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from manyeyes.data.builders.manifest import Provenance, write_manifest
from manyeyes.data.shards import RecordReader, write_shards
from manyeyes.data.snapshot import open_folder, open_snapshot, read_dvc_file
from tests.pipelines.checkout import ROOT, Checkout, make_checkout, push

SIZES = {"train": 16, "val": 4, "test": 8}


def make_snapshot(folder: Path, *, cache: Path, sizes: dict[str, int]) -> Path:
    """The first records of every easy-VQA data set, and a language model of a few kilobytes.

    Args:
        folder: Of the snapshot.
        cache: Gets the whole of what ``data.dvc`` names.
        sizes: Records of each split; each has one image.
    """
    from manyeyes.training.warmup import LanguageModelPlan, pretrain_language_model

    whole = open_snapshot(
        md5=read_dvc_file(ROOT / "data.dvc").md5, remote=str(ROOT / "infra" / "dvc-remote"), cache_dir=cache
    )
    for split, count in sizes.items():
        reader = RecordReader(whole.shards(f"easy-vqa-{split}"))
        write_shards((reader.read(index) for index in range(count)), folder / "easy-vqa", split)
    provenance = {
        **{f"easy-vqa-{split}": Provenance("MIT", "the first records of easy-VQA") for split in sizes},
        "toy-lm": Provenance("Apache-2.0", "made by a test"),
    }
    write_manifest(folder, provenance=provenance)
    plan = LanguageModelPlan(steps=2)
    pretrain_language_model(folder / "pretrained" / "toy-lm", snapshot=open_folder(folder), seed=0, plan=plan)
    write_manifest(folder, provenance=provenance)
    return folder


@pytest.fixture(scope="session")
def toy_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot's folder of toy size."""
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), cache=tmp_path_factory.mktemp("cache"), sizes=SIZES)


@pytest.fixture(scope="session")
def toy_checkout(toy_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout without git and without ``data/``: the compiled pipeline, ``data.dvc`` and the remote are enough."""
    base = tmp_path_factory.mktemp("checkouts")
    library = base / "library"
    shutil.copytree(ROOT / "models" / "manyeyes", library / "manyeyes", ignore=shutil.ignore_patterns("__pycache__"))
    checkout = make_checkout(base / "train", library=library)
    shutil.copytree(ROOT / "pipelines" / "compiled", checkout.path / "pipelines" / "compiled")
    shutil.copyfile(Path(__file__).with_name("toy_recipe.yaml"), checkout.path / "toy.yaml")
    md5 = push(toy_snapshot, checkout.path / "infra" / "dvc-remote")
    (checkout.path / "data.dvc").write_text(
        f"outs:\n- md5: {md5}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n"
    )
    (checkout.path / ".dvc").mkdir()
    (checkout.path / ".dvc" / "config").write_text(
        "[core]\n    remote = default\n['remote \"default\"']\n    url = ../infra/dvc-remote\n"
    )
    return checkout
