"""What every converter shares: sizes, memory, the command line, transformers' port."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from manyeyes.cli.main import cli
from manyeyes.converters import llava
from manyeyes.converters.convert import config_of_plan, convert
from manyeyes.converters.logits import prompt_logits
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import EncoderSources
from manyeyes.converters.tensor_files import StoredTensor
from manyeyes.converters.to_llava import write_llava
from manyeyes.errors import CheckpointError
from manyeyes.model import ManyEyesForConditionalGeneration, write_manifest
from tests import published_toys as toys
from tests.published_toys import PROMPT, QUESTION, LlavaToy

PICTURE = toys.photograph(90, 61)


@pytest.fixture
def toy(tmp_path: Path) -> LlavaToy:
    return toys.llava_beside_clip(tmp_path)


def _convert(tmp_path: Path, **options: Any) -> Path:
    convert(tmp_path / "llava", tmp_path / "out", **{"encoders": str(tmp_path / "clip"), **options})
    return tmp_path / "out"


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_published_size_of_llava_1_5_needs_nothing_but_its_own_files(tmp_path: Path) -> None:
    # As tensors of the published 7B with its tower: names and shapes alone.
    config = LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096)
    with torch.device("meta"):
        language_model, tower = LlamaForCausalLM(config), CLIPVisionModel(_openai_clip())
    shapes = {key: tuple(tensor.shape) for key, tensor in language_model.state_dict().items()}
    shapes |= {key: tuple(t.shape) for key, t in toys.tower_keys(tower, "model.vision_tower.vision_tower.").items()}
    for layer, width in ((0, 1024), (2, 4096)):
        shapes |= {f"model.mm_projector.{layer}.weight": (4096, width), f"model.mm_projector.{layer}.bias": (4096,)}
    stored = {key: StoredTensor(tmp_path, key, shape, torch.float16) for key, shape in shapes.items()}
    fields = {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "unfreeze_mm_vision_tower": True,
        **{key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: getattr(config, key) for key in ("num_attention_heads", "rms_norm_eps", "max_position_embeddings")},
    }
    checkpoint = OriginalCheckpoint(tmp_path, fields, stored)
    plan = llava.SYSTEM.plan(checkpoint, EncoderSources(None, {}, tmp_path))
    assert plan.encoders[0].architecture == {}
    assert plan.encoders[0].image_size == 336
    assert plan.fusion.grid == 24
    with torch.device("meta"):
        model = ManyEyesForConditionalGeneration(config_of_plan(plan, image_token_id=0))
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    resolution = plan.keys.resolve(ours, shapes, name="llava-v1.5-7b")
    assert set(resolution.assignments) == set(ours)
    assert all(key.startswith("model.vision_tower.") for key in resolution.left)
    # 6.738 B of Vicuna, 20.98 M of the projector, 290.9 M of CLIP without its last block and norm.
    assert sum(math.prod(shape) for shape in ours.values()) == 6_738_415_616 + 20_979_712 + 290_909_184


def _openai_clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=336,
    )


# --- memory ----------------------------------------------------------------------------------------------------------


class _Watch:
    """The most memory of its own that this process holds meanwhile; pages of mapped files do not count."""

    def __enter__(self) -> _Watch:
        self._start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self._start

    def _look(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc to see memory in use")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_stays_below_twice_the_largest_shard(tmp_path: Path, toy: LlavaToy, form: str) -> None:
    layers, hidden = 16, 20_000
    block = {key: t for key, t in toy.tensors().items() if ".layers.0." in key}
    for name in ("gate_proj", "up_proj"):
        block[f"model.layers.0.mlp.{name}.weight"] = torch.rand(hidden, toys.WIDTH)
    block["model.layers.0.mlp.down_proj.weight"] = torch.rand(toys.WIDTH, hidden)
    tensors = {key: t for key, t in toy.tensors().items() if ".layers." not in key}
    for layer in range(layers):
        tensors |= {key.replace(".0.", f".{layer}.", 1): t for key, t in block.items()}
    toy.write(num_hidden_layers=layers, intermediate_size=hidden)
    (toy.folder / "model.safetensors").unlink()
    toys.write_weights(toy.folder, {key: t.clone() for key, t in tensors.items()}, shards=8, form=form)
    del tensors, block
    sizes = [file.stat().st_size for file in toy.folder.glob("*-of-*")]
    with _Watch() as watch:
        _convert(tmp_path)
    assert sum(sizes) > 5 * max(sizes)
    assert watch.growth < 2 * max(sizes), f"{watch.growth / 1e6:.1f} MB for shards of {max(sizes) / 1e6:.1f} MB"


# --- transformers' port, and back ------------------------------------------------------------------------------------


def _port(tmp_path: Path, toy: LlavaToy) -> LlavaForConditionalGeneration:
    # A row for the image's token, behind the tokenizer's own.
    toy.language_model.config.vocab_size = toy.vocab_size + 1
    config = LlavaConfig(
        vision_config=toy.tower.config,
        text_config=toy.language_model.config,
        image_token_index=toy.vocab_size,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(8)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "llava")
    return model


@pytest.mark.parametrize("keys", ["saved", "nested"])
def test_port_of_transformers_gives_the_ports_logits(tmp_path: Path, toy: LlavaToy, keys: str) -> None:
    model = _port(tmp_path, toy)
    if keys == "nested":
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "llava" / "model.safetensors")
    report = convert(tmp_path / "llava", tmp_path / "out")
    assert report.system == "llava-hf"
    ids, count = toys.piece_ids(toy.folder, PROMPT), (toys.SIZE // toys.PATCH) ** 2
    place = ids.index(-200)
    ids[place : place + 1] = [toy.vocab_size] * count
    pixels = toys.pixels_of(PICTURE, size=toys.SIZE, aspect="square")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
    found = prompt_logits(tmp_path / "out", prompt=QUESTION, images=[PICTURE])
    np.testing.assert_allclose(found.logits, expected, atol=1e-4, rtol=0)


def test_written_as_llava_and_read_again_nothing_changes(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    out = _convert(tmp_path)
    done = CliRunner().invoke(cli, ["convert", "--to", "llava", str(out), str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "back" / "model.safetensors")
    for key, tensor in toy.tensors().items():
        if "inv_freq" not in key:
            torch.testing.assert_close(written[key], tensor, rtol=0, atol=0)
    report = convert(tmp_path / "back", tmp_path / "again")
    assert report.encoders == {"clip": str(tmp_path / "back" / "vision_tower")}
    first, second = (prompt_logits(path, prompt=QUESTION, images=[PICTURE]) for path in (out, tmp_path / "again"))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_what_llava_has_no_place_for_is_not_written(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    out = _convert(tmp_path)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["fusion"]["grid"] = 3
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json changed since it was written"):
        write_llava(out, tmp_path / "back")
    (out / "checkpoint.json").unlink()
    write_manifest(out)
    with pytest.raises(CheckpointError, match="the fusion channel-concat on a grid of 3"):
        write_llava(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- command line ----------------------------------------------------------------------------------------------------


def test_command_line_converts_and_gives_logits(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "picture.png").write_bytes(PICTURE)
    run = CliRunner().invoke
    done = run(cli, ["convert", str(toy.folder), str(tmp_path / "out"), "--encoders", str(tmp_path / "clip")])
    assert done.exit_code == 0, done.output
    assert "llava: " in done.output
    assert "template vicuna_v1" in done.output
    arguments = ["logits", str(tmp_path / "out"), "--image", str(tmp_path / "picture.png"), "--prompt", QUESTION]
    done = run(cli, [*arguments, "--out", str(tmp_path / "logits.npy")])
    assert done.exit_code == 0, done.output
    saved = np.load(tmp_path / "logits.npy")
    expected = prompt_logits(tmp_path / "out", prompt=QUESTION, images=[PICTURE])
    np.testing.assert_array_equal(saved, expected.logits)
    lines = done.output.splitlines()
    assert lines[-1].startswith(str(list(saved.shape)))
    assert len(lines) == len(saved) + 1
    assert sum("image ->" in line for line in lines) == (toys.SIZE // toys.PATCH) ** 2
