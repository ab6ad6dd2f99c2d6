"""EVA-02-L as trained on detection, the "det-1024" expert of Eagle: windowed attention and 2-D rotary positions.

Neither timm nor transformers has it. Papers: "EVA-02", arXiv:2303.11331; "Exploring Plain Vision Transformer Backbones
for Object Detection" (ViTDet), arXiv:2203.16527, for the windows. Weights: BAAI, MIT (Yuxin-CV/EVA-02,
``eva02_L_coco_det_sys_o365.pth``), trained on Objects365 and COCO; Eagle, arXiv:2408.15998, runs it at 1024 pixels.

For a token at row r and column c of the grid (or of its window), pair i of the first half of a head's channels turns by
r * s * 10000^(-2i / (head / 2)), and of the second half by c likewise. Inside a window s is window / 16, in a global
block 16 / grid: positions always span 0 to 16. Each block is x + attention(norm(x)), then x + swiglu(norm(x)), where
swiglu(x) = w3 norm(silu(w1 x) * w2 x). Queries and values have biases, keys have none. There is no final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, StackEncoder, TensorMap, check_image_size
from manyeyes.encoders.vit import resample_positions
from manyeyes.encoders.weights import strip_prefix

# Shape suffixes: B batch (times windows inside one), H W rows and columns, N tokens, C channels, D channels of a head.

_EPSILON = 1e-6
_THETA = 10_000.0
_ROTARY_SPAN = 16


@dataclass(frozen=True)
class _Architecture:
    """``hidden`` is the width of the gated layer, 8/3 of ``width`` when None; ``span`` what rotary positions span."""

    patch_size: int
    width: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    hidden: int | None = None
    span: int = _ROTARY_SPAN


class RotaryPositions(nn.Module):
    """Turns queries and keys by their place in a square grid.

    The tables are not weights and are not saved: published files carry them once, once a block, or not at all.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, *, head_channels: int, grid: int, span: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.grid = grid
        self.span = span
        shape = (grid * grid, head_channels)
        self.register_buffer("cosine", torch.empty(shape), persistent=False)
        self.register_buffer("sine", torch.empty(shape), persistent=False)
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fill the tables; needed again after a model was built on the meta device."""
        half = self.head_channels // 2
        device = self.cosine.device
        frequencies = _THETA ** -(torch.arange(0, half, 2, device=device).float() / half)
        places = torch.arange(self.grid, device=device).float() * (self.span / self.grid)
        angles = (places[:, None] * frequencies).repeat_interleave(2, dim=1)
        rows = angles[:, None].expand(self.grid, self.grid, half)
        columns = angles[None, :].expand(self.grid, self.grid, half)
        table = torch.cat([rows, columns], dim=-1).reshape(self.grid * self.grid, self.head_channels)
        self.cosine.copy_(table.cos())
        self.sine.copy_(table.sin())

    def forward(self, heads_BHND: Tensor) -> Tensor:
        """Rotate neighbouring pairs of channels; ``[B, heads, N, D]`` in and out."""
        even, odd = heads_BHND.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return heads_BHND * self.cosine.to(heads_BHND.dtype) + turned * self.sine.to(heads_BHND.dtype)


class DetectorAttention(nn.Module):
    """Attention over all tokens that it is given."""

    def __init__(self, plan: _Architecture, *, grid: int) -> None:
        super().__init__()
        self.heads = plan.heads
        self.q_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.k_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.v_proj = nn.Linear(plan.width, plan.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(plan.width))
        self.v_bias = nn.Parameter(torch.zeros(plan.width))
        self.proj = nn.Linear(plan.width, plan.width)
        self.rope = RotaryPositions(head_channels=plan.width // plan.heads, grid=grid, span=plan.span)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """``[B, N, C]`` in and out."""
        query = functional.linear(tokens_BNC, self.q_proj.weight, self.q_bias)
        value = functional.linear(tokens_BNC, self.v_proj.weight, self.v_bias)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, self.k_proj(tokens_BNC), value)
        )
        mixed = functional.scaled_dot_product_attention(self.rope(query), self.rope(key), value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class DetectorSwiGlu(nn.Module):
    """``w3 norm(silu(w1 x) * w2 x)``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=_EPSILON)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., C]`` in and out."""
        return self.w3(self.ffn_ln(functional.silu(self.w1(tokens)) * self.w2(tokens)))  # type: ignore[no-any-return]


class DetectorBlock(nn.Module):
    """Attention in windows (or over the whole grid when ``window`` is 0), then the gated layer."""

    def __init__(self, plan: _Architecture, *, grid: int, window: int) -> None:
        super().__init__()
        self.grid = grid
        self.window = window
        self.norm1 = nn.LayerNorm(plan.width, eps=_EPSILON)
        self.attn = DetectorAttention(plan, grid=window or grid)
        self.norm2 = nn.LayerNorm(plan.width, eps=_EPSILON)
        self.mlp = DetectorSwiGlu(plan.width, plan.hidden or int(plan.width * 4 * 2 / 3))

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """``[B, grid * grid, C]`` in and out."""
        normed = self.norm1(tokens_BNC)
        attended = self._attend_in_windows(normed) if self.window else self.attn(normed)
        tokens_BNC = tokens_BNC + attended
        return tokens_BNC + self.mlp(self.norm2(tokens_BNC))  # type: ignore[no-any-return]

    def _attend_in_windows(self, tokens_BNC: Tensor) -> Tensor:
        across = -(-self.grid // self.window)
        margin = across * self.window - self.grid
        channels = tokens_BNC.shape[-1]
        map_BHWC = tokens_BNC.unflatten(1, (self.grid, self.grid))
        if margin:
            map_BHWC = functional.pad(map_BHWC, (0, 0, 0, margin, 0, margin))
        windows = map_BHWC.reshape(-1, across, self.window, across, self.window, channels).transpose(2, 3)
        windows = self.attn(windows.reshape(-1, self.window * self.window, channels))
        map_BHWC = windows.reshape(-1, across, across, self.window, self.window, channels).transpose(2, 3)
        map_BHWC = map_BHWC.reshape(-1, across * self.window, across * self.window, channels)
        return map_BHWC[:, : self.grid, : self.grid].flatten(1, 2)  # type: ignore[no-any-return]


class PatchProjection(nn.Module):
    """Pixels of a patch to a token; a module of its own because publishers' keys have it so."""

    def __init__(self, plan: _Architecture) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, plan.width, kernel_size=plan.patch_size, stride=plan.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, N, C]``."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class DetectorNet(nn.Module):
    """The network, with the publisher's keys."""

    def __init__(self, plan: _Architecture, *, grid: int) -> None:
        super().__init__()
        self.patch_embed = PatchProjection(plan)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, plan.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            DetectorBlock(plan, grid=grid, window=0 if index in plan.global_blocks else plan.window)
            for index in range(plan.depth)
        )


class Eva02DetectorEncoder(StackEncoder):
    """EVA-02 of a detector; the feature map is its last block, with no norm."""

    net: DetectorNet

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches and learned positions."""
        return self.net.patch_embed(pixel_values) + self.net.pos_embed  # type: ignore[no-any-return]

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """The tokens as a map."""
        return tokens_BNC.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # type: ignore[no-any-return]


def _build(architecture: Mapping[str, object], image_size: int) -> Eva02DetectorEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=plan.patch_size)
    net = DetectorNet(plan, grid=image_size // plan.patch_size)
    return Eva02DetectorEncoder(
        net, channels=plan.width, stride=plan.patch_size, image_size=image_size, width=plan.width
    )


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From a detector's keys (``backbone.net.``); drops rotary tables and the position of the class token."""
    state = strip_prefix(tensors, marker="patch_embed.proj.weight") or tensors
    state = {
        key: tensor
        for key, tensor in state.items()
        if key.startswith(("patch_embed.", "pos_embed", "blocks.")) and ".rope." not in key
    }
    positions = state.get("pos_embed")
    if positions is not None and positions.shape[1] != encoder.grid**2:
        side = round((positions.shape[1] - 1) ** 0.5)
        if side * side + 1 == positions.shape[1]:
            positions = positions[:, 1:]
        state["pos_embed"] = resample_positions(positions, grid=encoder.grid, num_prefix_tokens=0, method="plain")
    return state


FAMILY = EncoderFamily(build=_build, convert=_convert)

ROWS: dict[str, EncoderRow] = {
    "eva02-l16-det-1024": EncoderRow(
        family="eva02-detector",
        channels=1024,
        stride=16,
        image_size=1024,
        mean=MEAN,
        std=STD,
        parameters=307_381_184,
        pretraining="masked image modelling, then detection, Objects365 and COCO",
        licence="MIT",
        source="hub:Yuxin-CV/EVA-02@main",
        paper="arXiv:2303.11331",
        architecture={
            "patch_size": 16,
            "width": 1024,
            "depth": 24,
            "heads": 16,
            "window": 16,
            "global_blocks": (2, 5, 8, 11, 14, 17, 20, 23),
        },
        small={"width": 48, "depth": 3, "heads": 2, "window": 3},
        files=("eva02/det/eva02_L_coco_det_sys_o365.pth",),
        entry="ema_state",
        features="last block, no norm; no class token",
        image_sizes=(1024,),
        small_image_size=64,
    ),
}
