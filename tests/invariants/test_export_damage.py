"""A bundle that is incomplete, was changed, or makes no sense is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from manyeyes.errors import BundleError
from manyeyes.runtime.bundle import load_bundle
from manyeyes.runtime.bundle_files import REQUIRED_FILES, digest_files
from tests.export_toys import Toy, rewrite_manifest


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_flipped_byte_is_refused_by_name(toy_bundle: Toy, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    flip_byte(tmp_path / "bundle" / name)
    with pytest.raises(BundleError, match=f"{name} has sha256"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "embed.onnx").unlink(), "embed.onnx is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{", encoding="utf-8"), "manifest.json cannot be read"),
        (lambda bundle: (bundle / "manifest.json").write_text("[]", encoding="utf-8"), "manifest.json holds a list"),
        (lambda bundle: (bundle / "vision.onnx").write_bytes(b"short"), "vision.onnx has 5 bytes"),
        (lambda bundle: edit_json(bundle / "manifest.json", format_version=2), "format_version 2"),
        (lambda bundle: edit_json(bundle / "manifest.json", digest="f" * 64), "has digest 'ffff"),
        (lambda bundle: edit_json(bundle / "manifest.json", files={}), "lists no vision.onnx"),
    ],
)
def test_damaged_bundle_is_refused(
    toy_bundle: Toy, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "decoder.onnx").write_bytes(b"not a graph"), "decoder.onnx does not load"),
        (lambda bundle: edit_json(bundle / "preprocess.json", mode="shared"), "mode 'shared'"),
        (lambda bundle: edit_json(bundle / "preprocess.json", encoders={}), "describes"),
        (lambda bundle: edit_json(bundle / "chat.json", template={"name": "x", "colour": 1}), "colour"),
        (lambda bundle: edit_json(bundle / "chat.json", max_length=None), "max_length None"),
    ],
)
def test_files_that_make_no_sense_are_refused(
    toy_bundle: Toy, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """Checksums are true here: somebody exported this."""
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    rewrite_manifest(tmp_path / "bundle")
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "bundle")


def test_file_name_that_leaves_the_folder_is_refused(toy_bundle: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    manifest = json.loads((toy_bundle.bundle / "manifest.json").read_text(encoding="utf-8"))
    files = {**manifest["files"], "../secret": {"sha256": "0" * 64, "bytes": 1}}
    edit_json(tmp_path / "bundle" / "manifest.json", files=files, digest=digest_files(files))
    with pytest.raises(BundleError, match="plain file names"):
        load_bundle(tmp_path / "bundle")


def test_verification_can_be_left_out(toy_bundle: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    content = (tmp_path / "bundle" / "chat.json").read_text(encoding="utf-8")
    (tmp_path / "bundle" / "chat.json").write_text(content.replace('"system": ""', '"system":"!"'), encoding="utf-8")
    assert load_bundle(tmp_path / "bundle", verify=False).answer("red?")
    with pytest.raises(BundleError, match=r"chat\.json has sha256"):
        load_bundle(tmp_path / "bundle")
