"""Eagle's layout to ours: image bytes in, logits out, against its formulas computed apart from our own code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from manyeyes.converters import eagle
from manyeyes.converters.convert import convert
from manyeyes.converters.logits import prompt_logits
from manyeyes.errors import CheckpointError
from tests import published_eagle
from tests import published_sizes as sizes
from tests import published_toys as toys
from tests.published_eagle import (
    CANVAS,
    EVA_DEPTH,
    EVA_GLOBAL,
    EVA_WINDOW,
    FACTS,
    X4,
    X5,
    EagleToy,
    published_towers,
    rotary,
)

TOLERANCE = 1e-4
PICTURE = toys.photograph(90, 61)


def _check(toy: EagleToy, out: Path) -> None:
    expected = toy.logits(toys.piece_ids(toy.folder, toys.PROMPT), toy.image_tokens(PICTURE))
    found = prompt_logits(out, prompt=toys.QUESTION, images=[PICTURE])
    assert found.logits.shape == expected.shape
    np.testing.assert_allclose(found.logits, expected, atol=TOLERANCE, rtol=0)


def test_eagle_x5_gives_its_logits(tmp_path: Path) -> None:
    toy = EagleToy(tmp_path / "eagle")
    source = toy.write(shards=3)
    report = convert(source, tmp_path / "out", encoder_configs=toy.write_facts(tmp_path / "facts.json"))
    assert report.system == "eagle"
    assert report.template == "vicuna_v1"
    assert set(report.encoders) == {"clip", "convnext", "sam", "eva02", "pix2struct"}
    left = {key.partition("vision_towers.")[2] for key in report.left}
    prefix = "0.vision_tower.vision_model."
    assert left == {
        prefix + "embeddings.class_embedding",
        prefix + "post_layernorm.weight",
        prefix + "post_layernorm.bias",
        *(f"1.vision_tower.head.{key}" for key in toy.convnext.head.state_dict()),
    }
    _check(toy, tmp_path / "out")


def test_eagle_x4_with_stored_rotary_tables_needs_not_be_told_of_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = EagleToy(tmp_path / "eagle", X4)
    for name, side in (("rope_win", EVA_WINDOW), ("rope_glb", CANVAS // 16)):
        toy.eva[f"{name}.freqs_cos"], toy.eva[f"{name}.freqs_sin"] = rotary(side)
    for block in range(EVA_DEPTH):
        name = "rope_glb" if block in EVA_GLOBAL else "rope_win"
        for table in ("freqs_cos", "freqs_sin"):
            toy.eva[f"blocks.{block}.attn.rope.{table}"] = toy.eva[f"{name}.{table}"].clone()
    monkeypatch.setattr(published_eagle, "GRID", 6)
    monkeypatch.setitem(FACTS, "convnext-1024", {**FACTS["convnext-1024"], "grid_size": 6})
    facts = toy.write_facts(tmp_path / "facts.json", without="det-1024")
    report = convert(toy.write(), tmp_path / "out", encoder_configs=facts)
    recomputed = [key for key, why in report.left.items() if why.startswith("recomputed")]
    assert len(recomputed) == 4 + 2 * EVA_DEPTH
    _check(toy, tmp_path / "out")


def test_an_expert_whose_windows_nothing_tells_asks_for_them(tmp_path: Path) -> None:
    toy = EagleToy(tmp_path / "eagle", ("convnext-1024", "det-1024"))
    facts = toy.write_facts(tmp_path / "facts.json", without="det-1024")
    with pytest.raises(
        CheckpointError,
        match=r'encoder "eva02" \("det-1024"\) has patch_size 16, width 48, depth 3.*num_attention_heads',
    ):
        convert(toy.write(), tmp_path / "out", encoder_configs=facts)
    assert not (tmp_path / "out").exists()


def test_a_list_that_its_tensors_do_not_follow_is_refused(tmp_path: Path) -> None:
    toy = EagleToy(tmp_path / "eagle", ("convnext-1024", "pix2struct-1024"))
    source = toy.write()
    (source / "config.json").write_text(
        json.dumps(toy.config(mm_vision_tower="convnext-1024;sam-1024;det-1024")), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"nothing under model\.vision_tower\.vision_towers\.2\."):
        convert(source, tmp_path / "out")


def test_a_projector_alone_is_not_an_eagle(tmp_path: Path) -> None:
    toy = EagleToy(tmp_path / "eagle", ("convnext-1024",))
    source = toy.write()
    tensors = {key: tensor for key, tensor in toy.tensors().items() if "vision_tower" not in key}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Fetch the whole checkpoint, not its projector alone"):
        convert(source, tmp_path / "out")


def test_eagle_x5_7b_at_its_true_size_needs_no_configuration_of_its_experts(tmp_path: Path) -> None:
    names = ";".join(X5)
    config = {**sizes.VICUNA_7B, "model_type": "eagle_llama", "mm_vision_tower": names, "image_aspect_ratio": "pad"}
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False}
    stored = {**sizes.llama_shapes(sizes.VICUNA_7B), **published_towers()}
    stored |= {"model.mm_projector.0.weight": (4096, 7680), "model.mm_projector.0.bias": (4096,)}
    stored |= {"model.mm_projector.2.weight": (4096, 4096), "model.mm_projector.2.bias": (4096,)}
    plan, resolution = sizes.resolve(eagle.SYSTEM, config, stored, tmp_path)
    assert [(entry.row, entry.image_size, dict(entry.architecture)) for entry in plan.encoders] == [
        ("clip-l14-336-eagle", 336, {}),
        ("convnext-xxl-1024", 1024, {}),
        ("sam-l16-1024-eagle", 1024, {}),
        ("eva02-l16-det-1024", 1024, {}),
        ("pix2struct-l16-1024", 1024, {}),
    ]
    assert plan.fusion.grid == 32
    assert {why.partition(":")[0] for why in resolution.left.values()} == {"unused", "recomputed"}
