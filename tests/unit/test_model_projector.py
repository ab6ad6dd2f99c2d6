from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from manyeyes.errors import ShapeError
from manyeyes.model.projector import Projector


def test_two_layers_with_gelu_between() -> None:
    projector = Projector("mlp", depth=2, in_channels=1, out_channels=1)
    first, second = (module for module in projector.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for layer, weight, bias in ((first, 2.0, 1.0), (second, 3.0, -1.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    hidden = 2.0 * 0.5 + 1.0
    gelu = hidden * 0.5 * (1 + math.erf(hidden / math.sqrt(2)))
    assert projector(torch.tensor([[[0.5]]])).item() == pytest.approx(3 * gelu - 1, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "depth", "layers"), [("linear", 2, 1), ("mlp", 1, 1), ("mlp", 3, 3), ("identity", 2, 0)]
)
def test_number_of_linear_layers(kind: str, depth: int, layers: int) -> None:
    projector = Projector(kind, depth=depth, in_channels=4, out_channels=4)
    assert sum(isinstance(module, nn.Linear) for module in projector.modules()) == layers
    assert projector(torch.ones(2, 3, 4)).shape == (2, 3, 4)


def test_identity_between_different_widths_is_refused() -> None:
    with pytest.raises(ShapeError, match="4 and 8 channels"):
        Projector("identity", depth=1, in_channels=4, out_channels=8)
