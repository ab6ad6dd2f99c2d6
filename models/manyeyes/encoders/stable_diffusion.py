"""Features of Stable Diffusion, which draws images; the last of Cambrian-1's study of 23 encoders (arXiv:2406.16860).

Code: diffusers (Apache-2.0), the extra ``drawing``. Paper: "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv:2112.10752. Weights: Stability AI, CreativeML Open RAIL++-M.

The image becomes a latent (the mode of the autoencoder's distribution, scaled). Noise is added as the diffusion process
has it at timestep 250 of 1,000, and the U-Net runs once on it with an empty prompt. The features are what leaves each
of its four up blocks, resampled (bilinear, corners not aligned) to cells of 16 pixels and joined: 1280 + 1280 + 640 +
320 channels. The text encoder runs once, when published weights are loaded: the empty prompt is always the same, and
what it gives is saved with the network. Layers after the last up block, and the autoencoder's decoder, are not built.

Cambrian-1 draws new noise for every image, so that the same image never gives the same features twice. Here it is one
draw from a seed of its own for all images.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from manyeyes.encoders.encoder import Encoder, EncoderFamily, EncoderRow, TensorMap, check_image_size, resample_bilinear
from manyeyes.encoders.weights import strip_prefix
from manyeyes.errors import SourceError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_LATENT_CHANNELS = 4
_LATENT_SCALE = 0.18215
_STRIDE = 16
_TIMESTEP = 250
# Square root of the variance added at the first and the last of 1,000 steps, and evenly spaced between.
_STEPS, _FIRST_STEP, _LAST_STEP = 1000, math.sqrt(0.00085), math.sqrt(0.012)
_NOISE_SEED = 0
# Beginning, end, and the padding that Stable Diffusion 2 was trained with ("!", not the end again).
_EMPTY_PROMPT = [49406, 49407, *[0] * 75]


@dataclass(frozen=True)
class _Architecture:
    """``heads`` and ``widths`` of the U-Net's levels; ``latent_widths`` of the autoencoder's."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    latent_widths: tuple[int, ...]
    layers: int
    norm_groups: int
    prompt_width: int
    prompt_heads: int

    @property
    def latent_stride(self) -> int:
        """Pixels a side of one cell of the latent."""
        return 1 << (len(self.latent_widths) - 1)


class LatentEncoder(nn.Module):
    """The encoding half of the autoencoder."""

    def __init__(self, plan: _Architecture) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Encoder as AutoencoderHalf

        self.encoder = AutoencoderHalf(
            in_channels=3,
            out_channels=_LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * len(plan.latent_widths),
            block_out_channels=plan.latent_widths,
            layers_per_block=plan.layers,
            norm_num_groups=plan.norm_groups,
            act_fn="silu",
            double_z=True,
        )
        # Mean and log of variance; the mode is the mean.
        self.quant_conv = nn.Conv2d(2 * _LATENT_CHANNELS, 2 * _LATENT_CHANNELS, kernel_size=1)


class DiffusionNet(nn.Module):
    """Autoencoder, U-Net and what the text encoder says of an empty prompt, ``[1, 77, prompt_width]``."""

    prompt: Tensor

    def __init__(self, plan: _Architecture) -> None:
        super().__init__()
        _check_installed()
        self.vae = LatentEncoder(plan)
        self.unet = _build_unet(plan)
        self.prompt_heads = plan.prompt_heads
        self.register_buffer("prompt", torch.randn(1, len(_EMPTY_PROMPT), plan.prompt_width))


class FixedNoise(nn.Module):
    """One draw of noise, the same for every image; not a weight, not saved."""

    noise: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.register_buffer("noise", torch.empty(1, _LATENT_CHANNELS, side, side), persistent=False)
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Draw the noise; needed again after a model was built on the meta device."""
        if not self.noise.is_meta:
            generator = torch.Generator().manual_seed(_NOISE_SEED)
            self.noise.copy_(torch.randn(self.noise.shape, generator=generator))

    def forward(self, latents: Tensor) -> Tensor:
        """What the diffusion process makes of ``latents`` by ``_TIMESTEP``."""
        kept = _share_kept(_TIMESTEP)
        noised: Tensor = math.sqrt(kept) * latents + math.sqrt(1 - kept) * self.noise.to(latents.dtype)
        return noised


class Doubling(nn.Module):
    """Nearest-neighbour upsampling and a convolution, as diffusers has it.

    Its own asks whether there are 64 images or more, which would split an ONNX graph by the size of the batch.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, feature: Tensor, output_size: int | None = None) -> Tensor:  # noqa: ARG002 - always twice
        """``[B, C, h, w]`` to ``[B, C, 2 h, 2 w]``."""
        doubled: Tensor = self.conv(functional.interpolate(feature, scale_factor=2.0, mode="nearest"))
        return doubled


class StableDiffusionEncoder(Encoder):
    """One pass of the U-Net over the noised latent; the feature map is its four up blocks' outputs, joined."""

    net: DiffusionNet

    def __init__(self, net: DiffusionNet, plan: _Architecture, image_size: int) -> None:
        super().__init__(net, channels=sum(plan.widths), stride=_STRIDE, image_size=image_size)
        self.noise = FixedNoise(image_size // plan.latent_stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, channels, grid, grid]``."""
        unet = self.net.unet
        sample = self.noise(self._encode(pixel_values) * _LATENT_SCALE)
        timestep = torch.full((sample.shape[0],), _TIMESTEP, device=sample.device)
        time_BC = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
        prompt_BNC = self.net.prompt.to(sample.dtype).expand(sample.shape[0], -1, -1)
        sample = unet.conv_in(sample)
        skipped = [sample]
        for block in unet.down_blocks:
            sample, passed = self.run_part(_prompted(block, prompt_BNC), sample, time_BC)
            skipped.extend(passed)
        sample = self.run_part(_prompted(unet.mid_block, prompt_BNC), sample, time_BC)
        maps = []
        for block in unet.up_blocks:
            taken, skipped = skipped[-len(block.resnets) :], skipped[: -len(block.resnets)]
            sample = self.run_part(_prompted(block, prompt_BNC), sample, tuple(taken), time_BC)
            maps.append(resample_bilinear(sample, self.grid))
        return torch.cat(maps, dim=1)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        half = self.net.vae.encoder
        feature = half.conv_in(pixel_values)
        for block in half.down_blocks:
            feature = self.run_part(block, feature)
        feature = self.run_part(half.mid_block, feature)
        moments = self.net.vae.quant_conv(half.conv_out(half.conv_act(half.conv_norm_out(feature))))
        return moments[:, :_LATENT_CHANNELS]  # type: ignore[no-any-return]


def _prompted(block: nn.Module, prompt_BNC: Tensor) -> Callable[..., Any]:
    # Levels without attention take no prompt.
    has_attention = getattr(block, "has_cross_attention", False)
    return partial(block, encoder_hidden_states=prompt_BNC) if has_attention else block


def _share_kept(timestep: int) -> float:
    """Share of a latent's variance that is left at a timestep: the product of 1 - beta up to and with it."""
    step = (_LAST_STEP - _FIRST_STEP) / (_STEPS - 1)
    kept: float = math.prod(1 - (_FIRST_STEP + step * index) ** 2 for index in range(timestep + 1))
    return kept


def _check_installed() -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise SourceError(
            'package "diffusers" is not installed',
            "Stable-Diffusion features are made with it",
            "Install it: pip install 'manyeyes[drawing]'",
        )


def _build_unet(plan: _Architecture) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        down_block_types=(*("CrossAttnDownBlock2D",) * (len(plan.widths) - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(plan.widths) - 1)),
        block_out_channels=plan.widths,
        layers_per_block=plan.layers,
        norm_num_groups=plan.norm_groups,
        cross_attention_dim=plan.prompt_width,
        # The published configuration gives the number of heads under this name.
        attention_head_dim=plan.heads,
        use_linear_projection=True,
    )
    unet.conv_norm_out, unet.conv_act, unet.conv_out = nn.Identity(), nn.Identity(), nn.Identity()
    for block in unet.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers[0] = Doubling(block.upsamplers[0].conv)
    return unet


def _build(architecture: Mapping[str, object], image_size: int) -> StableDiffusionEncoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=plan.latent_stride << (len(plan.widths) - 1))
    return StableDiffusionEncoder(DiffusionNet(plan), plan, image_size)


# The autoencoder of Stable Diffusion 2.1 was saved with diffusers' old names of attention.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(vae\.encoder\..*attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.")
_KEPT = ("vae.encoder.", "vae.quant_conv.", "unet.")
_LEFT_OUT = ("unet.conv_norm_out.", "unet.conv_out.")


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From diffusers' folders (``unet.``, ``vae.``, ``text_encoder.``); runs the text encoder on an empty prompt."""
    if "prompt" in tensors:
        return tensors
    state = {
        _OLD_ATTENTION.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.", key): tensor
        for key, tensor in tensors.items()
        if key.startswith(_KEPT) and not key.startswith(_LEFT_OUT)
    }
    text = strip_prefix(
        {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder.")},
        marker="embeddings.token_embedding.weight",
    )
    if text is not None:
        state["prompt"] = _read_empty_prompt(text, heads=encoder.net.prompt_heads)  # type: ignore[arg-type]
    return state


@torch.no_grad()
def _read_empty_prompt(text: TensorMap, *, heads: int) -> Tensor:
    """Run the text encoder on an empty prompt: ``[1, 77, prompt_width]``."""
    vocabulary, width = text["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=text["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len([key for key in text if key.endswith(".mlp.fc1.weight")]),
        num_attention_heads=heads,
        max_position_embeddings=len(_EMPTY_PROMPT),
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    prefix = next(key for key in model.state_dict() if key.endswith("token_embedding.weight"))
    prefix = prefix.removesuffix("embeddings.token_embedding.weight")
    own = {prefix + key: tensor.float() for key, tensor in text.items() if not key.endswith("position_ids")}
    model.load_state_dict(own, assign=True)
    # The table of positions is not saved, and the meta device leaves it empty.
    positions = torch.arange(len(_EMPTY_PROMPT))[None]
    prompt: Tensor = model.eval()(torch.tensor([_EMPTY_PROMPT]), position_ids=positions).last_hidden_state
    return prompt


FAMILY = EncoderFamily(build=_build, convert=_convert)

ROWS: dict[str, EncoderRow] = {
    "stable-diffusion-v21-512": EncoderRow(
        family="stable-diffusion",
        channels=3520,
        stride=_STRIDE,
        image_size=512,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        parameters=900_062_224,
        pretraining="text to image by latent diffusion, LAION-5B",
        licence="CreativeML Open RAIL++-M",
        # The snapshot that public code refers to most; the publisher has withdrawn repositories before.
        source="hub:stabilityai/stable-diffusion-2-1@5cae40e6a2745ae2b01ad92ae5043f95f23644d6",
        paper="arXiv:2112.10752",
        architecture={
            "widths": (320, 640, 1280, 1280),
            "heads": (5, 10, 20, 20),
            "latent_widths": (128, 256, 512, 512),
            "layers": 2,
            "norm_groups": 32,
            "prompt_width": 1024,
            "prompt_heads": 16,
        },
        small={
            "widths": (8, 16),
            "heads": (2, 2),
            "latent_widths": (4, 8, 8),
            "layers": 1,
            "norm_groups": 4,
            "prompt_width": 16,
            "prompt_heads": 2,
        },
        parts={
            "unet.": "unet/diffusion_pytorch_model.safetensors",
            "vae.": "vae/diffusion_pytorch_model.safetensors",
            "text_encoder.": "text_encoder/model.safetensors",
        },
        features="the U-Net's four up blocks at timestep 250 of 1,000, empty prompt, noise from a fixed seed",
        image_sizes=(512,),
        small_image_size=64,
    ),
}
