"""Published checkpoints that are damaged, incomplete or of another kind: what a converter says, and leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyeyes.converters.convert import convert
from manyeyes.errors import CheckpointError, ManyEyesError, RecipeError, SourceError
from tests import published_toys as toys
from tests.published_toys import LlavaToy

PICTURE = toys.photograph(90, 61)


@pytest.fixture
def toy(tmp_path: Path) -> LlavaToy:
    return toys.llava_beside_clip(tmp_path)


def _convert(tmp_path: Path, **options: Any) -> Path:
    convert(tmp_path / "llava", tmp_path / "out", **{"encoders": str(tmp_path / "clip"), **options})
    return tmp_path / "out"


def _refusal(tmp_path: Path, kind: type[ManyEyesError] = CheckpointError, **options: Any) -> str:
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(kind) as caught:
        _convert(tmp_path, **options)
    assert {entry.name for entry in tmp_path.iterdir()} == before, "something half-written is left"
    return str(caught.value)


def test_missing_key_is_named_as_published(tmp_path: Path, toy: LlavaToy) -> None:
    tensors = toy.tensors()
    del tensors["model.mm_projector.2.bias"]
    toy.write()
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert 'missing "model.mm_projector.2.bias" (for projector.layers.linear_2.bias [32])' in message


def test_extra_key_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    tensors = toy.tensors() | {"model.mm_projector.4.weight": torch.zeros(2, 3)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    assert 'left over "model.mm_projector.4.weight" [2, 3]' in _refusal(tmp_path)


def test_misshapen_key_is_named_on_both_sides(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    tensors = toy.tensors() | {"model.mm_projector.0.weight": torch.zeros(32, 47)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert 'misshapen "model.mm_projector.0.weight" [32, 47], for projector.layers.linear_1.weight [32, 48]' in message


def test_misshapen_part_of_a_joined_tensor_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(tower=True, unfreeze_mm_vision_tower=True)
    key = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight"
    tensors = toy.tensors(tower=True) | {key: torch.zeros(48, 47)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert f'"{key}" [48, 47]' in message
    assert "which do not give encoders.clip.net.blocks.0.attn.qkv.weight [144, 48]" in message


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_shard_is_named(tmp_path: Path, toy: LlavaToy, form: str) -> None:
    toy.write(shards=2, form=form)
    name = "model-00002-of-00002.safetensors" if form == "safetensors" else "pytorch_model-00002-of-00002.bin"
    whole = (toy.folder / name).read_bytes()
    (toy.folder / name).write_bytes(whole[: len(whole) // 2])
    message = _refusal(tmp_path)
    assert f"{name} cannot be read" in message
    assert "a whole file of tensors. Fetch it again." in message


def test_index_that_names_an_absent_file_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(shards=2)
    (toy.folder / "model-00001-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json names model-00001-of-00002.safetensors, not in" in _refusal(tmp_path)


def test_index_that_promises_other_keys_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(shards=2)
    index = toy.folder / "model.safetensors.index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    values["weight_map"]["model.image_newline"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values), encoding="utf-8")
    assert 'promises "model.image_newline" in model-00001-of-00002.safetensors (1 keys)' in _refusal(tmp_path)


class _Bomb:
    def __init__(self, action: Callable[[str], object], argument: str) -> None:
        self._made = (action, (argument,))

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_unread(tmp_path: Path, toy: LlavaToy, zipped: bool) -> None:
    toy.write()
    (toy.folder / "model.safetensors").unlink()
    harmed = tmp_path / "harmed"
    torch.save(
        {"model.norm.weight": _Bomb(os.mkdir, str(harmed))},
        toy.folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    message = _refusal(tmp_path)
    assert "pytorch_model.bin is a pickle with code in it" in message
    assert "nothing of it was run" in message
    assert not harmed.exists()


def test_unknown_system_lists_those_known(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(model_type="blip-2", architectures=["Blip2ForConditionalGeneration"])
    message = _refusal(tmp_path)
    assert "model_type 'blip-2'" in message
    assert "llava (model_type llava, llava_llama, llava_mistral, llava_mpt or llama, and one mm_vision" in message
    assert "llava-hf (" in message


def test_absent_encoder_says_what_to_pass(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    message = _refusal(tmp_path, SourceError, encoders=None)
    assert 'encoder "clip" is "openai/clip-vit-large-patch14-336", which is neither in the checkpoint' in message
    assert "--encoders DIR" in message
    assert "hub:<id>@<revision>" in message


def test_encoder_folder_that_is_not_there_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    assert "a folder, hub:<id>@<revision>, or hub" in _refusal(tmp_path, SourceError, encoders=str(tmp_path / "no"))


def test_encoder_without_its_tensors_leaves_nothing_behind(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    save_file({key: t for key, t in weights.items() if "pre_layrnorm" not in key}, tmp_path / "clip/model.safetensors")
    assert "missing norm_pre.bias, norm_pre.weight (2)" in _refusal(tmp_path, SourceError)


def test_tower_of_unknown_heads_asks_for_its_configuration(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(tower=True, unfreeze_mm_vision_tower=True)
    message = _refusal(tmp_path, encoders=None)
    assert 'encoder "clip" has hidden_size 48' in message
    assert "its number of heads, which no tensor tells" in message
    assert '--encoder-config FILE.json with {"clip": {"num_attention_heads"' in message


def test_configuration_of_an_encoder_that_is_not_there_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "configs.json").write_text(json.dumps({"clop": {}}), encoding="utf-8")
    message = _refusal(tmp_path, encoder_configs=tmp_path / "configs.json")
    assert '--encoder-config has "clop"' in message
    assert 'Did you mean "clip"?' in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer'"),
        ({"s2": True}, "s2 True"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type 'spatial_maxpool2x2'"),
        ({"mm_projector_type": "mlp_swiglu"}, 'mm_projector_type "mlp_swiglu"'),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9"),
        ({"image_aspect_ratio": "anyres"}, 'image_aspect_ratio "anyres" and mm_patch_merge_type "flat"'),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    tmp_path: Path, toy: LlavaToy, changes: dict[str, Any], words: str
) -> None:
    toy.write(**changes)
    assert words in _refusal(tmp_path)


def test_adapter_without_its_base_says_what_to_pass(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (toy.folder / "model.safetensors").unlink()
    settings = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (toy.folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    message = _refusal(tmp_path)
    assert 'is a LoRA adapter of "lmsys/vicuna-7b-v1.5", which is not here' in message
    assert "--base FOLDER" in message


def test_broken_configuration_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (toy.folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    assert "config.json cannot be read" in _refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "wide"),
        ("num_hidden_layers", []),
        ("num_hidden_layers", 10**12),
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("model_type", []),
        ("mm_vision_select_layer", "last"),
        ("mm_vision_tower", 7),
        ("mm_projector_type", []),
        ("rms_norm_eps", "small"),
    ],
)
def test_configuration_that_makes_no_sense_is_refused(tmp_path: Path, toy: LlavaToy, field: str, value: object) -> None:
    toy.write()
    file = toy.folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, field: value}), encoding="utf-8")
    assert _refusal(tmp_path, ManyEyesError)


def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (toy.folder / "tokenizer.model").unlink()
    (toy.folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")
    assert "has no tokenizer" in _refusal(tmp_path)


def test_unknown_template_names_the_nearest(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    assert 'Did you mean "vicuna_v1"?' in _refusal(tmp_path, RecipeError, template="vicuna_v2")


def test_folder_of_something_else_is_not_replaced(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("words", encoding="utf-8")
    assert "exists and is no checkpoint of ManyEyes" in _refusal(tmp_path)
    assert (tmp_path / "out" / "thesis.tex").read_text(encoding="utf-8") == "words"


def test_preprocessing_of_another_size_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"crop_size": {"height": 42, "width": 42}}),
        encoding="utf-8",
    )
    assert "has crop_size {'height': 42, 'width': 42} in preprocessor_config.json" in _refusal(tmp_path)
