"""Published checkpoints at their true sizes, by names and shapes alone: no tensor is made, nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from manyeyes.converters.convert import config_of_plan
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.system import EncoderSources, Plan, System
from manyeyes.converters.tables import Resolution
from manyeyes.converters.tensor_files import StoredTensor
from manyeyes.model import ManyEyesForConditionalGeneration

Shapes = dict[str, tuple[int, ...]]
VICUNA_7B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def shapes_under(prefix: str, module: nn.Module) -> Shapes:
    """What a network on the meta device would store."""
    return {prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """Stock keys of a Llama."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}self_attn.{letter}_proj.weight": (width, width) for letter in "qkvo"}
        shapes |= {f"{own}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{own}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{own}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def resolve(
    system: System, config: Mapping[str, Any], stored: Shapes, folder: Path, *, encoders: str | None = None
) -> tuple[Plan, Resolution]:
    """Plan a checkpoint and account for every key of it and of our model.

    Args:
        system: Whose layout it is.
        config: Its ``config.json``.
        stored: Shapes of its tensors.
        folder: The checkpoint's; no file of it is read.
        encoders: As ``--encoders``.
    """
    tensors = {key: StoredTensor(folder / "absent", key, shape, torch.float16) for key, shape in stored.items()}
    assert system.recognises(config)
    plan = system.plan(OriginalCheckpoint(folder, dict(config), tensors), EncoderSources(encoders, {}, folder))
    ours = config_of_plan(plan, image_token_id=0)
    with torch.device("meta"):
        model = ManyEyesForConditionalGeneration(ours)
    brought = tuple(f"encoders.{entry.name}." for entry in plan.encoders if entry.weights is not None)
    wanted = {key: tuple(own.shape) for key, own in model.state_dict().items() if not key.startswith(brought)}
    return plan, plan.keys.resolve(wanted, stored, name="checkpoint")


def cambrian_connector() -> Shapes:
    """Names and shapes of ``nyu-visionx/cambrian-8b`` beside its language model."""
    shapes: Shapes = {"model.vision_query": (1, 1024), "model.image_newline": (4096,)}
    shapes |= {"model.mm_projector.0.weight": (4096, 1024), "model.mm_projector.0.bias": (4096,)}
    shapes |= {"model.mm_projector.2.weight": (4096, 4096), "model.mm_projector.2.bias": (4096,)}
    for place, channels in enumerate((1152, 1024, 1536, 5760)):
        own = f"model.mm_projector_aux_{place}."
        shapes |= {own + "0.weight": (1024, channels), own + "2.weight": (1024, 1024), own + "3.weight": (1024,)}
        shapes |= {f"{own}{layer}.bias": (1024,) for layer in (0, 2, 3)}
    blocks = [(f"model.vision_sampler_0.layers.{layer}.", 1024) for layer in range(3)]
    blocks += [(f"model.vision_sampler_layers.{place}.layers.0.", 4096) for place in range(10)]
    for own, query in blocks:
        shapes |= {own + "proj_context.weight": (1024, 1024), own + "proj_in.weight": (1024, query + 1024)}
        shapes |= {own + "proj_out.linear_1.weight": (1024, 1024), own + "proj_out.linear_2.weight": (query, 1024)}
        shapes |= {own + "norm.weight": (1024,), own + "norm.bias": (1024,), own + "pos_embed_3": (16, 1024)}
        shapes[own + "cross_attn.o_proj.weight"] = (1024, 1024)
        for name in ("q_proj", *(f"{letter}_proj_{place}" for letter in "kv" for place in range(4))):
            shapes |= {f"{own}cross_attn.{name}.0.{kind}": (1024,) for kind in ("weight", "bias")}
            shapes[f"{own}cross_attn.{name}.1.weight"] = (1024, 1024)
    return shapes


def clip_l14_336() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config)


def cambrian_towers() -> dict[str, Shapes]:
    """Names and shapes of its encoders, each as its publisher stores it."""
    with torch.device("meta"):
        siglip = VisionTransformer(
            img_size=384,
            patch_size=14,
            embed_dim=1152,
            depth=27,
            num_heads=16,
            mlp_ratio=3.7362,
            class_token=False,
            global_pool="map",
            num_classes=0,
        )
        clip = clip_l14_336()
        dinov2 = Dinov2Model(
            Dinov2Config(
                hidden_size=1536,
                num_hidden_layers=40,
                num_attention_heads=24,
                image_size=518,
                patch_size=14,
                use_swiglu_ffn=True,
            )
        )
        trunk = ConvNeXt(depths=(3, 4, 30, 3), dims=(384, 768, 1536, 3072), num_classes=1024)
    return {
        "siglip": shapes_under("visual.trunk.", siglip),
        "clip": shapes_under("vision_model.", clip),
        "dinov2": shapes_under("", dinov2),
        "convnext": shapes_under("visual.trunk.", trunk),
    }
