from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from manyeyes.encoders import ENCODERS, build_encoder, encoder_row, encoder_transform, load_encoder_weights
from manyeyes.errors import RecipeError, ShapeError

ROWS = ["vit-tiny-p16-64", "efficientnet-lite0"]
SIZE = 64


@pytest.mark.parametrize("name", ROWS)
def test_true_size_keeps_the_promise_of_its_row(name: str) -> None:
    row = ENCODERS[name]
    with torch.device("meta"):
        encoder = build_encoder(name)
        features = encoder(torch.empty(2, 3, row.image_size, row.image_size))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == row.parameters
    assert features.shape == (2, row.channels, encoder.grid, encoder.grid)
    assert encoder.grid == row.image_size // row.stride
    assert encoder_transform(name).size == row.image_size


@pytest.mark.parametrize("name", ROWS)
def test_small_size_is_deterministic_and_trains_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=SIZE, small=True)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    features = encoder(pixels)
    assert features.shape == (3, encoder.channels, encoder.grid, encoder.grid)
    assert torch.equal(features, encoder(pixels))
    features.square().mean().backward()
    lacking = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not lacking
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ROWS)
def test_image_does_not_depend_on_its_batch(name: str) -> None:
    encoder = build_encoder(name, image_size=SIZE, small=True)
    pixels = torch.randn(4, 3, SIZE, SIZE)
    torch.testing.assert_close(encoder(pixels)[2:3], encoder(pixels[2:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_saved_weights_give_the_same_features_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = build_encoder(name, image_size=SIZE, small=True)
    save_file({key: tensor.contiguous() for key, tensor in first.state_dict().items()}, tmp_path / "model.safetensors")
    second = build_encoder(name, image_size=SIZE, small=True)
    load_encoder_weights(second, name, tmp_path)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(first(pixels), second(pixels))


def test_statistics_of_batch_normalisation_never_move() -> None:
    encoder = build_encoder("efficientnet-lite0", image_size=SIZE, small=True)
    before = {key: tensor.clone() for key, tensor in encoder.named_buffers()}
    pixels = torch.randn(2, 3, SIZE, SIZE)
    trained = encoder.train()(pixels)
    evaluated = encoder.eval()(pixels)
    assert torch.equal(trained, evaluated)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.named_buffers())
    scales = [module.weight for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert scales
    assert all(scale.requires_grad for scale in scales)


def test_image_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(ShapeError, match="multiple of"):
        build_encoder("vit-tiny-p16-64", image_size=72)


def test_unknown_encoder_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match='Did you mean "efficientnet-lite0"'):
        encoder_row("efficientnet-lite")
