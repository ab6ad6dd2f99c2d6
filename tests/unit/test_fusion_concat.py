from __future__ import annotations

import pytest
import torch

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion import build_fusion


def test_channels_are_joined_cell_by_cell() -> None:
    first = torch.arange(4.0).reshape(1, 1, 2, 2)
    second = 10 + torch.arange(8.0).reshape(1, 2, 2, 2)
    fused = build_fusion("channel-concat", encoder_channels=[1, 2], grid=2)([first, second])
    assert fused.tolist() == [[[0, 10, 14], [1, 11, 15], [2, 12, 16], [3, 13, 17]]]


def test_finer_maps_are_averaged_over_whole_cells() -> None:
    feature = torch.arange(16.0).reshape(1, 1, 4, 4)
    fused = build_fusion("channel-concat", encoder_channels=[1], grid=2)([feature])
    assert fused.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_appended_tokens_are_as_many_as_all_encoders_give() -> None:
    fusion = build_fusion("sequence-append", encoder_channels=[3, 5], grid=2)
    fused = fusion([torch.randn(2, 3, 2, 2), torch.randn(2, 5, 4, 4)])
    assert fused.shape == (2, fusion.num_tokens, fusion.channels) == (2, 8, 5)


def test_features_of_other_encoders_are_refused() -> None:
    fusion = build_fusion("channel-concat", encoder_channels=[1, 2], grid=2)
    with pytest.raises(ShapeError, match=r"\[1, 3\] channels"):
        fusion([torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)])


def test_unknown_fusion_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match='Did you mean "channel-concat"'):
        build_fusion("chanel-concat", encoder_channels=[1], grid=2)
