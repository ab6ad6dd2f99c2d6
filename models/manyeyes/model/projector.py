"""From fused features to the language model's width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import RecipeError, ShapeError, did_you_mean
from manyeyes.strict import StrictModel

ProjectorKind = Literal["linear", "mlp", "identity", "pixel-unshuffle", "resampler", "c-abstractor"]


class Projector(nn.Module):
    """Linear layers with GELU between them, applied to each visual token on its own.

    Attributes:
        in_channels: Width of a fused token.
        out_channels: Width of the language model.
        grid: Side of the grid that its tokens make, in rows from the top left; None when they make none.

    Source:
        LLaVA-1.5, arXiv:2310.03744 (two layers).
    """

    def __init__(self, kind: ProjectorKind, *, depth: int, in_channels: int, out_channels: int) -> None:
        """Make a projector with torch's own initial weights.

        Args:
            kind: ``mlp`` has ``depth`` linear layers, ``linear`` one, ``identity`` none.
            depth: Linear layers of an mlp.
            in_channels: Width of a fused token.
            out_channels: Width of the language model.

        Raises:
            ShapeError: An identity between different widths.
            RecipeError: No such kind.
        """
        super().__init__()
        if kind not in ("linear", "mlp", "identity"):
            raise RecipeError(f'model.projector.kind is "{kind}"', "no such projector", "Use mlp, linear or identity.")
        if kind == "identity" and in_channels != out_channels:
            raise ShapeError(
                f"identity projector between {in_channels} and {out_channels} channels",
                "both widths must be equal",
                "Set model.projector.kind to mlp or linear.",
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.layers = _mlp({"linear": 1, "mlp": depth, "identity": 0}[kind], in_channels, out_channels)

    def num_tokens(self, num_fused: int) -> int:
        """Visual tokens that ``num_fused`` fused tokens become."""
        return num_fused

    def token_grid(self, grid: int) -> int | None:
        """Side of the grid that the tokens of a ``grid`` x ``grid`` map make; None when they make none."""
        return grid

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., in_channels]`` to ``[..., out_channels]``."""
        projected: Tensor = self.layers(tokens)
        return projected


class ProjectorOptions(StrictModel):
    """What a recipe may say under ``model.projector.options``; each kind has its own fields."""


class UnshuffleOptions(ProjectorOptions):
    """Options of pixel-unshuffle."""

    factor: int = Field(default=2, ge=1, description="Tokens a side that become one.")


class ResamplerOptions(ProjectorOptions):
    """Options of the resampler; the defaults are Flamingo's."""

    num_queries: int = Field(default=64, ge=1, description="Tokens that it gives, whatever the number that it takes.")
    depth: int = Field(default=6, ge=1, description="Blocks of attention and mlp.")
    num_heads: int = Field(default=8, ge=1, description="Attention heads.")


class AbstractorOptions(ProjectorOptions):
    """Options of the C-Abstractor; the defaults are Honeybee's."""

    grid: int = Field(default=12, ge=1, description="Side of the grid of tokens that it gives.")
    depth: int = Field(default=3, ge=1, description="ResNet blocks before, and again after, the pooling.")
    channels: int = Field(default=1024, ge=1, description="Width inside.")


class PixelUnshuffleProjector(nn.Module):
    """Neighbouring tokens become channels of one, then a norm and an mlp.

    ``out = MLP(LN(unshuffle_r(x)))``: r x r tokens become one of ``r * r * C`` channels, in torch's order (channel,
    then row, then column inside the square).

    Source:
        InternVL 1.5, arXiv:2404.16821, section 3.1; its own order of channels differs.
    """

    def __init__(
        self, *, depth: int, in_channels: int, out_channels: int, grid: int, options: UnshuffleOptions | None = None
    ) -> None:
        super().__init__()
        self.factor = (options or UnshuffleOptions()).factor
        if grid % self.factor:
            raise ShapeError(
                f"pixel-unshuffle by {self.factor} of a grid of {grid}",
                "a grid that is a multiple of the factor is needed",
                "Change model.fusion.grid or model.projector.options.factor.",
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.grid = grid
        width = in_channels * self.factor**2
        self.norm = nn.LayerNorm(width)
        self.layers = _mlp(depth, width, out_channels)

    def num_tokens(self, num_fused: int) -> int:
        """Visual tokens that ``num_fused`` fused tokens become."""
        return num_fused // self.factor**2

    def token_grid(self, grid: int) -> int | None:
        """Side of the grid that the tokens of a ``grid`` x ``grid`` map make."""
        return grid // self.factor

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, maps * grid * grid, in_channels]`` to ``[B, maps * (grid / factor)^2, out_channels]``."""
        maps = _tokens_to_maps(tokens, self.grid)
        unshuffled = functional.pixel_unshuffle(maps, self.factor)
        projected: Tensor = self.layers(self.norm(unshuffled.flatten(2).transpose(1, 2)))
        return projected.view(tokens.shape[0], -1, self.out_channels)


class ResamplerProjector(nn.Module):
    """Learned queries gather from all tokens: any number in, a fixed number out.

    With z the queries, starting from learned vectors, and x the tokens, D times::

        z = z + W_o attention(W_q LN(z), W_k [LN(x) ; LN(z)], W_v [LN(x) ; LN(z)])
        z = z + W_2 GELU(W_1 LN(z))                        4 times as wide inside

    then ``out = W LN(z) + b``. Only this last layer has a bias. Tokens carry no positions of their own here: encoders
    and fusions have put them in.

    Source:
        Flamingo, arXiv:2204.14198, section 3.1.1 (Perceiver resampler).
    """

    def __init__(self, *, in_channels: int, out_channels: int, options: ResamplerOptions | None = None) -> None:
        super().__init__()
        options = options or ResamplerOptions()
        if in_channels % options.num_heads:
            raise ShapeError(
                f"{options.num_heads} heads over {in_channels} channels",
                "a whole number of channels a head is needed",
                "Set model.projector.options.num_heads.",
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.queries = nn.Parameter(torch.randn(options.num_queries, in_channels) * 0.02)
        self.blocks = nn.ModuleList(_ResamplerBlock(in_channels, options.num_heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(in_channels)
        self.output = nn.Linear(in_channels, out_channels)

    def num_tokens(self, num_fused: int) -> int:  # noqa: ARG002 - the same for every projector
        """Visual tokens that ``num_fused`` fused tokens become."""
        return self.queries.shape[0]

    def token_grid(self, grid: int) -> int | None:  # noqa: ARG002 - the same for every projector
        """None: queries make no grid."""
        return None

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, in_channels]`` to ``[B, num_queries, out_channels]``."""
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        for block in self.blocks:
            queries = block(queries, tokens)
        projected: Tensor = self.output(self.norm(queries))
        return projected


class _ResamplerBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.token_norm = nn.LayerNorm(channels)
        self.query_norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 4 * channels, bias=False),
            nn.GELU(),
            nn.Linear(4 * channels, channels, bias=False),
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        normed = self.query_norm(queries)
        key, value = self.key_value(torch.cat([self.token_norm(tokens), normed], dim=1)).chunk(2, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(normed), key, value)]
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        queries = queries + self.output(attended)
        changed: Tensor = queries + self.mlp(queries)
        return changed


class AbstractorProjector(nn.Module):
    """Convolutions before and after pooling to a smaller grid keep neighbours together.

    ``out = MLP(RegStage(pool(RegStage(x + P))))``: P learned positions, ``depth`` ResNet blocks (RegNet's, with SiLU
    and norms over channels) on either side of adaptive average pooling, and an mlp at every token.

    Source:
        Honeybee, arXiv:2312.06742, section 3.2 (C-Abstractor).
    """

    def __init__(
        self, *, depth: int, in_channels: int, out_channels: int, grid: int, options: AbstractorOptions | None = None
    ) -> None:
        super().__init__()
        options = options or AbstractorOptions()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.grid = grid
        self.pooled_grid = options.grid
        self.positions = nn.Parameter(torch.zeros(1, grid * grid, in_channels))
        nn.init.trunc_normal_(self.positions, std=0.02)
        width = options.channels
        self.before = _reg_stage(options.depth, in_channels, width)
        self.after = _reg_stage(options.depth, width, width)
        self.layers = _mlp(depth, width, out_channels)

    def num_tokens(self, num_fused: int) -> int:
        """Visual tokens that ``num_fused`` fused tokens become."""
        return num_fused // self.grid**2 * self.pooled_grid**2

    def token_grid(self, grid: int) -> int | None:  # noqa: ARG002 - the same for every projector
        """Side of the pooled grid."""
        return self.pooled_grid

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, maps * grid * grid, in_channels]`` to ``[B, maps * pooled_grid^2, out_channels]``."""
        maps = _tokens_to_maps(tokens, self.grid)
        positions = _tokens_to_maps(self.positions, self.grid)
        pooled = functional.adaptive_avg_pool2d(self.before(maps + positions), self.pooled_grid)
        projected: Tensor = self.layers(self.after(pooled).flatten(2).transpose(1, 2))
        return projected.view(tokens.shape[0], -1, self.out_channels)


AnyProjector = Projector | PixelUnshuffleProjector | ResamplerProjector | AbstractorProjector

PROJECTORS: dict[str, type[ProjectorOptions]] = {
    "linear": ProjectorOptions,
    "mlp": ProjectorOptions,
    "identity": ProjectorOptions,
    "pixel-unshuffle": UnshuffleOptions,
    "resampler": ResamplerOptions,
    "c-abstractor": AbstractorOptions,
}


def build_projector(
    kind: str,
    *,
    depth: int,
    in_channels: int,
    out_channels: int,
    grid: int,
    options: Mapping[str, Any] | None = None,
) -> AnyProjector:
    """Make a projector with fresh weights.

    Args:
        kind: Row of PROJECTORS.
        depth: Linear layers of an mlp, GELU between them.
        in_channels: Width of a fused token.
        out_channels: Width of the language model.
        grid: Side of the grids that fused tokens make.
        options: The kind's own, as a recipe has them.

    Raises:
        RecipeError: No such kind or option; names the nearest.
        ShapeError: Widths or grid do not suit the kind.
    """
    checked = check_projector_options(kind, dict(options or {}))
    if isinstance(checked, UnshuffleOptions):
        return PixelUnshuffleProjector(
            depth=depth, in_channels=in_channels, out_channels=out_channels, grid=grid, options=checked
        )
    if isinstance(checked, ResamplerOptions):
        return ResamplerProjector(in_channels=in_channels, out_channels=out_channels, options=checked)
    if isinstance(checked, AbstractorOptions):
        return AbstractorProjector(
            depth=depth, in_channels=in_channels, out_channels=out_channels, grid=grid, options=checked
        )
    return Projector(kind, depth=depth, in_channels=in_channels, out_channels=out_channels)  # type: ignore[arg-type]


def projector_options(kind: str) -> type[ProjectorOptions]:
    """A row of PROJECTORS: the fields of ``model.projector.options``.

    Raises:
        RecipeError: No such kind; names the nearest.
    """
    if kind not in PROJECTORS:
        raise RecipeError(
            f'model.projector.kind is "{kind}"',
            "no such projector",
            f"{did_you_mean(kind, PROJECTORS)}The kinds are {', '.join(PROJECTORS)}.",
        )
    return PROJECTORS[kind]


def check_projector_options(kind: str, options: dict[str, Any]) -> ProjectorOptions:
    """Check ``model.projector.options`` of a recipe.

    Raises:
        RecipeError: No such kind or option (names the nearest), or a value of the wrong kind.
    """
    fields = projector_options(kind)
    try:
        return fields.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name, choices = str(problem["loc"][0]), sorted(fields.model_fields)
        place = f"model.projector.options.{name}"
        if problem["type"] == "extra_forbidden":
            known = f"The options there are {', '.join(choices)}." if choices else f"{kind} has no options."
            raise RecipeError(place, "no such option", f"{did_you_mean(name, choices)}{known}") from error
        raise RecipeError(f"{place} is {problem['input']!r}", str(problem["msg"]), "Change it.") from error


def _mlp(depth: int, in_channels: int, out_channels: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(depth):
        if index > 0:
            layers[f"gelu_{index}"] = nn.GELU()
        layers[f"linear_{index + 1}"] = nn.Linear(in_channels if index == 0 else out_channels, out_channels)
    return nn.Sequential(layers)


def _reg_stage(depth: int, in_channels: int, out_channels: int) -> RegStage:
    return RegStage(depth, in_channels, out_channels, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)


def _tokens_to_maps(tokens: Tensor, grid: int) -> Tensor:
    # [B, maps * grid * grid, C] -> [B * maps, C, grid, grid]
    num_maps = tokens.shape[1] // (grid * grid)
    maps = tokens.reshape(tokens.shape[0] * num_maps, grid * grid, tokens.shape[2])
    return maps.transpose(1, 2).reshape(-1, tokens.shape[2], grid, grid)
