"""EVA-02-L of EVA-CLIP, with SwiGLU, sub-norms and 2-D rotary positions.

Code: timm (Apache-2.0). Papers: "EVA-02", arXiv:2303.11331, and "EVA-CLIP", arXiv:2303.15389. Weights: BAAI, MIT.
The variant that Eagle ships, trained on detection, is another network: see ``eva02_detector.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from timm.models.eva import Eva
from torch import Tensor

from manyeyes.encoders.clip import MEAN, STD
from manyeyes.encoders.encoder import BlockEncoder, Encoder, EncoderFamily, EncoderRow, TensorMap, check_image_size
from manyeyes.encoders.vit import resample_positions
from manyeyes.encoders.weights import strip_prefix


@dataclass(frozen=True)
class _Architecture:
    """``reference_grid`` is the grid whose rotary positions every other grid is scaled to."""

    patch_size: int
    width: int
    depth: int
    heads: int
    reference_grid: int


class Eva02Encoder(BlockEncoder):
    """EVA-02 without its head; the feature map is its last block after the norm."""

    net: Eva

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.net.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, class token, learned positions; rotary positions join in every block."""
        tokens_BNC, _ = self.net._pos_embed(self.net.patch_embed(pixel_values))
        return self.net.norm_pre(tokens_BNC)  # type: ignore[no-any-return]

    def forward_blocks(self, tokens_BNC: Tensor, *, start: int, stop: int) -> Tensor:
        """Run some of the blocks."""
        rope = self.net.rope.get_embed()
        for block in self.net.blocks[start:stop]:
            tokens_BNC = self.run_part(partial(block, rope=rope), tokens_BNC)
        return tokens_BNC

    def finish(self, tokens_BNC: Tensor) -> Tensor:
        """Norm, and the patches as a map."""
        return self.as_map(self.net.norm(tokens_BNC))


def _build(architecture: Mapping[str, object], image_size: int) -> Eva02Encoder:
    plan = _Architecture(**architecture)  # type: ignore[arg-type]
    check_image_size(image_size, multiple=plan.patch_size)
    net = Eva(
        img_size=image_size,
        patch_size=plan.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=plan.width,
        depth=plan.depth,
        num_heads=plan.heads,
        mlp_ratio=4 * 2 / 3,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(plan.reference_grid, plan.reference_grid),
    )
    return Eva02Encoder(
        net,
        channels=plan.width,
        stride=plan.patch_size,
        image_size=image_size,
        width=plan.width,
        num_prefix_tokens=1,
    )


def _convert(tensors: TensorMap, encoder: Encoder) -> TensorMap:
    """From open_clip's layout (``visual.trunk.``) or timm's; drops the head and rotary tables."""
    state = strip_prefix(tensors, marker="patch_embed.proj.weight") or tensors
    state = {key: tensor for key, tensor in state.items() if not key.startswith(("head.", "rope."))}
    if "pos_embed" in state:
        state["pos_embed"] = resample_positions(
            state["pos_embed"], grid=encoder.grid, num_prefix_tokens=1, method="antialias"
        )
    return state


FAMILY = EncoderFamily(build=_build, convert=_convert)

ROWS: dict[str, EncoderRow] = {
    "eva02-l14-336": EncoderRow(
        family="eva02",
        channels=1024,
        stride=14,
        image_size=336,
        mean=MEAN,
        std=STD,
        parameters=303_645_632,
        pretraining="masked image modelling, then contrastive, Merged-2B",
        licence="MIT",
        # Stated with the sha256 of open_clip_model.safetensors (f753bca0...) in a public report of the weights.
        source="hub:timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k@4f62907359c8506be7021582f360564693b22c15",
        paper="arXiv:2303.11331",
        architecture={"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "reference_grid": 16},
        small={"width": 48, "depth": 2, "heads": 2},
        files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"),
        features="last block and norm; class token seen by the patches, then dropped",
        image_sizes=(336,),
        small_image_size=56,
    ),
}
