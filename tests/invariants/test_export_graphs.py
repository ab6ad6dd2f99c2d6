"""What the graphs and files of a bundle hold."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from manyeyes.errors import BundleError, CheckpointError
from manyeyes.estimate.skeleton import count_checkpoint
from manyeyes.export.bundle import _save_tokenizer, export_bundle, load_manifest
from manyeyes.export.graphs import check_exportable, export_decoder
from manyeyes.model import checkpoint_digest, load_checkpoint
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.bundle_contents import DECODER, EMBED, REQUIRED_FILES, VISION, ChatFile, PreprocessFile
from manyeyes.runtime.sessions import CPU, Graph
from tests.export_toys import MD5, VOCABULARY, Toy, count_written, make_tokenizer


def test_manifest_says_where_the_bundle_comes_from(toy_bundle: Toy, loaded_bundle: Bundle, tiny_recipe: Recipe) -> None:
    manifest = load_manifest(toy_bundle.bundle)
    assert manifest == toy_bundle.manifest
    assert set(manifest.files) == set(REQUIRED_FILES)
    written = {
        path.relative_to(toy_bundle.bundle).as_posix() for path in toy_bundle.bundle.rglob("*") if path.is_file()
    }
    assert written == {*REQUIRED_FILES, "manifest.json"}
    assert manifest.ours_alone == ["2 encoders"]
    for name, file in manifest.files.items():
        content = (toy_bundle.bundle / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert manifest.recipe_digest == tiny_recipe.digest
    assert manifest.model == count_checkpoint(toy_bundle.checkpoint)
    assert manifest.model is not None
    model, _ = load_checkpoint(toy_bundle.checkpoint)
    assert manifest.model.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert manifest.checkpoint_digest == checkpoint_digest(toy_bundle.checkpoint)
    assert loaded_bundle.manifest["digest"] == manifest.digest
    PreprocessFile.model_validate_json((toy_bundle.bundle / "preprocess.json").read_text(encoding="utf-8"))
    ChatFile.model_validate_json((toy_bundle.bundle / "chat.json").read_text(encoding="utf-8"))


def test_manifest_names_every_input_and_its_dynamic_axes(toy_bundle: Toy) -> None:
    graphs = toy_bundle.manifest.graphs
    assert {value.name: value.shape for value in graphs[VISION].inputs} == {
        "vit": ["images", 3, 64, 64],
        "efficientnet": ["images", 3, 64, 64],
    }
    assert [(value.name, value.shape) for value in graphs[VISION].outputs] == [("image_features", ["images", 4, 32])]
    decoder = {value.name: (value.dtype, value.shape) for value in graphs[DECODER].inputs}
    assert decoder["attention_mask"] == ("int64", ["batch_size", "total"])
    assert decoder["past_key_values.1.value"] == ("float32", ["batch_size", 2, "past", 8])
    assert len(decoder) == 4 + 2 * 2
    outputs = {value.name: value.shape for value in graphs[DECODER].outputs}
    assert outputs["logits"] == ["batch_size", "kept", VOCABULARY]
    assert set(outputs) == {"logits", *(f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value"))}


# Beside its weights a graph holds shapes, scales and rotary frequencies; batch normalisation melts into convolutions.
CONSTANTS = 1000


def test_every_weight_is_written_once(toy_bundle: Toy) -> None:
    """Prefixes, questions and single tokens share one graph; other exporters write the weights for each."""
    model, _ = load_checkpoint(toy_bundle.checkpoint)
    table = model.get_input_embeddings().weight.numel()
    language_model = model.language_model.num_parameters()
    expected = {
        VISION: model.num_parameters() - language_model,
        EMBED: table,
        DECODER: language_model - table,
    }
    for name, count in expected.items():
        assert abs(count_written(toy_bundle.bundle / name) - count) <= CONSTANTS, name


def test_tied_head_is_exported_and_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """The tied table stands in one graph and, as the head, in another; nothing else is there twice."""
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
    with torch.no_grad():
        expected = language_model(inputs_embeds=embeddings).logits
    for keep, count in ((0, 3), (1, 1), (2, 2), (9, 3)):
        outputs = graph.run(
            {
                "inputs_embeds": embeddings.numpy(),
                "attention_mask": np.ones((2, 3), np.int64),
                "position_ids": np.tile(np.arange(3), (2, 1)),
                "num_logits_to_keep": np.array(keep),
                **{f"past_key_values.0.{kind}": np.zeros((2, 2, 0, 16), np.float32) for kind in ("key", "value")},
            },
            on_host=["logits"],
        )
        np.testing.assert_allclose(outputs["logits"].numpy(), expected[:, -count:], atol=1e-4)


def test_graphs_name_no_file_of_this_machine(toy_bundle: Toy) -> None:
    for name in (VISION, EMBED, DECODER):
        content = (toy_bundle.bundle / name).read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


def test_padding_and_truncation_of_the_tokenizer_stay_behind(tmp_path: Path) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    _save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(saved.encode("what colour is this?", add_special_tokens=False).ids) > 2
    assert len(saved.encode("a", add_special_tokens=False).ids) == 1
    assert len(tokenizer.encode("what colour is this?").ids) == 9


def test_model_that_its_processor_does_not_fit_is_refused(toy_bundle: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_checkpoint(toy_bundle.checkpoint)
    check_exportable(model, processor)
    with monkeypatch.context() as patch:
        patch.setattr(processor, "num_image_tokens", 5)
        with pytest.raises(BundleError, match="4 visual tokens a tile"):
            check_exportable(model, processor)
    model.encoders["layout"] = model.encoders["vit"]
    with pytest.raises(BundleError, match='an encoder is called "layout"'):
        check_exportable(model, processor)


def test_export_of_a_broken_checkpoint_leaves_nothing(toy_bundle: Toy, tmp_path: Path, tiny_recipe: Recipe) -> None:
    shutil.copytree(toy_bundle.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", recipe=tiny_recipe, data_md5=MD5, code_digest="c")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
