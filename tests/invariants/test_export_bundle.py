"""The bundle of a toy model answers as torch does, token for token, and without torch."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyeyes.encoders import encoder_transform
from manyeyes.errors import BundleError, CheckpointError, EvaluationError, RecordError
from manyeyes.export.bundle import _save_tokenizer, export_bundle, record_parity
from manyeyes.export.graphs import check_exportable, export_decoder
from manyeyes.export.manifest import BundleManifest, ChatFile, PreprocessFile, load_manifest
from manyeyes.export.parity import load_parity, measure_parity
from manyeyes.model import (
    ManyEyesConfig,
    ManyEyesForConditionalGeneration,
    ManyEyesProcessor,
    checkpoint_digest,
    load_checkpoint,
    save_checkpoint,
)
from manyeyes.recipe import Recipe, load_recipe
from manyeyes.runtime.bundle import REQUIRED_FILES, Bundle, Group, digest_files, load_bundle
from manyeyes.runtime.chat import CHAT_TEMPLATES, encode_conversation
from manyeyes.runtime.sessions import CPU, Graph

MD5 = "0" * 32
VOCABULARY = 280
ENCODERS = {"vit": "vit-tiny-p16-64", "efficientnet": "efficientnet-lite0"}


@dataclass(frozen=True)
class Toy:
    checkpoint: Path
    bundle: Path
    manifest: BundleManifest


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: what colour is the circle? ASSISTANT: red yes no"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_checkpoint(path: Path) -> None:
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    text_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Wide weights make answers depend on every question and image.
        initializer_range=0.3,
    )
    config = ManyEyesConfig(
        text_config=text_config,
        encoders=[{"name": name, "encoder": row, "image_size": 64, "small": True} for name, row in ENCODERS.items()],
        fusion={"strategy": "channel-concat", "grid": 2},
        projector={"kind": "mlp", "depth": 2},
        image_token_id=0,
    )
    model = ManyEyesForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(4)
        for parameter in model.parameters():
            # No two tensors alike: the exporter writes equal ones, such as fresh norms, only once.
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        # Some answers are to end before the limit.
        model.get_output_embeddings().weight[2] *= 2
    processor = ManyEyesProcessor(
        tokenizer,
        transforms={name: encoder_transform(row, image_size=64).as_dict() for name, row in ENCODERS.items()},
        template="vicuna_v1",
        system="",
        num_image_tokens=model.num_image_tokens,
        image_token_id=0,
        max_length=96,
    )
    save_checkpoint(model, processor, path)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    make_checkpoint(folder / "checkpoint")
    manifest = export_bundle(
        folder / "checkpoint", folder / "bundle", recipe=recipe, data_md5=MD5, code_digest="c" * 64
    )
    return Toy(folder / "checkpoint", folder / "bundle", manifest)


@pytest.fixture(scope="module")
def loaded(toy: Toy) -> Bundle:
    return load_bundle(toy.bundle, threads=1)


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def make_groups() -> list[Group]:
    """Groups of every kind: several questions, several images, an image twice, none, and none with questions."""
    questions = ("what colour is the circle?", "red?", "is it yes or no, and what colour is it, please?", "é🙂")
    groups = [Group((picture(seed, 64, 40 + seed),), questions[: 1 + seed % 4]) for seed in range(6)]
    groups.append(Group((picture(0), picture(1)), ("which of the two is red?", "both?")))
    groups.append(Group((picture(3, 64, 43),), ("asked again of the same image?",)))
    groups.append(Group((), ("no image at all?", "and what now?")))
    groups.append(Group((picture(9),), ()))
    return groups


def test_bundle_answers_as_torch_token_for_token(toy: Toy) -> None:
    report = measure_parity(toy.checkpoint, toy.bundle, make_groups(), items=1000, max_new_tokens=8)
    assert report.items == sum(len(group.questions) for group in make_groups())
    assert report.token_match == 1.0, report.mismatches
    assert report.max_abs_logit < 1e-3
    assert report.mean_abs_logit <= report.max_abs_logit
    assert report.providers == [CPU]


def test_answers_differ_and_some_end_before_the_limit(loaded: Bundle) -> None:
    """Else equality with torch would say little."""
    answers = [answer for group in loaded.answer_groups(make_groups(), max_new_tokens=8) for answer in group]
    lengths = {len(answer.token_ids) for answer in answers}
    assert len({answer.token_ids for answer in answers}) > len(answers) / 2
    assert 8 in lengths
    assert min(lengths) < 8
    of_images = loaded.answer_groups([Group((picture(seed),), ("red?",)) for seed in range(8)], max_new_tokens=8)
    assert len({group[0].token_ids for group in of_images}) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_order_change_nothing(loaded: Bundle, batch_size: int) -> None:
    groups = make_groups()
    whole = loaded.answer_groups(groups, max_new_tokens=8, first_logits=True)
    parts = loaded.answer_groups(groups[::-1], max_new_tokens=8, batch_size=batch_size, first_logits=True)[::-1]
    for of_whole, of_parts in zip(whole, parts, strict=True):
        assert [answer.token_ids for answer in of_whole] == [answer.token_ids for answer in of_parts]
        for one, other in zip(of_whole, of_parts, strict=True):
            np.testing.assert_allclose(one.first_logits, other.first_logits, atol=1e-4)


def test_an_image_runs_once_however_often_it_is_asked_about(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = loaded._vision.run

    def count(inputs: Any, **options: Any) -> Any:
        seen.append(len(inputs["vit"]))
        return run(inputs, **options)

    monkeypatch.setattr(loaded._vision, "run", count)
    image = picture(0)
    loaded.answer_groups([Group((image,), ("a?", "b?", "c?")), Group((image, picture(1)), ("d?",))])
    assert seen == [2]


def test_one_answer_equals_its_place_in_a_group(loaded: Bundle) -> None:
    image = picture(4)
    group = loaded.answer_groups([Group((image,), ("red?", "what colour is the circle?"))], max_new_tokens=8)[0]
    assert loaded.answer("what colour is the circle?", images=[image], max_new_tokens=8) == group[1].text
    assert group[0].first_logits is None


def test_answers_end_where_the_models_length_ends(loaded: Bundle, toy: Toy) -> None:
    """96 tokens in all: a long question leaves little room, a longer one none."""
    _, processor = load_checkpoint(toy.checkpoint)

    def length(question: str) -> int:
        turns = [("human", f"<image>\n{question}")]
        return len(
            encode_conversation(
                processor.rust_tokenizer,
                CHAT_TEMPLATES["vicuna_v1"],
                turns,
                image_tokens=[4],
                image_token_id=0,
                system="",
                generation_prompt=True,
            ).input_ids
        )

    free = 96 - length("x")
    almost = "x" + "!" * (free - 2)
    assert length(almost) == 94
    answer = loaded.answer_groups([Group((picture(0),), (almost, "red?"))], max_new_tokens=8)[0]
    assert len(answer[0].token_ids) <= 2
    report = measure_parity(
        toy.checkpoint, toy.bundle, [Group((picture(0),), (almost, "red?"))], items=2, max_new_tokens=8
    )
    assert report.token_match == 1.0
    with pytest.raises(RecordError, match="96 tokens long"):
        loaded.answer(almost + "!!", images=[picture(0)])


@pytest.mark.parametrize(
    ("question", "images", "limit", "message"),
    [
        ("<image> what?", (), 4, "holds <image>"),
        ("what?", (b"no image",), 4, "not an image"),
        ("what?", (), 0, "max_new_tokens is 0"),
    ],
)
def test_bad_questions_are_refused(
    loaded: Bundle, question: str, images: tuple[bytes, ...], limit: int, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        loaded.answer(question, images=images, max_new_tokens=limit)


def test_no_groups_give_no_answers(loaded: Bundle) -> None:
    assert loaded.answer_groups([]) == []
    assert loaded.answer_groups([Group((), ())]) == [[]]


def test_manifest_says_where_the_bundle_comes_from(toy: Toy, loaded: Bundle, recipe: Recipe) -> None:
    manifest = load_manifest(toy.bundle)
    assert manifest == toy.manifest
    assert set(manifest.files) == set(REQUIRED_FILES)
    assert {file.name for file in toy.bundle.iterdir()} == {*REQUIRED_FILES, "manifest.json"}
    for name, file in manifest.files.items():
        content = (toy.bundle / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert manifest.recipe_digest == recipe.digest
    assert manifest.checkpoint_digest == checkpoint_digest(toy.checkpoint)
    assert loaded.manifest["digest"] == manifest.digest
    PreprocessFile.model_validate_json((toy.bundle / "preprocess.json").read_text())
    ChatFile.model_validate_json((toy.bundle / "chat.json").read_text())


def test_manifest_names_every_input_and_its_dynamic_axes(toy: Toy) -> None:
    graphs = toy.manifest.graphs
    assert {value.name: value.shape for value in graphs["vision.onnx"].inputs} == {
        "vit": ["images", 3, 64, 64],
        "efficientnet": ["images", 3, 64, 64],
    }
    assert [(value.name, value.shape) for value in graphs["vision.onnx"].outputs] == [
        ("visual_tokens", ["images", 4, 32])
    ]
    decoder = {value.name: (value.dtype, value.shape) for value in graphs["decoder.onnx"].inputs}
    assert decoder["attention_mask"] == ("int64", ["batch", "total"])
    assert decoder["past_key_values.1.value"] == ("float32", ["batch", 2, "past", 8])
    assert len(decoder) == 4 + 2 * 2
    outputs = {value.name: value.shape for value in graphs["decoder.onnx"].outputs}
    assert outputs["logits"] == ["batch", "kept", VOCABULARY]
    assert set(outputs) == {"logits", *(f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value"))}


def count_written(graph: Path) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(graph).graph.initializer)


# Beside its weights a graph holds shapes, scales and rotary frequencies; batch normalisation melts into convolutions.
CONSTANTS = 1000


def test_every_weight_is_written_once(toy: Toy) -> None:
    """Prefixes, questions and single tokens share one graph; other exporters write the weights for each."""
    model, _ = load_checkpoint(toy.checkpoint)
    table = model.get_input_embeddings().weight.numel()
    language_model = model.language_model.num_parameters()
    expected = {
        "vision.onnx": model.num_parameters() - language_model,
        "embed.onnx": table,
        "decoder.onnx": language_model - table,
    }
    for name, count in expected.items():
        assert abs(count_written(toy.bundle / name) - count) <= CONSTANTS, name


def test_tied_head_is_exported_and_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """The tied table stands in embed.onnx and, as the head, in decoder.onnx; nothing else is there twice."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    language_model = LlamaForCausalLM(config).eval()
    first = export_decoder(language_model, tmp_path / "first.onnx", opset=20)
    second = export_decoder(language_model, tmp_path / "second.onnx", opset=20)
    assert first == second
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    assert abs(count_written(tmp_path / "first.onnx") - language_model.num_parameters()) <= CONSTANTS
    graph = Graph(tmp_path / "first.onnx", providers=[CPU], threads=1)
    embeddings = torch.randn(2, 3, 32)
    outputs = graph.run(
        {
            "inputs_embeds": embeddings.numpy(),
            "attention_mask": np.ones((2, 3), np.int64),
            "position_ids": np.tile(np.arange(3), (2, 1)),
            "logits_positions": np.array([0, 2]),
            **{f"past_key_values.0.{kind}": np.zeros((2, 2, 0, 16), np.float32) for kind in ("key", "value")},
        },
        on_host=["logits"],
    )
    with torch.no_grad():
        expected = language_model(inputs_embeds=embeddings).logits[:, [0, 2]]
    np.testing.assert_allclose(outputs["logits"].numpy(), expected, atol=1e-4)


def test_graphs_name_no_file_of_this_machine(toy: Toy) -> None:
    for name in ("vision.onnx", "embed.onnx", "decoder.onnx"):
        content = (toy.bundle / name).read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


def test_recorded_parity_stands_in_the_manifest_and_leaves_the_digest(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    report = measure_parity(toy.checkpoint, tmp_path / "bundle", make_groups(), items=3, max_new_tokens=2)
    assert report.items == 3
    (tmp_path / "parity.json").write_text(report.model_dump_json())
    assert load_parity(tmp_path / "parity.json") == report
    record_parity(tmp_path / "bundle", report)
    recorded = load_bundle(tmp_path / "bundle").manifest
    assert recorded["parity"]["token_match"] == report.token_match
    assert recorded["digest"] == toy.manifest.digest


def test_parity_sees_a_bundle_of_other_weights(toy: Toy, tmp_path: Path) -> None:
    """A report that is always good would be worth nothing."""
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / "decoder.onnx")
    heads = [tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [32, VOCABULARY]]
    assert len(heads) == 1
    values = onnx.numpy_helper.to_array(heads[0])
    heads[0].CopyFrom(onnx.numpy_helper.from_array(-values, heads[0].name))
    onnx.save(model, tmp_path / "bundle" / "decoder.onnx")
    rewrite_manifest(tmp_path / "bundle")
    report = measure_parity(toy.checkpoint, tmp_path / "bundle", make_groups(), items=5, max_new_tokens=4)
    assert report.token_match < 1.0
    assert report.max_abs_logit > 0.1
    assert len(report.mismatches) == round(5 * (1 - report.token_match))


def test_padding_and_truncation_of_the_tokenizer_stay_behind(tmp_path: Path) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    _save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(saved.encode("what colour is this?", add_special_tokens=False).ids) > 2
    assert len(saved.encode("a", add_special_tokens=False).ids) == 1
    assert len(tokenizer.encode("what colour is this?").ids) == 9


def test_parity_without_questions_is_refused(toy: Toy) -> None:
    with pytest.raises(EvaluationError, match="no question"):
        measure_parity(toy.checkpoint, toy.bundle, [Group((), ())], items=5, max_new_tokens=4)


def test_model_that_a_bundle_would_cut_short_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_checkpoint(toy.checkpoint)
    sizes = dict.fromkeys(ENCODERS, 64)
    check_exportable(model, sizes, num_image_tokens=4)
    with pytest.raises(BundleError, match="4 visual tokens an image"):
        check_exportable(model, sizes, num_image_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_images", lambda _pixels: ("tokens", "and what lies behind them"))
        with pytest.raises(BundleError, match=r"model\.reinjection"):
            check_exportable(model, sizes, num_image_tokens=4)
    model.config.layout = {"newline": True}
    with pytest.raises(BundleError, match=r"model\.layout"):
        check_exportable(model, sizes, num_image_tokens=4)


def test_export_of_a_broken_checkpoint_leaves_nothing(toy: Toy, tmp_path: Path, recipe: Recipe) -> None:
    shutil.copytree(toy.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", recipe=recipe, data_md5=MD5, code_digest="c")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


ANSWERS_WITHOUT_TORCH = """
import importlib.abc, json, sys

REFUSED = {"torch", "transformers", "timm", "kfp", "mlflow", "pydantic", "pandas", "pyarrow", "onnx", "onnxscript"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
from pathlib import Path
from manyeyes.runtime.bundle import Group, load_bundle

bundle = load_bundle(sys.argv[1], threads=1)
image = Path(sys.argv[2]).read_bytes()
groups = [Group((image,), ("red?", "what colour is the circle?"))]
answers = bundle.answer_groups(groups, max_new_tokens=8)
print(json.dumps([list(answer.token_ids) for answer in answers[0]]))
assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
"""


def test_a_process_that_refuses_torch_answers_the_same(toy: Toy, loaded: Bundle, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture(2))
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS_WITHOUT_TORCH, str(toy.bundle), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = loaded.answer_groups([Group((picture(2),), ("red?", "what colour is the circle?"))], max_new_tokens=8)[0]
    assert json.loads(done.stdout) == [list(answer.token_ids) for answer in here]


def rewrite_manifest(bundle: Path) -> None:
    """Make checksums true again after a change."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["digest"] = digest_files(manifest["files"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_flipped_byte_is_refused_by_name(toy: Toy, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    flip_byte(tmp_path / "bundle" / name)
    with pytest.raises(BundleError, match=f"{name} has sha256"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "embed.onnx").unlink(), "embed.onnx is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda bundle: (bundle / "manifest.json").write_text("[]"), "manifest.json holds a list"),
        (lambda bundle: (bundle / "vision.onnx").write_bytes(b"short"), "vision.onnx has 5 bytes"),
        (lambda bundle: edit_json(bundle / "manifest.json", format_version=2), "format_version 2"),
        (lambda bundle: edit_json(bundle / "manifest.json", digest="f" * 64), "has digest 'ffff"),
        (lambda bundle: edit_json(bundle / "manifest.json", files={}), "lists no vision.onnx"),
    ],
)
def test_damaged_bundle_is_refused(toy: Toy, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree(toy.bundle, tmp_path / "bundle")
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
    toy: Toy, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """Checksums are true here: somebody exported this."""
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    rewrite_manifest(tmp_path / "bundle")
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "bundle")


def test_file_name_that_leaves_the_folder_is_refused(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    manifest = json.loads((toy.bundle / "manifest.json").read_text())
    files = {**manifest["files"], "../secret": {"sha256": "0" * 64, "bytes": 1}}
    edit_json(tmp_path / "bundle" / "manifest.json", files=files, digest=digest_files(files))
    with pytest.raises(BundleError, match="plain file names"):
        load_bundle(tmp_path / "bundle")


def test_verification_can_be_left_out(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy.bundle, tmp_path / "bundle")
    content = (tmp_path / "bundle" / "chat.json").read_text()
    (tmp_path / "bundle" / "chat.json").write_text(content.replace('"system": ""', '"system":"!"'))
    assert load_bundle(tmp_path / "bundle", verify=False).answer("red?")
    with pytest.raises(BundleError, match=r"chat\.json has sha256"):
        load_bundle(tmp_path / "bundle")
