"""True sizes on the meta device: parameters as published."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyeyes.fusion import build_fusion
from manyeyes.model.projector import build_projector
from manyeyes.model.reinjection import Reinjection, reinjected_layers
from manyeyes.recipe import ReinjectionSpec

# SigLIP SO400M, CLIP L, DINOv2 g, all stages of ConvNeXt-XXL: Cambrian-1's encoders.
CAMBRIAN = [1152, 1024, 1536, 5760]
WINDOWS = [1, 1, 1, 4]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(autouse=True)
def _meta():  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        yield


def test_cambrian_connector_and_its_projectors() -> None:
    fusion = build_fusion("spatial-vision-aggregator", encoder_channels=CAMBRIAN, grid=24, options={"windows": WINDOWS})
    assert _count(fusion.samplers) + fusion.queries.numel() == pytest.approx(47.3e6, rel=0.005)
    assert _count(fusion.projections) == pytest.approx(13.9e6, rel=0.005)
    assert (fusion.num_tokens, fusion.channels) == (576, 1024)
    assert sum(fusion.samplers[0][0].cells) == 19


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "stride", "count", "last", "parameters"),
    [(4096, 32, 3, 10, 27, 220.6e6), (5120, 40, 4, 10, 36, 241.5e6), (7168, 60, 7, 9, 56, 255.1e6)],
)
def test_cambrian_reinjection(
    hidden_size: int, num_layers: int, stride: int, count: int, last: int, parameters: float
) -> None:
    layers = reinjected_layers(ReinjectionSpec(stride=stride, count=count), num_layers=num_layers)
    assert layers[-1] == last
    reinjection = Reinjection(hidden_size, layers=layers, channels=1024, windows=WINDOWS, num_heads=16)
    assert _count(reinjection) == pytest.approx(parameters, rel=0.005)


def test_mini_gemini_mining() -> None:
    fusion = build_fusion("patch-info-mining", encoder_channels=[1024, 2880], grid=24)
    assert _count(fusion) == pytest.approx(6.96e6, rel=0.005)
    assert fusion.key[0].weight.shape == (2880,)
    assert fusion.value[1].weight.shape == (1024, 2880)


def test_llava_hr_adapters() -> None:
    fast, slow = 1024, 3072
    fusion = build_fusion("mixture-of-resolutions", encoder_channels=[fast, slow], grid=32, encoder_grids=[32, 32])
    adapter = slow * slow + slow + slow * fast + fast + 49 * fast + fast + fast * fast + fast
    adapter += 2 * fast * (fast // 2) + fast // 2 + fast // 2 + 1
    ends = fast * fast + fast + slow * fast + fast
    assert _count(fusion) == 3 * adapter + ends


def test_channel_concat_and_sequence_append_at_eagle_s_size() -> None:
    eagle = [1024, 3072, 1024, 1024, 1536]
    fusion = build_fusion("channel-concat", encoder_channels=eagle, grid=32)
    assert (fusion.num_tokens, fusion.channels, _count(fusion)) == (1024, 7680, 0)
    assert build_fusion("sequence-append", encoder_channels=eagle, grid=32).num_tokens == 5 * 1024


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "parameters"),
    [
        (1024, 4096, 20.98e6),
        (1024, 5120, 31.47e6),
        (6656, 4096, 44.0e6),
        (7680, 5120, 65.5e6),
        (7680, 7168, 106.4e6),
        (1024, 2048, 6.3e6),
    ],
)
def test_published_mlp_projectors(in_channels: int, out_channels: int, parameters: float) -> None:
    projector = build_projector("mlp", depth=2, in_channels=in_channels, out_channels=out_channels, grid=24)
    assert _count(projector) == pytest.approx(parameters, rel=0.005)
