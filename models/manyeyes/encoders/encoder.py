"""What every encoder is, and what a row of the table says about one.

Encoders made of equal blocks may be run in groups. A fusion that reaches into an encoder (LLaVA-HR injects a second
encoder's map between groups of blocks) needs nothing but this::

    tokens = encoder.embed(pixel_values)
    tokens = encoder.forward_blocks(tokens, start=0, stop=6)
    patches = tokens[:, encoder.num_prefix_tokens :]          # change these
    ...
    tokens = encoder.forward_blocks(tokens, start=18, stop=encoder.num_blocks)
    feature_map = encoder.finish(tokens)

Run in one group or in many, the result is the same, bit for bit.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from manyeyes.errors import ShapeError

TensorMap = dict[str, Tensor]
Output = TypeVar("Output")
_COMMIT = re.compile("[0-9a-f]{40}")


class Encoder(nn.Module, ABC):
    """A vision expert: pixels in, one feature map out.

    Statistics of batch normalisation never move: batches here are small and mixed, and a bundle must compute what
    training computed. ``train()`` therefore leaves those layers in evaluation mode; their weights train as any other.

    Attributes:
        net: The network itself, with the keys that its publisher uses.
        channels: Channels of the feature map.
        stride: Pixels a side that one cell of the feature map covers, rounded up where that is no whole number.
        image_size: Pixels a side that it is built for.
        checkpointing: Whether parts that run through ``run_part`` keep their input alone for the backward pass.
    """

    def __init__(self, net: nn.Module, *, channels: int, stride: int, image_size: int, grid: int | None = None) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.stride = stride
        self.image_size = image_size
        self.checkpointing = False
        self._grid = grid

    @property
    def grid(self) -> int:
        """Side of the feature map at ``image_size``, in cells."""
        return self._grid or -(-self.image_size // self.stride)

    @abstractmethod
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: ``[B, 3, H, W]``, normalised as the row says; H = W = ``image_size``.

        Returns:
            ``[B, channels, grid, grid]``.
        """

    def set_checkpointing(self, on: bool) -> None:
        """Compute the inside of each part again in the backward pass instead of keeping it: less memory, more time.

        Gradients are the same. It only counts while training, and only where a gradient is wanted.
        """
        self.checkpointing = on

    def run_part(self, part: Callable[..., Output], *inputs: Any) -> Output:
        """Call ``part(*inputs)``; every family runs its blocks or stages through here."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            computed: Output = checkpoint(part, *inputs, use_reentrant=False)
            return computed
        return part(*inputs)

    def train(self, mode: bool = True) -> Encoder:  # the framework's switch
        """Switch dropout and the like; batch normalisation stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        return self


@dataclass(frozen=True)
class EncoderRow:
    """One row of ENCODERS.

    Attributes:
        family: Which file builds it; a key of FAMILIES.
        channels: Channels of the feature map.
        stride: Pixels a side of one cell of the feature map.
        image_size: Pixels a side, unless a recipe says otherwise.
        mean: Mean of each RGB channel that pixels are normalised with, on a scale of 0 to 1.
        std: Standard deviation of each RGB channel, on a scale of 0 to 1.
        parameters: Number of parameters at the true size.
        pretraining: What the published weights learned from.
        licence: Licence of the published weights.
        source: Where the published weights are; ``scratch:`` when there are none.
        paper: Where the architecture comes from.
        architecture: What the family needs to build it.
        small: Replaces parts of ``architecture`` and ``channels`` at the small size; same code, seconds to test.
        resample: Filter for resizing an image to ``image_size``.
        fit: What happens to an image that is not square.
        fill: Colour around an image that is padded, RGB, 0 to 255; the mean colour, ``int(255 * mean)``, when left out.
        features: Which layer's output is taken, and what becomes of the class token.
        image_sizes: All sizes that published models use it at; position embeddings are resampled for them.
        files: Names that the publisher gives the file of weights; the first that is there is read.
        parts: Where a publisher spreads the weights over several files: what to put before the keys of each, and its
            path in the repository.
        entry: Where a pickle keeps the tensors beside other things; empty when it holds nothing else.
        small_image_size: Pixels a side at the small size; ``image_size`` when left out.
    """

    family: str
    channels: int
    stride: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    pretraining: str
    licence: str
    source: str
    paper: str
    architecture: Mapping[str, object] = field(default_factory=dict)
    small: Mapping[str, object] = field(default_factory=dict)
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["stretch", "crop", "pad"] = "pad"
    features: str = ""
    image_sizes: tuple[int, ...] = ()
    files: tuple[str, ...] = ("model.safetensors",)
    parts: Mapping[str, str] = field(default_factory=dict)
    entry: str = ""
    small_image_size: int | None = None
    fill: tuple[int, int, int] | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether ``source`` always means the same weights; a branch of a hub repository does not."""
        return not self.source.startswith("hub:") or _COMMIT.fullmatch(self.source.rpartition("@")[2]) is not None


@dataclass(frozen=True)
class EncoderFamily:
    """The two things that a family's file offers.

    Attributes:
        build: Makes the encoder from architecture and image size, freshly initialised.
        convert: Turns published tensors into the state of ``Encoder.net``; raises ``SourceError`` when they do not fit.
    """

    build: Callable[[Mapping[str, object], int], Encoder]
    convert: Callable[[TensorMap, Encoder], TensorMap]


def check_image_size(image_size: int, *, multiple: int) -> None:
    """Refuse an image that an encoder cannot cut into whole patches or windows.

    Args:
        image_size: Pixels a side.
        multiple: Pixels a side of what it is cut into.

    Raises:
        ShapeError: Not a multiple.
    """
    if image_size % multiple:
        raise ShapeError(
            f"image_size is {image_size}",
            f"a multiple of {multiple} is needed",
            f"Use {max(1, round(image_size / multiple)) * multiple}.",
        )


def resample_bilinear(feature: Tensor, grid: int) -> Tensor:
    """Feature map ``[B, C, h, w]`` to ``[B, C, grid, grid]``: bilinear, in fp32; as it is where it has that size."""
    if feature.shape[-1] == grid:
        return feature
    resampled = functional.interpolate(feature.float(), size=(grid, grid), mode="bilinear", align_corners=False)
    return resampled.to(feature.dtype)


# Shape suffixes: B batch, N tokens (prefix tokens first, then patches row by row), C channels.


class BlockEncoder(Encoder):
    """An encoder whose work is a chain of blocks on one sequence of tokens.

    Attributes:
        num_prefix_tokens: Tokens in front of the patches: 1 with a class token, else 0.
        width: Channels of a token inside the chain.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        channels: int,
        stride: int,
        image_size: int,
        width: int,
        num_prefix_tokens: int = 0,
        grid: int | None = None,
    ) -> None:
        super().__init__(net, channels=channels, stride=stride, image_size=image_size, grid=grid)
        self.width = width
        self.num_prefix_tokens = num_prefix_tokens

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """How many blocks there are."""

    @abstractmethod
    def embed(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to the tokens that enter the first block, ``[B, N, width]``."""

    @abstractmethod
    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run the blocks from ``start`` (counted from 0) to before ``stop``; ``[B, N, width]`` in and out."""

    @abstractmethod
    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """What leaves the last block, ``[B, N, width]``, to the feature map, ``[B, channels, grid, grid]``."""

    def as_map(self, tokens_BNC: Tensor) -> Tensor:
        """The patches among the tokens as a map, ``[B, C, grid, grid]``."""
        patches_BNC = tokens_BNC[:, self.num_prefix_tokens :]
        return patches_BNC.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # type: ignore[no-any-return]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, channels, grid, grid]``."""
        return self.finish(self.forward_blocks(self.embed(pixel_values), start=0, stop=self.num_blocks))


class StackEncoder(BlockEncoder):
    """One whose blocks are ``net.blocks``, each of which takes the tokens alone."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.net.blocks)  # type: ignore[arg-type]

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run some of the blocks."""
        for block in self.net.blocks[start:stop]:  # type: ignore[index]
            tokens_BNC = self.run_part(block, tokens_BNC)
        return tokens_BNC
