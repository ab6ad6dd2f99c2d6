"""What of an encoder is gathered by itself where several processes train it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from manyeyes.encoders import ENCODERS
from manyeyes.encoders.weights import meta_device
from manyeyes.model import build_encoders
from manyeyes.model.configuration import EncoderConfig
from manyeyes.training.encoder_parts import Skippable, encoder_parts

ROWS = list({row.family: name for name, row in ENCODERS.items()}.items())


def model_of(name: str) -> Any:
    """An encoder at its small size, as the model that has it alone."""
    row = ENCODERS[name]
    size = row.small_image_size or row.image_size
    entries = [EncoderConfig(name="eye", encoder=name, image_size=size, small=bool(row.small))]
    with meta_device():
        encoders = build_encoders(entries)
    config = SimpleNamespace(encoders=entries)
    return SimpleNamespace(encoders=encoders, config=config, encoder_sizes={"eye": size}, fusion=nn.Identity())


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_blocks_of_every_family_are_found_in_order_and_none_inside_of_another(family: str, name: str) -> None:
    model = model_of(name)
    parts = encoder_parts(model)
    assert len(parts) >= 2
    places = {module: place for place, module in enumerate(model.encoders.modules())}
    # Stable Diffusion's autoencoder runs first and is named last.
    assert family == "stable-diffusion" or all(places[one] < places[other] for one, other in pairwise(parts))
    inside = [module for part in parts for module in part.modules()]
    assert len(inside) == len(set(inside))


def test_what_does_not_train_has_no_parts() -> None:
    model = model_of("vit-tiny-p16-64")
    model.encoders.requires_grad_(False)
    assert encoder_parts(model) == []
    # Only what stands behind something that trains has an end of its backward pass.
    blocks = cast("list[nn.Module]", list(model.encoders["eye"].net.blocks))
    blocks[0].requires_grad_(True)
    blocks[1].requires_grad_(True)
    assert encoder_parts(model) == [blocks[1]]


def test_a_part_that_is_skipped_gives_zero_and_gradients_of_zero() -> None:
    part = nn.Linear(2, 2)
    part.weight.data.fill_(float("nan"))
    part.forward = Skippable(part, lambda _, *sources: sum(0 * each.nan_to_num().sum() for each in sources))  # type: ignore[method-assign, assignment]
    passed = part(torch.zeros((), requires_grad=True), skipped=True)
    passed.backward()
    assert passed.item() == 0
    assert part.weight.grad is not None
    assert not part.weight.grad.any()
    assert part(torch.ones(1, 2)).shape == (1, 2)
