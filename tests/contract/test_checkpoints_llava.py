"""LLaVA's layouts to ours: image bytes in, logits out, against its formulas computed apart from this project's code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyeyes.converters.convert import ConversionReport, convert
from manyeyes.converters.logits import prompt_logits
from manyeyes.errors import CheckpointError
from manyeyes.model import load_checkpoint
from tests import published_toys as toys
from tests.published_toys import PROMPT, QUESTION, LlavaToy

TOLERANCE = 1e-4
PICTURE = toys.photograph(90, 61)


def _expected(toy: LlavaToy, *, aspect: str = "pad", prompt: str = PROMPT, layer: int = -2) -> np.ndarray:
    pixels = toys.pixels_of(PICTURE, size=toys.SIZE, aspect=aspect)
    ids = toys.piece_ids(toy.folder, prompt, added=toy.added)
    return toy.logits(ids, [toy.image_tokens(pixels, layer=layer)]).numpy()


def _clip_folder(tmp_path: Path, toy: LlavaToy) -> str:
    folder = tmp_path / "encoders"
    toy.tower = toys.make_clip(folder)
    return str(folder)


def _check(out: Path, expected: np.ndarray, *, prompt: str = QUESTION) -> None:
    found = prompt_logits(out, prompt=prompt, images=[PICTURE])
    assert found.logits.shape == expected.shape
    np.testing.assert_allclose(found.logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("shards", "form"), [(1, "bin"), (3, "bin"), (2, "safetensors")])
def test_llava_1_5_without_its_tower_gives_its_logits(tmp_path: Path, shards: int, form: str) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write(shards=shards, form=form)
    report = convert(source, tmp_path / "out", encoders=encoders)
    assert report.system == "llava"
    assert report.template == "vicuna_v1"
    assert report.left == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed: rotary frequencies follow from the configuration"
    }
    _check(tmp_path / "out", _expected(toy))


TOWER_CONFIG = {
    "hidden_size": toys.TOWER_WIDTH,
    "intermediate_size": 72,
    "num_hidden_layers": toys.TOWER_DEPTH,
    "num_attention_heads": 3,
    "patch_size": toys.PATCH,
    "image_size": toys.SIZE,
}


def _encoder_config(tmp_path: Path) -> Path:
    file = tmp_path / "encoders.json"
    file.write_text(json.dumps({"clip": TOWER_CONFIG}), encoding="utf-8")
    return file


def test_tower_in_the_shards_counts_where_it_was_trained(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    source = toy.write(tower=True, shards=2, unfreeze_mm_vision_tower=True, mm_vision_select_layer=-1)
    other = tmp_path / "other"
    toys.make_clip(other, seed=9)
    report = convert(source, tmp_path / "out", encoders=str(other), encoder_configs=_encoder_config(tmp_path))
    assert report.encoders == {"clip": "checkpoint"}
    _check(tmp_path / "out", _expected(toy, layer=-1))


def test_tower_in_the_shards_gives_way_to_the_named_one_where_it_was_frozen(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    source = toy.write(tower=True)
    named = tmp_path / "other"
    toy.tower = toys.make_clip(named, seed=9)
    report = convert(source, tmp_path / "out", encoders=str(named))
    assert report.encoders == {"clip": str(named)}
    assert sum("LLaVA loads the tower from" in why for why in report.left.values()) == len(toy.tower.state_dict())
    _check(tmp_path / "out", _expected(toy))


def test_frozen_tower_in_the_shards_counts_where_no_other_is_there(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    source = toy.write(tower=True, form="bin")
    report = convert(source, tmp_path / "out", encoder_configs=_encoder_config(tmp_path))
    last = "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
    assert report.left[last] == "unused: features are taken after block 2"
    _check(tmp_path / "out", _expected(toy))


def test_v0_marks_images_crops_and_projects_in_one_layer(tmp_path: Path) -> None:
    added = ("<im_patch>", "<im_start>", "<im_end>")
    toy = LlavaToy(tmp_path / "llava", projector="linear", added=added)
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write(mm_use_im_start_end=True, mm_use_im_patch_token=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # Configurations of that time name neither; the first have the language model's own kind.
    del config["mm_projector_type"], config["image_aspect_ratio"]
    config["model_type"] = "llama"
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = convert(source, tmp_path / "out", encoders=encoders)
    assert report.template == "llava_v0"
    system = toys.SYSTEM.replace("user", "human")
    prompt = f"{system}###Human: <im_start><image><im_end>\n{QUESTION}###Assistant:"
    _check(tmp_path / "out", _expected(toy, aspect="square", prompt=prompt))


def test_tokens_that_the_published_loader_adds_are_added(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava", spare_rows=3)
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write(mm_use_im_start_end=True, mm_use_im_patch_token=True, vocab_size=toy.vocab_size - 3)
    convert(source, tmp_path / "out", encoders=encoders, template="vicuna_v1")
    toy.added = ("<im_patch>", "<im_start>", "<im_end>")
    prompt = PROMPT.replace("<image>", "<im_start><image><im_end>")
    _check(tmp_path / "out", _expected(toy, prompt=prompt))


def test_projector_of_the_first_stage_goes_on_its_language_model(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "base")
    encoders = _clip_folder(tmp_path, toy)
    base = toys.write_language_model(toy)
    source = tmp_path / "projector"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(toy.config(image_aspect_ratio="square")), encoding="utf-8")
    torch.save({f"model.{key}": tensor for key, tensor in toy.projector.items()}, source / "mm_projector.bin")
    convert(source, tmp_path / "out", encoders=encoders, base=base)
    _check(tmp_path / "out", _expected(toy, aspect="square"))


def test_projector_beside_the_shards_is_compared(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write()
    beside = {f"model.{key}": tensor.clone() for key, tensor in toy.projector.items()}
    beside["model.mm_projector.0.bias"] += 1
    torch.save(beside, source / "mm_projector.bin")
    report = convert(source, tmp_path / "out", encoders=encoders)
    assert report.notes == ["mm_projector.bin differs from the shards in model.mm_projector.0.bias; the shards count"]
    _check(tmp_path / "out", _expected(toy))


def test_lora_is_merged_and_what_was_trained_beside_it_counts(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "base")
    encoders = _clip_folder(tmp_path, toy)
    base = toys.write_language_model(toy)
    source = tmp_path / "lora"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(toy.config(model_type="llava_llama")), encoding="utf-8")
    wrapped = {f"base_model.model.model.{key}": tensor for key, tensor in toy.projector.items()}
    torch.save(wrapped, source / "non_lora_trainables.bin")
    rank, alpha = 2, 8
    settings = {"r": rank, "lora_alpha": alpha, "peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (source / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(4)
    changes: dict[str, torch.Tensor] = {}
    for layer in toy.language_model.model.layers:
        index = layer.self_attn.layer_idx
        for name, linear in (("self_attn.q_proj", layer.self_attn.q_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            down = torch.randn(rank, linear.in_features)
            up = torch.randn(linear.out_features, rank) / 10
            stem = f"base_model.model.model.layers.{index}.{name}"
            changes |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            linear.weight.data += (alpha / rank) * up @ down
    save_file(changes, source / "adapter_model.safetensors")
    report = convert(source, tmp_path / "out", encoders=encoders, base=base)
    assert report.adapter["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (
        "model.layers.1.mlp.down_proj.weight"
    )
    _check(tmp_path / "out", _expected(toy))


def test_differences_are_added_to_their_base(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava", added=("<im_patch>",))
    encoders = _clip_folder(tmp_path, toy)
    base = tmp_path / "base"
    base.mkdir()
    whole = toy.language_model.state_dict()
    torch.manual_seed(6)
    # The base knows nothing of the last token.
    below = {
        key: torch.randn_like(t)[:-1] if key in ("model.embed_tokens.weight", "lm_head.weight") else torch.randn_like(t)
        for key, t in whole.items()
    }
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    toys.write_weights(base, below, shards=2, form="bin")
    source = toy.write(mm_use_im_patch_token=True)
    differences = toy.tensors()
    for key, tensor in below.items():
        differences[key][: len(tensor)] -= tensor
    toys.write_weights(source, differences, shards=1, form="safetensors")
    report = convert(source, tmp_path / "out", encoders=encoders, base=base)
    assert report.notes == [f"differences from {base}, added to it"]
    _check(tmp_path / "out", _expected(toy))


def test_differences_from_something_else_are_refused(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write()
    with pytest.raises(CheckpointError, match=r'encoders has no "lm_head\.weight" and 20 more keys'):
        convert(source, tmp_path / "out", encoders=encoders, base=Path(encoders))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mistral", "mpt"])
def test_other_language_models_convert_too(tmp_path: Path, family: str) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    vision = {key: value for key, value in toy.config().items() if key.startswith(("mm_", "image_", "use_mm"))}
    toy.language_model = toys.make_language_model(family, toy.vocab_size)
    fields = toy.language_model.config.to_dict()
    tensors = {key: tensor.clone() for key, tensor in toy.language_model.state_dict().items()}
    home = "transformer" if family == "mpt" else "model"
    tensors |= {f"{home}.{key}": tensor for key, tensor in toy.projector.items()}
    source = toy.folder
    config = {**fields, **vision, "model_type": f"llava_{family}"}
    (source / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    toys.write_weights(source, tensors, shards=1, form="safetensors")
    report = convert(source, tmp_path / "out", encoders=encoders, template="vicuna_v1")
    assert report.system == "llava"
    _check(tmp_path / "out", _expected(toy))


@pytest.mark.parametrize("as_text", [False, True])
def test_1_6_cuts_tiles_unpads_them_and_ends_rows(tmp_path: Path, as_text: bool) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    size, grid = toys.SIZE, toys.SIZE // toys.PATCH
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    source = toy.write(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        # LLaVA's training script stores the text that it was given.
        image_grid_pinpoints=str([tuple(pair) for pair in pinpoints]) if as_text else pinpoints,
    )
    weights = toy.tensors()
    newline = weights["model.image_newline"] = torch.randn(toys.WIDTH)
    toys.write_weights(source, weights, shards=1, form="safetensors")
    convert(source, tmp_path / "out", encoders=encoders)
    # 90 x 61 on 112 x 112: resized to 112 x 76, in the middle of black; unpadded to 5 or so of 8 rows of tokens.
    picture = toys.decoded(PICTURE)
    black = toys.on_black(picture.resize((112, 76), toys.BICUBIC), 112, 112)
    boxes = [(x, y, x + size, y + size) for y in (0, size) for x in (0, size)]
    tiles = [toy.image_tokens(toys.normalised(tile))[None] for tile in map(black.crop, boxes)]
    rows = torch.cat(tiles).view(2, 2, grid, grid, -1).permute(0, 2, 1, 3, 4).reshape(2 * grid, 2 * grid, -1)
    margin = (8 - int(61 * (8 / 90))) // 2
    kept = rows[margin : 8 - margin]
    ended = torch.cat([kept, newline.expand(len(kept), 1, -1)], dim=1).flatten(0, 1)
    whole = toy.image_tokens(toys.normalised(picture.resize((size, size), toys.BICUBIC)))
    ids = toys.piece_ids(toy.folder, PROMPT)
    _check(tmp_path / "out", toy.logits(ids, [torch.cat([whole, ended])]).numpy())


def test_one_tile_has_no_newline_whatever_the_merge(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write(image_aspect_ratio="pad", mm_patch_merge_type="spatial_unpad")
    weights = toy.tensors()
    weights["model.image_newline"] = torch.randn(toys.WIDTH)
    toys.write_weights(source, weights, shards=1, form="safetensors")
    report = convert(source, tmp_path / "out", encoders=encoders)
    assert report.left["model.image_newline"] == "unused: no rows to end, by its configuration"
    _check(tmp_path / "out", _expected(toy))


def test_pixels_and_ids_from_elsewhere_give_the_same_logits(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    convert(toy.write(), tmp_path / "out", encoders=encoders)
    save_file({"images": toys.pixels_of(PICTURE, size=toys.SIZE, aspect="pad")}, tmp_path / "pixels.safetensors")
    (tmp_path / "ids.json").write_text(json.dumps([toys.piece_ids(toy.folder, PROMPT)]), encoding="utf-8")
    given = prompt_logits(tmp_path / "out", ids=tmp_path / "ids.json", pixels=tmp_path / "pixels.safetensors")
    whole = prompt_logits(tmp_path / "out", prompt=PROMPT, images=[PICTURE])
    assert given.token_ids == whole.token_ids
    for found in (given, whole):
        np.testing.assert_allclose(found.logits, _expected(toy), atol=TOLERANCE, rtol=0)


def test_text_without_an_image_is_the_language_models_own(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    convert(toy.write(), tmp_path / "out", encoders=encoders)
    ids = toys.piece_ids(toy.folder, PROMPT.replace("<image>\n", ""))
    found = prompt_logits(tmp_path / "out", prompt=QUESTION)
    np.testing.assert_allclose(found.logits, toy.logits(ids, []).numpy(), atol=TOLERANCE, rtol=0)


def _in_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}


def test_half_precision_stays_half_precision_and_an_encoder_beside_it_stays_whole(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    encoders = _clip_folder(tmp_path, toy)
    source = toy.write()
    (source / "model.safetensors").unlink()
    toys.write_weights(source, _in_half(toy.tensors()), shards=2, form="bin")
    report = convert(source, tmp_path / "out", encoders=encoders)
    assert report.dtype == "bfloat16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["language_model.lm_head.weight"].dtype == torch.bfloat16
    assert stored["encoders.clip.net.cls_token"].dtype == torch.float32
    assert {parameter.dtype for parameter in load_checkpoint(tmp_path / "out")[0].parameters()} == {torch.bfloat16}
    for parameter in toy.language_model.parameters():
        # Weights alone: rotary frequencies stay as they are.
        parameter.data = parameter.data.to(torch.bfloat16).float()
    toy.projector = {key: tensor.to(torch.bfloat16).float() for key, tensor in toy.projector.items()}
    _check(tmp_path / "out", _expected(toy))


def test_lora_on_half_precision_is_not_rounded(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "base")
    encoders = _clip_folder(tmp_path, toy)
    base = toys.write_language_model(toy)
    for file in (*base.glob("*.bin"), base / "pytorch_model.bin.index.json"):
        file.unlink()
    toys.write_weights(base, _in_half(toy.language_model.state_dict()), shards=1, form="safetensors")
    source = tmp_path / "lora"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(toy.config()), encoding="utf-8")
    torch.save({f"base_model.model.model.{k}": t for k, t in toy.projector.items()}, source / "non_lora_trainables.bin")
    (source / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}), encoding="utf-8")
    torch.manual_seed(4)
    down, up = torch.randn(2, toys.WIDTH), torch.randn(toys.WIDTH, 2) / 100
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, source / "adapter_model.safetensors")
    for parameter in toy.language_model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    toy.language_model.model.layers[0].self_attn.q_proj.weight.data += 4 * up @ down
    report = convert(source, tmp_path / "out", encoders=encoders, base=base)
    assert report.dtype == "bfloat16"
    _check(tmp_path / "out", _expected(toy))


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    toy = LlavaToy(tmp_path / "llava")
    source = toy.write(tower=True)
    convert(source, tmp_path / "out", encoder_configs=_encoder_config(tmp_path))
    report = ConversionReport.model_validate_json((tmp_path / "out" / "conversion.json").read_text(encoding="utf-8"))
    converted = {source for sources in report.converted.values() for source in sources}
    assert converted | set(report.left) == set(toy.tensors(tower=True))
    assert not converted & set(report.left)
