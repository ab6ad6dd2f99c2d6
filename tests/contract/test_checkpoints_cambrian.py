"""Cambrian-1's layout to ours: image bytes in, logits out, against its formulas computed apart from our own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from manyeyes.converters import cambrian
from manyeyes.converters import encoder_layouts as convnext
from manyeyes.converters import encoder_layouts as transformer_encoders
from manyeyes.converters.convert import convert
from manyeyes.converters.logits import prompt_logits
from manyeyes.errors import CheckpointError, SourceError
from tests import published_sizes as sizes
from tests import published_toys as toys
from tests.published_cambrian import NAMES, CambrianToy, dinov2_of_transformers_4

TOLERANCE = 1e-4
PICTURE = toys.photograph(90, 61)


def _check(toy: CambrianToy, out: Path, data: bytes) -> None:
    expected = toy.logits(toys.piece_ids(toy.folder, toys.PROMPT), data)
    found = prompt_logits(out, prompt=toys.QUESTION, images=[data])
    assert found.logits.shape == expected.shape
    np.testing.assert_allclose(found.logits, expected, atol=TOLERANCE, rtol=0)


def test_cambrian_looks_back_and_gives_its_logits(tmp_path: Path) -> None:
    toy = CambrianToy(tmp_path / "cambrian")
    towers = toy.write_towers(tmp_path / "towers")
    facts = toy.write_facts(tmp_path / "facts.json")
    report = convert(toy.write(), tmp_path / "out", encoders=str(towers), encoder_configs=facts)
    assert report.system == "cambrian"
    assert report.template == "vicuna_v1"
    assert report.left == {}
    assert report.notes == []
    for data in (PICTURE, toys.photograph(50, 80), toys.photograph(64, 64)):
        _check(toy, tmp_path / "out", data)
    _check_ids_and_pixels(toy, tmp_path)


def _check_ids_and_pixels(toy: CambrianToy, folder: Path) -> None:
    ids, pixels = folder / "ids.json", folder / "pixels.safetensors"
    numbers = toys.piece_ids(toy.folder, toys.PROMPT)
    ids.write_text(json.dumps({"input_ids": numbers, "image_sizes": [[90, 61]]}), encoding="utf-8")
    names = ("siglip", "clip", "dinov2", "convnext")
    save_file({name: toy.pixels(PICTURE, place).contiguous() for place, name in enumerate(names)}, pixels)
    found = prompt_logits(folder / "out", ids=ids, pixels=pixels)
    np.testing.assert_allclose(found.logits, toy.logits(numbers, PICTURE), atol=TOLERANCE, rtol=0)


def test_cambrian_with_two_groups_of_queries_and_nothing_inside_the_language_model(tmp_path: Path) -> None:
    toy = CambrianToy(tmp_path / "cambrian", query_sides=(4, 2), looks_back=False)
    towers = toy.write_towers(tmp_path / "towers")
    # As the first uploads said it.
    source = toy.write(model_type="llava_llama", image_position=7)
    facts = toy.write_facts(tmp_path / "facts.json")
    report = convert(source, tmp_path / "out", encoders=str(towers), encoder_configs=facts)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("image_position is 7, and vicuna_v1 puts an image at ")
    _check(toy, tmp_path / "out", PICTURE)


def test_encoders_that_are_nowhere_are_asked_for(tmp_path: Path) -> None:
    source = CambrianToy(tmp_path / "cambrian").write()
    with pytest.raises(SourceError, match=r'encoder "siglip" is "siglip/CLIP-ViT-SO400M-14-384".*Pass --encoders DIR'):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_towers_that_were_trained_with_the_model_come_out_of_the_checkpoint(tmp_path: Path) -> None:
    toy = CambrianToy(tmp_path / "cambrian")
    prefix = "vision_tower_aux_list.{}.vision_tower."
    toy.own |= {prefix.format(0) + key: tensor for key, tensor in toy.siglip.state_dict().items()}
    toy.own |= toys.tower_keys(toy.clip, prefix.format(1))
    toy.own |= {prefix.format(2) + key: tensor for key, tensor in dinov2_of_transformers_4(toy.dinov2).items()}
    toy.own |= {prefix.format(3) + key: tensor for key, tensor in toy.convnext.state_dict().items()}
    facts = toy.write_facts(tmp_path / "facts.json", clip={"num_attention_heads": 3}, dinov2={"num_attention_heads": 3})
    report = convert(toy.write(unfreeze_mm_vision_tower=True), tmp_path / "out", encoder_configs=facts)
    assert set(report.encoders.values()) == {"checkpoint"}
    assert "model.vision_tower_aux_list.2.vision_tower.embeddings.mask_token" in report.left
    _check(toy, tmp_path / "out", PICTURE)


def test_keys_are_named_as_published_when_they_are_missing_misshapen_or_left_over(tmp_path: Path) -> None:
    toy = CambrianToy(tmp_path / "cambrian")
    towers, facts = toy.write_towers(tmp_path / "towers"), toy.write_facts(tmp_path / "facts.json")
    del toy.own["vision_sampler_layers.1.layers.0.cross_attn.k_proj_3.1.weight"]
    toy.own["vision_sampler_0.layers.1.pos_embed_3"] = torch.zeros(4, 32)
    toy.own["vision_sampler_0.layers.0.weight_mlp.linear_1.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        convert(toy.write(), tmp_path / "out", encoders=str(towers), encoder_configs=facts)
    message = str(caught.value)
    missing = (
        '"model.vision_sampler_layers.1.layers.0.cross_attn.k_proj_3.1.weight" (for reinjection.samplers.1.keys.3.1'
    )
    assert f"missing {missing}" in message
    assert 'left over "model.vision_sampler_0.layers.0.weight_mlp.linear_1.weight" [2, 2]' in message
    assert (
        '"model.vision_sampler_0.layers.1.pos_embed_3" [4, 32], for fusion.samplers.0.1.positions.3 [16, 32]' in message
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token_len": 15}, r"image_token_len 15; the square of a whole number"),
        ({"query_num_list": None, "connector_depth": None}, r"has no query_num_list, connector_depth; the numbers"),
        ({"stride_of_vision_sampler_layers": None}, r"has no stride_of_vision_sampler_layers; the numbers"),
        ({"mm_vision_tower_aux_token_len_list": [16, 16, 16]}, r"names 4 encoders, .* has 3 entries"),
        ({"mm_vision_tower_aux_list": ["ijepa/vith14"] * 4}, r'names "ijepa/vith14"; SigLIP SO400M, OpenAI'),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = CambrianToy(tmp_path / "cambrian").write(**changes)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out")


def test_cambrian_8b_at_its_true_size_has_the_published_numbers_of_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = sizes.cambrian_towers()
    for name in shapes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        (tmp_path / name / "open_clip_model.safetensors").touch()
    for module in (convnext, transformer_encoders):
        monkeypatch.setattr(module, "outside_shapes", lambda file: shapes[file.parent.name])
    language = {**sizes.VICUNA_7B, "intermediate_size": 14336, "vocab_size": 128256}
    names = [*NAMES[:2], "facebook/dinov2-giant-res378", "clip-convnext-XXL-multi-stage"]
    config = {**language, "model_type": "cambrian_llama", "mm_vision_tower_aux_list": names}
    config |= {"mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216], "image_token_len": 576}
    config |= {"query_num_list": [576], "num_query_group": 1, "vision_hidden_size": 1024, "connector_depth": 3}
    config |= {"mm_projector_type": "sva", "connector_only": False, "num_of_vision_sampler_layers": 10}
    config |= {"start_of_vision_sampler_layers": 0, "stride_of_vision_sampler_layers": 3}
    stored = {**sizes.llama_shapes(language), **sizes.cambrian_connector()}
    plan, resolution = sizes.resolve(cambrian.SYSTEM, config, stored, tmp_path, encoders=str(tmp_path))
    assert [(entry.row, entry.image_size, dict(entry.architecture)) for entry in plan.encoders] == [
        ("siglip-so400m14-384", 384, {}),
        ("clip-l14-336", 336, {}),
        ("dinov2-g14-518", 378, {}),
        ("convnext-xxl-1024-stages", 1024, {}),
    ]
    assert plan.encoders[0].transform.fill == (122, 116, 104)
    assert not resolution.left
    counts = {
        part: sum(
            torch.Size(stored[source]).numel()
            for key, assignment in resolution.assignments.items()
            if key.startswith(part)
            for source in assignment.sources
        )
        for part in ("fusion.projections.", "fusion.samplers.", "reinjection.", "projector.")
    }
    # What the published model has of each.
    assert [round(count / 1e6, 1) for count in counts.values()] == [13.9, 47.3, 220.6, 21.0]
