"""Encoders made of equal blocks, which may be run in groups.

A fusion that reaches into an encoder (LLaVA-HR injects a second encoder's map between groups of blocks) needs nothing
but this::

    tokens = encoder.embed(pixel_values)
    tokens = encoder.forward_blocks(tokens, start=0, stop=6)
    patches = tokens[:, encoder.num_prefix_tokens :]          # change these
    ...
    tokens = encoder.forward_blocks(tokens, start=18, stop=encoder.num_blocks)
    feature_map = encoder.finish(tokens)

Run in one group or in many, the result is the same, bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from manyeyes.encoders.encoder import Encoder

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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, channels, grid, grid]``."""
        return self.finish(self.forward_blocks(self.embed(pixel_values), start=0, stop=self.num_blocks))
