"""What every fusion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.errors import RecipeError, ShapeError, did_you_mean
from manyeyes.strict import StrictModel

OptionsType = TypeVar("OptionsType", bound=BaseModel)


class Fusion(nn.Module, ABC):
    """Several encoders' feature maps in, one set of visual tokens out.

    Attributes:
        channels: Width of a visual token.
        grid: Side of the grid, or of each of the grids, that its tokens make.
        num_tokens: Visual tokens an image; those of each grid in rows from the top left, grid after grid.
        uses_image_sizes: Whether it needs ``image_sizes``.
    """

    grid: int

    def __init__(self, *, channels: int, num_tokens: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_tokens = num_tokens
        self.uses_image_sizes = False

    @abstractmethod
    def forward(self, features: Sequence[Tensor], image_sizes: Tensor | None = None) -> Tensor:
        """Fuse feature maps.

        Args:
            features: One ``[B, C_k, h_k, w_k]`` map per encoder, in recipe order.
            image_sizes: ``[B, 2]``, width and height of each image before it was padded to a square; needed where
                ``uses_image_sizes`` says so.

        Returns:
            ``[B, num_tokens, channels]``.

        Raises:
            ShapeError: Another number of maps, or of channels in one, than the fusion was built for.
        """


@runtime_checkable
class BlockwiseEncoder(Protocol):
    """What a fusion needs of an encoder to reach between its blocks; ``manyeyes.encoders.encoder`` has it.

    Attributes:
        num_prefix_tokens: Tokens in front of the patches.
        width: Channels of a token between blocks.
    """

    num_prefix_tokens: int
    width: int

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""

    def embed(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to the tokens that enter the first block, ``[B, N, width]``."""

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run the blocks from ``start`` to before ``stop``."""

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """What leaves the last block to the feature map, ``[B, C, h, w]``."""


class InjectingFusion(Fusion):
    """A fusion that reaches into an encoder while it runs, and therefore runs the encoders itself."""

    @abstractmethod
    def encode(self, encoders: Sequence[nn.Module], pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the encoders.

        Args:
            encoders: In recipe order.
            pixel_values: ``[B, 3, H_k, W_k]`` for each.

        Returns:
            What ``forward`` takes: one ``[B, C_k, h_k, w_k]`` map per encoder.

        Raises:
            ShapeError: The encoder that it reaches into is no ``BlockwiseEncoder``.
        """


class FusionOptions(StrictModel):
    """What a recipe may say under ``model.fusion.options``; each strategy has its own fields."""


class ResampleOptions(FusionOptions):
    """How feature maps are brought to the token grid."""

    align_corners: bool = Field(
        default=False, description="Bilinear interpolation puts corner cells on corner cells, as Eagle's code does."
    )
    average: bool = Field(
        default=True, description="Whole factors are averaged over; false interpolates them too, as Eagle's code does."
    )


@dataclass(frozen=True)
class FusionRow:
    """One row of FUSIONS.

    Attributes:
        build: Makes the fusion from the channels of each encoder and the side of the token grid; takes the keywords
            ``encoder_grids`` (sides of the encoders' maps, in cells, or None) and ``options``.
        description: What it does, in a line.
        source: Where it comes from.
        options: Fields of ``model.fusion.options``.
        min_encoders: Fewest encoders that it can fuse.
    """

    build: Callable[..., Fusion]
    description: str
    source: str
    options: type[FusionOptions] = FusionOptions
    min_encoders: int = 1

    def check_options(self, options: dict[str, Any]) -> FusionOptions:
        """Check ``model.fusion.options`` of a recipe.

        Raises:
            RecipeError: An unknown option (names the nearest), or a value of the wrong kind.
        """
        return check_options(options, self.options, where="model.fusion.options")


def check_options(options: dict[str, Any], kind: type[OptionsType], *, where: str) -> OptionsType:
    """Check a recipe's options against the fields that they may have.

    Args:
        options: As the recipe has them.
        kind: What they may be.
        where: Their place in the recipe, for messages.

    Raises:
        RecipeError: An unknown option (names the nearest), or a value of the wrong kind.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name, choices = str(problem["loc"][0]), sorted(kind.model_fields)
        if problem["type"] == "extra_forbidden":
            known = f"The options there are {', '.join(choices)}." if choices else "There are no options."
            raise RecipeError(f"{where}.{name}", "no such option", f"{did_you_mean(name, choices)}{known}") from error
        raise RecipeError(
            f"{where}.{name} is {problem['input']!r}", str(problem["msg"]).removeprefix("Value error, "), "Change it."
        ) from error


def check_features(features: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Refuse features that do not come from the encoders that a fusion was built for.

    Args:
        features: One ``[B, C_k, h_k, w_k]`` map per encoder.
        channels: C_k of each.

    Raises:
        ShapeError: Another number of maps, or of channels in one.
    """
    found = [feature.shape[1] for feature in features]
    if found != list(channels):
        raise ShapeError(
            f"features have {found} channels", f"{list(channels)} are needed", "Pass every encoder's map, in order."
        )


def resample_to_grid(feature: Tensor, grid: int, *, align_corners: bool = False, average: bool = True) -> Tensor:
    """Bring a feature map to a square grid.

    A map that already fits is returned as it is. Interpolation is bilinear and computed in float32.

    Args:
        feature: ``[B, C, h, w]``.
        grid: Side of the output, in cells.
        align_corners: Whether corner cells keep the place of their centres, as in Eagle.
        average: Whether whole factors are averaged over instead of interpolated.

    Returns:
        ``[B, C, grid, grid]``.

    Source:
        Eagle, arXiv:2408.15998; its code interpolates always, with the corners aligned.
    """
    height, width = feature.shape[-2:]
    if height == width == grid:
        return feature
    if average and height % grid == 0 and width % grid == 0:
        return functional.avg_pool2d(feature, kernel_size=(height // grid, width // grid))
    resampled = functional.interpolate(feature.float(), size=(grid, grid), mode="bilinear", align_corners=align_corners)
    return resampled.to(feature.dtype)


def join_maps(features: Sequence[Tensor]) -> Tensor:
    """Several encoders' maps as one: channels joined at the size of the first.

    Args:
        features: ``[B, C_k, h_k, w_k]`` each.

    Returns:
        ``[B, sum(C_k), h_0, w_0]``; bilinear, corners not aligned, where sizes differ.
    """
    size = features[0].shape[-2:]
    maps = [
        feature
        if feature.shape[-2:] == size
        else functional.interpolate(feature.float(), size=size, mode="bilinear", align_corners=False).to(feature.dtype)
        for feature in features
    ]
    return torch.cat(maps, dim=1)
