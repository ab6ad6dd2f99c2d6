"""A bundle that is incomplete, was changed, or makes no sense is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from PIL import Image

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime.bundle import Bundle, load_bundle
from manyeyes.runtime.bundle_contents import DECODER, EMBED, REQUIRED_FILES, VISION, digest_files
from manyeyes.runtime.preprocess import decode_image
from tests.bundle_tampering import MODELS, ask_for_memory, tampered, use
from tests.export_toys import Toy, make_groups, picture, rewrite_manifest


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def edit_pixels(bundle: Path, **fields: object) -> None:
    encoders = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))["encoders"]
    edit_json(bundle / "preprocess.json", encoders={**encoders, "vit": {**encoders["vit"], **fields}})


DEADLY_MODEL = MODELS[-1]


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_flipped_byte_is_refused_by_name(toy_bundle: Toy, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    flip_byte(tmp_path / "bundle" / name)
    with pytest.raises(BundleError, match=f"{name} has sha256"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / EMBED).unlink(), "embed_tokens.onnx is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{", encoding="utf-8"), "manifest.json cannot be read"),
        (lambda bundle: (bundle / "manifest.json").write_text("[]", encoding="utf-8"), "manifest.json holds a list"),
        (lambda bundle: (bundle / VISION).write_bytes(b"short"), "vision_encoder.onnx has 5 bytes"),
        (lambda bundle: edit_json(bundle / "manifest.json", format_version=2), "format_version 2"),
        (lambda bundle: edit_json(bundle / "manifest.json", digest="f" * 64), "has digest 'ffff"),
        (lambda bundle: edit_json(bundle / "manifest.json", files={}), r"lists no .*vision_encoder\.onnx"),
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
        (lambda bundle: (bundle / DECODER).write_bytes(b"not a graph"), "decoder_model_merged.onnx does not load"),
        (lambda bundle: edit_json(bundle / "preprocess.json", mode="shared"), "mode 'shared'"),
        (lambda bundle: edit_json(bundle / "preprocess.json", encoders={}), "encoders {}"),
        (lambda bundle: edit_json(bundle / "chat.json", template={"name": "x", "colour": 1}), "colour"),
        (lambda bundle: edit_json(bundle / "chat.json", max_length=None), "max_length None"),
        (lambda bundle: edit_json(bundle / "chat.json", max_length=96.0), "max_length 96.0"),
        (lambda bundle: edit_json(bundle / "chat.json", image_tokens=-1), "image_tokens -1"),
        (lambda bundle: edit_json(bundle / "chat.json", image_tokens=5), "vision_encoder.onnx makes 4"),
        (lambda bundle: edit_json(bundle / "chat.json", template={"name": "x", "takes_system": "xxx"}), "takes_system"),
        (lambda bundle: edit_json(bundle / "chat.json", template={"name": "x", "gpt_end": "ab"}), "go together"),
        (lambda bundle: edit_json(bundle / "chat.json", template={"name": "x", "asked_as": "y"}), 'asked_as "y"'),
        (lambda bundle: edit_pixels(bundle, mean=["0.5", 0.5, 0.5]), "encoders.vit.mean.0 '0.5'"),
        (lambda bundle: edit_pixels(bundle, size=32), "takes 64 x 64"),
        (lambda bundle: edit_pixels(bundle, size=10**9), "encoders.vit.size"),
        (lambda bundle: (bundle / "chat.json").write_text("[" * 100_000, encoding="utf-8"), "nested too deep"),
        (lambda bundle: (bundle / "chat.json").write_text('{"a": NaN}', encoding="utf-8"), "NaN is no number"),
        (lambda bundle: (bundle / "tokenizer.json").write_text("{}", encoding="utf-8"), "has no model"),
        (lambda bundle: edit_json(bundle / "tokenizer.json", model={"type": "BPE"}), "is no tokenizer"),
        # It ends the process that reads it.
        (lambda bundle: edit_json(bundle / "tokenizer.json", model=DEADLY_MODEL), r"signal \d+"),
        (lambda bundle: shutil.copyfile(bundle / EMBED, bundle / DECODER), "decoder_model_merged.onnx has no"),
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
    with pytest.raises(BundleError, match="plain file name"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["n" * 5000, "..", "", "a/b", "a\0b"])
def test_file_names_that_no_file_has_are_refused(toy_bundle: Toy, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    manifest = json.loads((toy_bundle.bundle / "manifest.json").read_text(encoding="utf-8"))
    files = {**manifest["files"], name: {"sha256": "0" * 64, "bytes": 1}}
    edit_json(tmp_path / "bundle" / "manifest.json", files=files, digest=digest_files(files))
    with pytest.raises(BundleError, match="plain file name"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("rows", [2**34, 2**62])
def test_a_small_graph_that_asks_for_all_memory_is_refused(toy_bundle: Toy, tmp_path: Path, rows: int) -> None:
    """2**34 rows of 32 floats are 2 TB: the arena ends before the machine does."""
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    ask_for_memory(tmp_path / "bundle", rows)
    with pytest.raises(BundleError, match=r"embed_tokens\.onnx"):
        load_bundle(tmp_path / "bundle").answer("red?")


def test_all_graphs_together_stay_below_the_limit(toy_bundle: Toy, tmp_path: Path) -> None:
    """In a process of its own, with a limit that this machine could exceed."""
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    ask_for_memory(tmp_path / "bundle", 2**21)  # 268 MB
    program = (
        "import sys\n"
        "from manyeyes.runtime import sessions\n"
        "from manyeyes.runtime.bundle import load_bundle\n"
        "sessions.memory_limit = lambda: int(sys.argv[2])\n"
        "print(repr(load_bundle(sys.argv[1], threads=1).answer('red?', max_new_tokens=1)))\n"
    )
    for limit, message in ((10**9, ""), (10**8, "BundleError: embed_tokens.onnx")):
        command = [sys.executable, "-c", program, str(tmp_path / "bundle"), str(limit)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=300)
        assert (done.returncode == 0) == (message == ""), done.stderr
        assert message in done.stderr


def test_tampered_bundles_answer_or_are_refused(toy_bundle: Toy, tmp_path: Path) -> None:
    outcomes = {use(copied) for _, copied in tampered(toy_bundle.bundle, tmp_path, seed=3, count=40)}
    assert outcomes >= {"answers", "load: BundleError"}
    assert outcomes <= {"answers", "load: BundleError", "answer: BundleError", "answer: RecordError"}


def _as_first_traced(model: onnx_ir.Model) -> onnx_ir.Model:
    """A graph with the names that it had at first: visual tokens came out, and the decoder took places of logits."""
    graph = model.graph
    for value in graph.outputs:
        value.name = "visual_tokens" if value.name == "image_features" else value.name
    for place, value in enumerate(graph.inputs):
        if value.name == "num_logits_to_keep":
            made = next(node for node in graph if node.op_type == "Range").outputs[0]
            places = onnx_ir.Value(name="logits_positions", shape=onnx_ir.Shape(["kept"]), type=made.type)
            made.replace_all_uses_with(places)
            graph.inputs[place] = places
            RemoveUnusedNodesPass()(model)
    return model


def test_fields_that_an_older_bundle_lacks_have_their_old_meaning(toy_bundle: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    bundle = tmp_path / "bundle"
    chat = json.loads((bundle / "chat.json").read_text(encoding="utf-8"))
    # As the first bundles were written: graphs under other names, beside the other files; no variants, no stop, start,
    # between and so on, no fill, no layout, no model.
    first = (
        "name",
        "system",
        "system_prefix",
        "system_suffix",
        "human_prefix",
        "human_suffix",
        "gpt_prefix",
        "gpt_lead",
    )
    template = {key: chat["template"][key] for key in (*first, "gpt_end", "gpt_after", "images_only")}
    edit_json(bundle / "chat.json", template=template)
    preprocess = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    for pixels in preprocess["encoders"].values():
        del pixels["fill"]
    content = {"mode": preprocess["mode"], "encoders": preprocess["encoders"]}
    (bundle / "preprocess.json").write_text(json.dumps(content), encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["model"], manifest["parity"], manifest["variants"], manifest["ours_alone"]
    for part, name in (("vision", VISION), ("embed", EMBED), ("decoder", DECODER)):
        onnx_ir.save(_as_first_traced(onnx_ir.load(bundle / name)), bundle / f"{part}.onnx")
        manifest["files"][f"{part}.onnx"] = manifest["files"].pop(name)
    shutil.rmtree(bundle / "onnx")
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rewrite_manifest(bundle)
    groups = make_groups()
    assert load_bundle(bundle).answer_groups(groups) == load_bundle(toy_bundle.bundle).answer_groups(groups)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None, True])
def test_wrong_numbers_of_tokens_are_refused(loaded_bundle: Bundle, value: object) -> None:
    with pytest.raises(RecordError, match="max_new_tokens"):
        loaded_bundle.answer("red?", max_new_tokens=value)  # type: ignore[arg-type]


def test_pixels_and_pictures_answer_as_their_files(loaded_bundle: Bundle) -> None:
    data = picture(1, 70, 50)
    pixels = decode_image(data)
    expected = loaded_bundle.answer("red?", images=[data])
    assert loaded_bundle.answer("red?", images=[pixels]) == expected
    assert loaded_bundle.answer("red?", images=[Image.fromarray(pixels)]) == expected


def test_verification_can_be_left_out(toy_bundle: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    content = (tmp_path / "bundle" / "chat.json").read_text(encoding="utf-8")
    (tmp_path / "bundle" / "chat.json").write_text(content.replace('"system": ""', '"system":"!"'), encoding="utf-8")
    assert load_bundle(tmp_path / "bundle", verify=False).answer("red?")
    with pytest.raises(BundleError, match=r"chat\.json has sha256"):
        load_bundle(tmp_path / "bundle")
