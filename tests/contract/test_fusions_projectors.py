"""Every projector against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.model.projector import build_projector

SIZES: dict[str, Any] = {"depth": 2, "in_channels": 8, "out_channels": 12, "grid": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {},
    "pixel-unshuffle": {"factor": 2},
    "resampler": {"num_queries": 5, "depth": 2, "num_heads": 2},
    "c-abstractor": {"grid": 2, "depth": 1, "channels": 16},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_tokens_come_out_as_many_and_as_wide_as_promised(kind: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(kind, **SIZES, options=OPTIONS[kind])
    tokens = torch.randn(3, 16, 8, requires_grad=True)
    projected = projector(tokens)
    assert projected.shape == (3, projector.num_tokens(16), 12)
    projected.square().sum().backward()
    assert tokens.grad is not None
    assert bool(tokens.grad.any(-1).all()), "every token counts"
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
    alone = projector(tokens[1:2])
    torch.testing.assert_close(alone, projected[1:2])


@pytest.mark.parametrize("kind", ["pixel-unshuffle", "c-abstractor"])
def test_each_of_several_grids_is_projected_on_its_own(kind: str) -> None:
    # Sequence append gives one grid an encoder.
    torch.manual_seed(0)
    projector = build_projector(kind, **SIZES, options=OPTIONS[kind])
    first, second = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    joined = torch.cat([projector(first), projector(second)], dim=1)
    torch.testing.assert_close(projector(torch.cat([first, second], dim=1)), joined)
    assert projector.num_tokens(32) == joined.shape[1]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mlp_has_as_many_linear_layers_as_it_says(depth: int) -> None:
    projector = build_projector("mlp", **{**SIZES, "depth": depth})
    linear = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert [layer.in_features for layer in linear] == [8] + [12] * (depth - 1)
    hidden = tokens = torch.randn(1, 3, 8)
    for place, layer in enumerate(linear):
        hidden = layer(functional.gelu(hidden) if place else hidden)
    torch.testing.assert_close(projector(tokens), hidden)


def test_pixel_unshuffle_joins_the_four_tokens_of_a_square() -> None:
    torch.manual_seed(0)
    projector: Any = build_projector("pixel-unshuffle", **{**SIZES, "depth": 1}, options={"factor": 2})
    tokens = torch.randn(1, 16, 8)
    square = tokens[0, [2, 3, 6, 7]]
    joined = square.T.flatten()
    expected = projector.layers(functional.layer_norm(joined, (32,)))
    torch.testing.assert_close(projector(tokens)[0, 1], expected)
    with pytest.raises(ShapeError, match="multiple of the factor"):
        build_projector("pixel-unshuffle", **SIZES, options={"factor": 3})


def test_resampler_sees_a_set_and_gives_a_fixed_number() -> None:
    torch.manual_seed(0)
    projector = build_projector("resampler", **SIZES, options=OPTIONS["resampler"])
    tokens = torch.randn(1, 16, 8)
    torch.testing.assert_close(projector(tokens[:, torch.randperm(16)]), projector(tokens))
    assert projector(torch.randn(1, 40, 8)).shape == (1, 5, 12)
    assert projector.token_grid(4) is None


def test_resampler_block_is_attention_over_tokens_and_queries_then_an_mlp() -> None:
    torch.manual_seed(0)
    projector: Any = build_projector("resampler", **SIZES, options={"num_queries": 3, "depth": 1, "num_heads": 2})
    block, tokens = projector.blocks[0], torch.randn(1, 4, 8)
    z = projector.queries
    normed = block.query_norm(z)
    both = torch.cat([block.token_norm(tokens[0]), normed])
    key, value = both @ block.key_value.weight[:8].T, both @ block.key_value.weight[8:].T
    query = normed @ block.query.weight.T
    heads = [(query[:, part] @ key[:, part].T / 2).softmax(-1) @ value[:, part] for part in (slice(0, 4), slice(4, 8))]
    z = z + torch.cat(heads, -1) @ block.output.weight.T
    z = z + functional.gelu(block.mlp[0](z) @ block.mlp[1].weight.T) @ block.mlp[3].weight.T
    torch.testing.assert_close(projector(tokens)[0], projector.output(projector.norm(z)))


def test_c_abstractor_pools_between_its_stages() -> None:
    torch.manual_seed(0)
    projector: Any = build_projector("c-abstractor", **SIZES, options=OPTIONS["c-abstractor"]).eval()
    tokens = torch.randn(1, 16, 8)
    maps = (tokens + projector.positions).transpose(1, 2).reshape(1, 8, 4, 4)
    pooled = functional.avg_pool2d(projector.before(maps), 2)
    expected = projector.layers(projector.after(pooled).flatten(2).transpose(1, 2))
    torch.testing.assert_close(projector(tokens), expected)
    assert projector.token_grid(4) == 2


def test_identity_keeps_tokens() -> None:
    projector = build_projector("identity", depth=2, in_channels=8, out_channels=8, grid=4)
    tokens = torch.randn(1, 16, 8)
    assert torch.equal(projector(tokens), tokens)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pixel-unshufle", {}, 'Did you mean "pixel-unshuffle"'),
        ("resampler", {"queries": 3}, 'Did you mean "num_queries"'),
        ("mlp", {"factor": 2}, "mlp has no options"),
        ("c-abstractor", {"grid": "wide"}, "options.grid is 'wide'"),
    ],
)
def test_unknown_kinds_and_options_are_refused_by_name(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_projector(kind, **SIZES, options=options)
