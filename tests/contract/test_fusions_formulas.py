"""Every fusion against its formula, written out plainly here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion import SpatialVisionAggregator, build_fusion, run_encoders
from manyeyes.fusion.cross_attention import (
    VisionSampler,
    VisualWindows,
    attend_windows,
    image_cells,
    split_windows,
    window_weights,
)
from manyeyes.fusion.mixture_of_resolutions import MixtureOfResolutions
from manyeyes.fusion.patch_info_mining import split_whole_image

SMALL_AGGREGATOR = {"channels": 16, "num_heads": 4, "depth": 2}


def _randomised(module: nn.Module) -> Any:
    """Weights away from zeros and ones, so that no term of a formula can go missing unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def _layer_norm(tensor: Tensor, norm: nn.Module) -> Tensor:
    mean, variance = tensor.mean(-1, keepdim=True), tensor.var(-1, keepdim=True, unbiased=False)
    return (tensor - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def test_windows_are_the_cells_that_lie_on_a_query() -> None:
    feature = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert split_windows(feature, 2)[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_windows_of_a_grid_that_does_not_divide_are_refused() -> None:
    with pytest.raises(ShapeError, match="5 x 5 cells"):
        split_windows(torch.zeros(1, 1, 5, 5), 2)


def test_window_attention_is_softmax_of_scaled_products_head_by_head() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    attended = attend_windows(query, keys, values, num_heads=2)
    for row in range(3):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = [float(query[row, part] @ keys[row, key, part]) / math.sqrt(4) for key in range(5)]
            weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            expected = sum(weight * values[row, key, part] for key, weight in enumerate(weights))
            torch.testing.assert_close(attended[row, part], expected)


def test_one_softmax_spans_all_encoders_and_sums_to_one() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(6, 8), torch.randn(6, 1 + 1 + 4, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 3:] = False
    weights = window_weights(query, keys, num_heads=4, mask=mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 4))
    assert bool((weights[..., 3:] == 0).all())
    alone = window_weights(query, keys[:, :1], num_heads=4)
    assert bool((alone == 1).all()), "one key takes all"
    assert bool((weights[..., 0] < 1).all()), "with other encoders' keys beside it, it does not"


def test_channel_concat_as_eagle_interpolates_it() -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 6, 6), torch.randn(2, 5, 8, 8), torch.randn(2, 2, 4, 4)]
    fusion = build_fusion(
        "channel-concat", encoder_channels=[3, 5, 2], grid=4, options={"align_corners": True, "average": False}
    )
    expected = [functional.interpolate(f, size=(4, 4), mode="bilinear", align_corners=True) for f in features]
    torch.testing.assert_close(fusion(features), torch.cat(expected, 1).flatten(2).transpose(1, 2))
    plain = build_fusion("channel-concat", encoder_channels=[3, 5, 2], grid=4)
    assert not torch.allclose(fusion(features), plain(features))


def test_mining_with_windows_of_one_cell_is_the_token_plus_its_value() -> None:
    # A softmax over one key is 1, whatever is asked.
    torch.manual_seed(0)
    fusion = _randomised(build_fusion("patch-info-mining", encoder_channels=[8, 6], grid=3))
    coarse, fine = torch.randn(2, 8, 3, 3), torch.randn(2, 6, 3, 3)
    norm, linear = fusion.value
    value = _layer_norm(fine.flatten(2).transpose(1, 2), norm) @ linear.weight.T + linear.bias
    torch.testing.assert_close(fusion([coarse, fine]), coarse.flatten(2).transpose(1, 2) + value)


def test_mining_follows_mini_gemini() -> None:
    torch.manual_seed(0)
    fusion = _randomised(build_fusion("patch-info-mining", encoder_channels=[8, 4, 2], grid=2))
    coarse, fine, third = torch.randn(1, 8, 2, 2), torch.randn(1, 4, 6, 6), torch.randn(1, 2, 3, 3)
    mined = fusion([coarse, fine, third])
    joined = torch.cat([fine, functional.interpolate(third, size=(6, 6), mode="bilinear", align_corners=False)], 1)
    for row in range(2):
        for column in range(2):
            token = coarse[0, :, row, column]
            window = joined[0, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].flatten(1).T
            query = _layer_norm(token, fusion.query[0]) @ fusion.query[1].weight.T + fusion.query[1].bias
            keys = _layer_norm(window, fusion.key[0]) @ fusion.key[1].weight.T + fusion.key[1].bias
            values = _layer_norm(window, fusion.value[0]) @ fusion.value[1].weight.T + fusion.value[1].bias
            weights = (keys @ query / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(mined[0, 2 * row + column], token + weights @ values)


def test_high_definition_mining_gives_each_tile_its_quarter_of_the_whole_map() -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 4, 12, 12)
    parts = split_whole_image(whole, 2, num_tiles=10)
    assert parts.shape == (10, 4, 6, 6)
    half = functional.interpolate(whole, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(parts[5], half[1])
    torch.testing.assert_close(parts[6:10], torch.stack([
        whole[1, :, :6, :6], whole[1, :, :6, 6:], whole[1, :, 6:, :6], whole[1, :, 6:, 6:]
    ]))  # fmt: skip
    fusion = build_fusion("patch-info-mining", encoder_channels=[8, 4], grid=3, options={"image_grid": 2})
    tiles = torch.randn(10, 8, 3, 3)
    plain = build_fusion("patch-info-mining", encoder_channels=[8, 4], grid=3)
    plain.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(fusion([tiles, whole]), plain([tiles, parts]))
    with pytest.raises(ShapeError, match="9 tiles"):
        fusion([tiles[:9], whole])


def test_deformable_mining_looks_where_its_offsets_say() -> None:
    torch.manual_seed(0)
    options = {"num_heads": 2, "num_points": 3}
    fusion = _randomised(build_fusion("deformable-mining", encoder_channels=[4, 6], grid=3, options=options))
    coarse, fine = torch.randn(1, 4, 3, 3), torch.randn(1, 6, 5, 5)
    mined = fusion([coarse, fine])
    values = _layer_norm(fine[0].flatten(1).T, fusion.value[0]) @ fusion.value[1].weight.T + fusion.value[1].bias
    values = values.reshape(5, 5, 2, 2)

    def bilinear(x: float, y: float, head: int) -> Tensor:
        total = torch.zeros(2)
        for row in range(5):
            for column in range(5):
                weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                total = total + weight * values[row, column, head]
        return total

    for row in range(3):
        for column in range(3):
            token = coarse[0, :, row, column]
            normed = _layer_norm(token, fusion.query_norm)
            offsets = (normed @ fusion.offsets.weight.T + fusion.offsets.bias).detach().reshape(2, 3, 2)
            scores = (normed @ fusion.weights.weight.T + fusion.weights.bias).reshape(2, 3)
            found = []
            for head in range(2):
                weights = scores[head].softmax(0)
                taken = torch.zeros(2)
                for point in range(3):
                    # Offsets count in cells of the token grid; cell centres of the fine map lie at whole numbers.
                    x = (column + 0.5 + float(offsets[head, point, 0])) / 3 * 5 - 0.5
                    y = (row + 0.5 + float(offsets[head, point, 1])) / 3 * 5 - 0.5
                    taken = taken + weights[point] * bilinear(x, y, head)
                found.append(taken)
            torch.testing.assert_close(mined[0, 3 * row + column], token + torch.cat(found))


def test_deformable_mining_starts_on_a_ring_with_equal_weights() -> None:
    fusion = build_fusion("deformable-mining", encoder_channels=[8, 4], grid=3, options={"num_heads": 4})
    offsets = fusion.offsets.bias.reshape(4, 4, 2)
    torch.testing.assert_close(offsets.norm(dim=-1), torch.tensor([0.25, 0.5, 0.75, 1.0]).expand(4, 4))
    torch.testing.assert_close(offsets[1, 3], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert not fusion.offsets.weight.any()
    assert not fusion.weights.weight.any()


class _Chain(nn.Module):
    """Four linear blocks on patches behind one class token."""

    num_prefix_tokens = 1

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.width, self.grid = width, grid
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        patches = pixel_values.flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            tokens_BNC = tokens_BNC + block(tokens_BNC).tanh() + tokens_BNC[:, :1]
        return tokens_BNC

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        return tokens_BNC[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.finish(self.forward_blocks(self.embed(pixel_values), start=0, stop=4))


@pytest.mark.parametrize("slow_side", [2, 4, 8])
def test_resolutions_mix_between_the_blocks_as_in_llava_hr(slow_side: int) -> None:
    torch.manual_seed(0)
    fusion = _randomised(build_fusion("mixture-of-resolutions", encoder_channels=[6, 5], grid=4))
    assert isinstance(fusion, MixtureOfResolutions)
    fast, pixels, slow = _Chain(6, 4), torch.randn(2, 6, 4, 4), torch.randn(2, 5, slow_side, slow_side)

    def align(feature: Tensor) -> Tensor:
        if slow_side == 8:
            return functional.avg_pool2d(feature, 2)
        return functional.interpolate(feature, size=(4, 4), mode="bilinear", align_corners=True)

    tokens = fast.embed(pixels)
    for block in range(4):
        tokens = fast.forward_blocks(tokens, start=block, stop=block + 1)
        if block == 3:
            break
        adapter = fusion.adapters[block]
        fast_map = tokens[:, 1:].transpose(1, 2).reshape(2, 6, 4, 4)
        hidden = functional.gelu(functional.conv2d(slow, adapter.slow_conv.weight, adapter.slow_conv.bias))
        added = align(functional.conv2d(hidden, adapter.slow_projection.weight, adapter.slow_projection.bias))
        weight, bias = adapter.fast_conv.weight, adapter.fast_conv.bias
        local = functional.gelu(functional.conv2d(fast_map, weight, bias, padding=3, groups=6))
        fast_map = fast_map + functional.conv2d(local, adapter.fast_projection.weight, adapter.fast_projection.bias)
        pooled = torch.cat([fast_map.flatten(2).mean(2), added.flatten(2).mean(2)], dim=1)
        gate = torch.tanh(adapter.gate[2](functional.gelu(adapter.gate[0](pooled))))
        fast_map = fast_map + gate.view(2, 1, 1, 1) * added
        tokens = torch.cat([tokens[:, :1], fast_map.flatten(2).transpose(1, 2)], dim=1)
    expected = fusion.fast_projection(tokens[:, 1:]) + fusion.slow_projection(align(slow).flatten(2).transpose(1, 2))

    features = run_encoders(fusion, [fast, nn.Identity()], [pixels, slow])
    torch.testing.assert_close(fusion(features), expected)


def test_untrained_adapters_leave_the_fast_encoder_as_it_was_published() -> None:
    torch.manual_seed(0)
    fusion = build_fusion("mixture-of-resolutions", encoder_channels=[6, 5], grid=4)
    fast, pixels, slow = _Chain(6, 4), torch.randn(2, 6, 4, 4), torch.randn(2, 5, 8, 8)
    assert torch.equal(run_encoders(fusion, [fast, nn.Identity()], [pixels, slow])[0], fast(pixels))


def _plain_sampler(block: VisionSampler, x: Tensor, windows: list[Tensor], mask: Tensor, overall: Tensor) -> Tensor:
    """The published formula for one query, encoder by encoder and head by head."""
    hidden = block.input_projection.weight @ torch.cat([x, block.context_projection.weight @ overall])
    query = block.query[1].weight @ _layer_norm(hidden, block.query[0])
    keys, values = [], []
    for place, cells in enumerate(windows):
        if cells.shape[0] > 1:
            cells = cells + block.positions[str(place)]
        keys.append(_layer_norm(cells, block.keys[place][0]) @ block.keys[place][1].weight.T)
        values.append(_layer_norm(cells, block.values[place][0]) @ block.values[place][1].weight.T)
    key, value = torch.cat(keys), torch.cat(values)
    heads = []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        scores = (key[:, part] @ query[part] / math.sqrt(4)).masked_fill(~mask, -math.inf)
        heads.append(scores.softmax(0) @ value[:, part])
    hidden = _layer_norm(hidden + block.attention_output.weight @ torch.cat(heads), block.norm)
    return x + block.mlp[2].weight @ functional.gelu(block.mlp[0].weight @ hidden)


def test_aggregator_with_one_encoder_and_windows_of_one_cell_follows_cambrian() -> None:
    torch.manual_seed(0)
    options = {**SMALL_AGGREGATOR, "windows": [1]}
    fusion = _randomised(build_fusion("spatial-vision-aggregator", encoder_channels=[6], grid=3, options=options))
    feature = torch.randn(1, 6, 3, 3)
    projected = fusion.projections[0](feature[0].flatten(1).T)
    expected = []
    for cell in range(9):
        hidden = fusion.queries[0]
        for block in fusion.samplers[0]:
            window = projected[cell : cell + 1]
            hidden = _plain_sampler(block, hidden, [window], torch.ones(1, dtype=torch.bool), projected.mean(0))
        expected.append(hidden)
    torch.testing.assert_close(fusion([feature])[0], torch.stack(expected))


def test_aggregator_with_windows_padding_and_two_encoders_follows_cambrian() -> None:
    torch.manual_seed(0)
    options = {**SMALL_AGGREGATOR, "depth": 1, "windows": [1, 2], "mask_padding": True}
    fusion = _randomised(build_fusion("spatial-vision-aggregator", encoder_channels=[6, 5], grid=4, options=options))
    features = [torch.randn(1, 6, 5, 5), torch.randn(1, 5, 8, 8)]
    first = functional.interpolate(features[0], size=(4, 4), mode="bilinear", align_corners=False)
    coarse = fusion.projections[0](first[0].permute(1, 2, 0))
    fine = fusion.projections[1](features[1][0].permute(1, 2, 0))
    # 80 x 30 pixels on 4 cells: int(30 * 4 / 80) = 1 row of image, (4 - 1) // 2 = 1 row of padding at either end.
    # On 8 cells: int(3.0) = 3 rows, 2 rows of padding at either end.
    seen_coarse, seen_fine = [1, 2], [2, 3, 4, 5]
    fused = fusion(features, torch.tensor([[80, 30]]))
    for row in range(4):
        for column in range(4):
            window = fine[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, -1)
            mask_coarse = [row in seen_coarse]
            mask_fine = [2 * row + line in seen_fine for line in (0, 1) for _ in (0, 1)]
            # A window that shows nothing but padding is seen whole.
            mask = [any_ for part in (mask_coarse, mask_fine) for any_ in (part if any(part) else [True] * len(part))]
            expected = _plain_sampler(
                fusion.samplers[0][0],
                fusion.queries[0],
                [coarse[row, column][None], window],
                torch.tensor(mask),
                coarse.reshape(16, -1).mean(0),
            )
            torch.testing.assert_close(fused[0, 4 * row + column], expected)


def test_what_padding_holds_changes_nothing_where_it_is_masked() -> None:
    torch.manual_seed(0)
    options = {**SMALL_AGGREGATOR, "mask_padding": True}
    fusion = build_fusion(
        "spatial-vision-aggregator", encoder_channels=[6, 5], grid=4, encoder_grids=[4, 8], options=options
    )
    assert isinstance(fusion, SpatialVisionAggregator)
    features, sizes = [torch.randn(1, 6, 4, 4), torch.randn(1, 5, 8, 8)], torch.tensor([[64, 32]])
    changed = [features[0], features[1].clone()]
    changed[1][:, :, :2] += 1
    before, after = fusion(features, sizes).view(4, 4, -1), fusion(changed, sizes).view(4, 4, -1)
    torch.testing.assert_close(before[1:3], after[1:3])
    assert not torch.allclose(before[0], after[0]), "a window of nothing but padding is seen whole"
    with pytest.raises(ShapeError, match="no image_sizes"):
        fusion(features)


def test_windows_of_nothing_but_padding_give_no_nan() -> None:
    options = {**SMALL_AGGREGATOR, "mask_padding": True}
    fusion = build_fusion("spatial-vision-aggregator", encoder_channels=[6], grid=4, encoder_grids=[4], options=options)
    fused = fusion([torch.randn(3, 6, 4, 4)], torch.tensor([[4000, 1], [1, 4000], [7, 7]]))
    assert bool(fused.isfinite().all())


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (100, 300), (333, 47), (97, 97), (500, 499)])
def test_image_cells_are_those_that_the_published_code_keeps(width: int, height: int) -> None:
    grid = 24
    expected = torch.ones(grid, grid, dtype=torch.bool)
    if width / height > 1:
        padding = (grid - int(height * (grid / width))) // 2
        expected[:padding], expected[grid - padding :] = False, False
    else:
        padding = (grid - int(width * (grid / height))) // 2
        expected[:, :padding], expected[:, grid - padding :] = False, False
    assert torch.equal(image_cells(torch.tensor([[width, height]]), grid)[0], expected)


def test_groups_of_queries_have_grids_and_blocks_of_their_own() -> None:
    options = {**SMALL_AGGREGATOR, "query_grids": [4, 2], "windows": [1, 2]}
    fusion = build_fusion("spatial-vision-aggregator", encoder_channels=[6, 5], grid=4, options=options)
    fused = fusion([torch.randn(2, 6, 4, 4), torch.randn(2, 5, 8, 8)])
    assert fused.shape == (2, 16, fusion.channels) == (2, 16, 32)
    assert [block.cells for block in (fusion.samplers[0][0], fusion.samplers[1][0])] == [[1, 4], [4, 16]]
    with pytest.raises(ShapeError, match="3 x 3 queries"):
        build_fusion(
            "spatial-vision-aggregator",
            encoder_channels=[6],
            grid=4,
            options={**SMALL_AGGREGATOR, "query_grids": [3], "windows": [1]},
        )


def test_windows_can_be_picked_by_query() -> None:
    windows = VisualWindows(
        keys=torch.randn(4, 2, 3), mask=torch.ones(4, 2, dtype=torch.bool), overall=torch.randn(4, 3)
    )
    picked = windows.select(torch.tensor([3, 1]))
    assert torch.equal(picked.keys[0], windows.keys[3])
    assert torch.equal(picked.overall[1], windows.overall[1])


STRATEGIES = [
    "channel-concat",
    "sequence-append",
    "mixture-of-resolutions",
    "patch-info-mining",
    "deformable-mining",
    "spatial-vision-aggregator",
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_reaches_every_encoder_and_every_parameter(strategy: str) -> None:
    torch.manual_seed(0)
    options = SMALL_AGGREGATOR if strategy.startswith("spatial") else {}
    fusion = _randomised(
        build_fusion(strategy, encoder_channels=[8, 6, 4], grid=4, encoder_grids=[4, 8, 4], options=options)
    )
    sizes = [(8, 4), (6, 8), (4, 4)]
    features = [torch.randn(2, channels, side, side, requires_grad=True) for channels, side in sizes]
    fused = fusion(features)
    assert fused.shape == (2, fusion.num_tokens, fusion.channels)
    fused.square().sum().backward()
    for feature in features:
        assert feature.grad is not None
        assert bool(feature.grad.flatten(2).any(-1).all()), "every channel counts"
    idle = [name for name, parameter in fusion.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert all(name.startswith("adapters.") for name in idle), "adapters work between the encoder's blocks"


@pytest.mark.parametrize(
    ("strategy", "arguments", "error", "message"),
    [
        ("channel-concat", {"options": {"align_corner": True}}, RecipeError, 'Did you mean "align_corners"'),
        ("patch-info-mining", {"options": {"image_grid": 0}}, RecipeError, "image_grid is 0"),
        ("patch-info-mining", {"encoder_channels": [8]}, RecipeError, "at least 2"),
        ("mixture-of-resolutions", {"grid": 5}, ShapeError, "Set model.fusion.grid to 4"),
        ("mixture-of-resolutions", {"encoder_grids": [4, 6]}, ShapeError, "whole multiple"),
        ("deformable-mining", {"options": {"num_heads": 3}}, ShapeError, "3 heads over 8 channels"),
        ("spatial-vision-aggregator", {"encoder_grids": None}, RecipeError, "Name the windows"),
        ("spatial-vision-aggregator", {"options": {"windows": [1]}}, RecipeError, "1 entries for 2 encoders"),
        ("spatial-vision-aggregator", {"options": {"channels": 9}}, RecipeError, "16 heads over 9 channels"),
    ],
)
def test_what_cannot_be_fused_says_why(
    strategy: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    defaults: dict[str, Any] = {"encoder_channels": [8, 6], "grid": 4, "encoder_grids": [4, 8]}
    with pytest.raises(error, match=message):
        build_fusion(strategy, **{**defaults, **arguments})


def test_an_encoder_without_blocks_cannot_be_mixed_into() -> None:
    fusion = build_fusion("mixture-of-resolutions", encoder_channels=[6, 5], grid=4)
    with pytest.raises(ShapeError, match="the first encoder is a Identity"):
        run_encoders(fusion, [nn.Identity(), nn.Identity()], [torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 8, 8)])
    plain = build_fusion("mixture-of-resolutions", encoder_channels=[6, 5], grid=4, options={"adapters": False})
    features = run_encoders(plain, [nn.Identity(), nn.Identity()], [torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 8, 8)])
    assert plain(features).shape == (1, 16, 6)
