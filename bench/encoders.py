"""``python -m bench.encoders``: four encoders on one image, beside a serial loop over their publishers' networks.

The loop does what Eagle's code does: one large normalised tensor is resized for each network in turn, each network of
transformers or timm runs, its map is brought to the grid, and channels are joined. Ours has the same weights and gets
the same tensor. One image at a time, one thread, no gradients. Features that differ by more than 1e-4 fail the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    SiglipConfig,
    SiglipModel,
)

from bench import RESULTS, describe, write_result
from manyeyes.encoders import load_encoder_weights
from manyeyes.model import ManyEyesConfig, ManyEyesForConditionalGeneration

GOAL, TOLERANCE = 1.3, 1e-4
SHARED, GRID = 1024, 32
WIDTH, DEPTH, HEADS = 384, 6, 6
SIZES = {"clip": 448, "siglip": 384, "dino": 448, "convnext": 512}
ROWS = {"clip": "clip-l14-448", "siglip": "siglip-l16-384", "dino": "dinov2-l14-518", "convnext": "convnext-l-768"}
DEPTHS, DIMS = (2, 2, 6, 2), (64, 128, 256, 512)
Network = Callable[[Tensor], Tensor]


def as_map(tokens: Tensor) -> Tensor:
    """Patches as a square map."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def make_networks(folder: Path) -> dict[str, Network]:
    """Publishers' networks with random weights, which lie in folders by name."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    clip = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**vision, "patch_size": 14, "image_size": SIZES["clip"], "hidden_act": "quick_gelu"},
            projection_dim=8,
        )
    ).eval()
    siglip = SiglipModel(
        SiglipConfig(
            text_config={**text, "projection_size": WIDTH},
            vision_config={**vision, "patch_size": 16, "image_size": SIZES["siglip"], "hidden_act": "gelu"},
        )
    ).eval()
    dino = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            patch_size=14,
            image_size=SIZES["dino"],
            mlp_ratio=4,
        )
    ).eval()
    convnext = ConvNeXt(depths=DEPTHS, dims=DIMS, norm_eps=1e-6, num_classes=5).eval()
    for name, model in {"clip": clip, "siglip": siglip, "dino": dino}.items():
        model.save_pretrained(folder / name)
    (folder / "convnext").mkdir()
    tensors = {f"visual.trunk.{key}": tensor for key, tensor in convnext.state_dict().items()}
    save_file({**tensors, "logit_scale": torch.ones(())}, folder / "convnext" / "open_clip_model.safetensors")
    return {
        # The last block but one, as LLaVA takes it.
        "clip": lambda pixels: as_map(clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]),
        "siglip": lambda pixels: as_map(siglip.vision_model(pixels).last_hidden_state),
        "dino": lambda pixels: as_map(dino(pixels).last_hidden_state[:, 1:]),
        "convnext": convnext.forward_features,
    }


def make_ours(folder: Path) -> nn.Module:
    """Our model with those weights; its language model is not run."""
    block = {"width": WIDTH, "depth": DEPTH, "heads": HEADS}
    config = ManyEyesConfig(
        text_config=LlamaConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        encoders=tuple(
            {
                "name": name,
                "encoder": ROWS[name],
                "image_size": size,
                "small": True,
                "architecture": {"depths": DEPTHS, "widths": DIMS} if name == "convnext" else block,
            }
            for name, size in SIZES.items()
        ),
        fusion={"strategy": "channel-concat", "grid": GRID, "options": {"align_corners": True, "average": False}},
        projector={"kind": "mlp", "depth": 1},
        shared_pixels={"image_size": SHARED, "align_corners": True, "antialias": False},
        image_token_id=0,
    )
    model = ManyEyesForConditionalGeneration(config).eval()
    for name, encoder in model.encoders.items():
        load_encoder_weights(encoder, ROWS[name], folder / name)
    return model


def serial(networks: dict[str, Network], pixels: Tensor) -> Tensor:
    """One network after the other, as Eagle's ``MultiBackboneChannelConcatenationVisionTower`` does."""

    def resized(values: Tensor, size: int) -> Tensor:
        return functional.interpolate(values.float(), size=(size, size), mode="bilinear", align_corners=True)

    maps = []
    for name, network in networks.items():
        features = network(resized(pixels, SIZES[name]))
        maps.append(features if features.shape[-1] == GRID else resized(features, GRID))
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


@torch.no_grad()
def main() -> int:
    """Measure in turn; exit 1 where features differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        networks, ours = make_networks(Path(folder)), make_ours(Path(folder))
    seconds, gap = [], 0.0
    generator = torch.Generator().manual_seed(3)
    for number in range(arguments.rounds + 1):
        pixels = torch.randn(1, 3, SHARED, SHARED, generator=generator)
        started = time.process_time()
        theirs = serial(networks, pixels)
        middle = time.process_time()
        own = ours.fusion([*ours.encoder_features({"shared": pixels}).values()])
        ended = time.process_time()
        gap = max(gap, float((theirs - own).abs().max()))
        if number:
            seconds.append((middle - started, ended - middle))
            print(f"  encoders: {seconds[-1][0] / seconds[-1][1]:.2f}", file=sys.stderr, flush=True)
    title = f"{len(SIZES)} encoders' features of one image: a serial loop over publishers' networks / ours"
    evidence = {"features_gap": gap, "equal": gap <= TOLERANCE}
    result = describe(title, seconds, goal=GOAL, equal=evidence, packages=("timm",))
    return write_result(result, arguments.out / "encoders.json")


if __name__ == "__main__":
    sys.exit(main())
