"""A checkout of toy size with real easy-VQA records and its own DVC remote; an API server and a command line for it."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from manyeyes.cli import main as command_line
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.shards import RecordReader, write_shards
from manyeyes.data.snapshot import open_folder, open_snapshot, read_dvc_file
from manyeyes.kubeflow import uploading
from manyeyes.kubeflow.endpoint import Endpoint, EndpointSettings
from tests.pipelines.checkout import ROOT, Checkout, make_checkout, push
from tests.pipelines.endpoint_toys import Answer
from tests.pipelines.kfp_server import Kubeflow, start_server

SIZES = {"train": 16, "val": 4, "test": 8}


@pytest.fixture(scope="package", autouse=True)
def stacks_without_sources() -> Iterator[None]:
    """kfp asks for its caller by a stack with the source of each frame: up to 20 CPU seconds a compilation.

    Python looks for the module of every frame among all that were imported, which are thousands below pytest.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", partial(inspect.stack, 0))
        yield


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
    write_snapshot_manifest(folder, provenance=provenance)
    plan = LanguageModelPlan(steps=2)
    pretrain_language_model(folder / "pretrained" / "toy-lm", snapshot=open_folder(folder), seed=0, plan=plan)
    write_snapshot_manifest(folder, provenance=provenance)
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
        f"outs:\n- md5: {md5}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n", encoding="utf-8"
    )
    (checkout.path / ".dvc").mkdir()
    (checkout.path / ".dvc" / "config").write_text(
        "[core]\n    remote = default\n['remote \"default\"']\n    url = ../infra/dvc-remote\n", encoding="utf-8"
    )
    return checkout


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    server, state = start_server()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
    assert state.violations == [], "a request or a reply is not as the SDK's models say"


@pytest.fixture
def endpoint(kubeflow: Kubeflow) -> Iterator[Endpoint]:
    with Endpoint(EndpointSettings(kubeflow.url, timeout_s=0.5, pause_s=0.01)) as endpoint:
        yield endpoint


@pytest.fixture
def manyeyes(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line, in this process, in the checkout."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("KFP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KFP_ENDPOINT", kubeflow.url)

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["manyeyes", *arguments])
        capsys.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles to the same few lines, for tests of what happens to the file and not of the file."""

    def write(_name: str, out: Path, **_options: Any) -> Path:
        out.write_text("pipelineInfo: {name: train}\nroot: {}\n", encoding="utf-8")
        return out

    monkeypatch.setattr(uploading, "compile_pipeline", write)
