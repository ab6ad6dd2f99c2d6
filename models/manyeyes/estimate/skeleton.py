"""A recipe's model on the meta device: its parameters, and what each stage keeps and computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.encoders.weights import meta_device
from manyeyes.estimate import GraphFacts, ParameterCounts, RecipeEstimate, RecipeFacts, needs
from manyeyes.estimate.dry_run import ImageShape, count_forward, count_sample, image_shape
from manyeyes.estimate.memory import StageFacts
from manyeyes.model import ManyEyesForConditionalGeneration, build_skeleton
from manyeyes.model.language_model import decoder_layers, language_model_config
from manyeyes.recipe import Recipe, StageName, StageSpec
from manyeyes.runtime.bundle_contents import GraphName, ModelFacts
from manyeyes.training.adapters import adapters_alone, add_adapters, merge_adapters
from manyeyes.training.encoder_parts import encoder_parts
from manyeyes.training.optimizer import ParameterGroups, freeze_others, learning_rates, split_groups
from manyeyes.training.sharding import matrices

# A question and its answer beside the image, as FLOPs of a sample count them: conversations of LLaVA's instruction data
# have some hundred tokens, captions some dozens. Ours, not published.
TEXT_TOKENS, SUPERVISED_TOKENS = 128, 64


def estimate(recipe: Recipe, *, snapshot_path: Path | None = None) -> RecipeEstimate:
    """Work out what a recipe needs, offline; arguments and errors as ``count_facts``."""
    return needs(recipe, count_facts(recipe, snapshot_path=snapshot_path))


def count_facts(recipe: Recipe, *, snapshot_path: Path | None = None) -> RecipeFacts:
    """Count what a recipe's needs follow from, offline.

    Args:
        recipe: The recipe.
        snapshot_path: Folder of the data snapshot, where the language model's source is ``snapshot:``; a folder with
            that model's ``config.json`` alone is enough.

    Raises:
        RecipeError: The recipe names something that there is not, or parts that cannot be combined.
        ShapeError: Parts do not fit together.
        SourceError: The language model's ``config.json`` cannot be had.
    """
    text_config = language_model_config(recipe.model.language_model.source, snapshot_path=snapshot_path)
    return _count_recipe(recipe, build_skeleton(recipe.model, text_config=text_config), text_config)


def count_both(recipe: Recipe, *, snapshot_path: Path | None = None) -> tuple[RecipeFacts, ModelFacts]:
    """What ``count_facts`` says of a recipe, and ``count_checkpoint`` of its checkpoint, from one skeleton.

    Arguments and errors as ``count_facts``.
    """
    text_config = language_model_config(recipe.model.language_model.source, snapshot_path=snapshot_path)
    model = build_skeleton(recipe.model, text_config=text_config)
    facts = _model_facts(model.eval())
    return _count_recipe(recipe, model, text_config), facts


def _count_recipe(
    recipe: Recipe, model: ManyEyesForConditionalGeneration, text_config: PreTrainedConfig
) -> RecipeFacts:
    shape = image_shape(model)
    stages = {}
    for name, spec in recipe.present_stages():
        own = model if not spec.model else build_skeleton(recipe.stage_model(name), text_config=text_config)
        stages[name] = tuple(_stage(recipe, name, spec, own, shape if own is model else image_shape(own), text_config))
    return RecipeFacts(
        parameters=count_parameters(model),
        visual_tokens=shape.tokens,
        channels=model.fusion.channels,
        text_tokens=_text_tokens(recipe.model.language_model.max_length, shape.tokens),
        stages=stages,
        graphs=count_graphs(model),
    )


def count_graphs(model: ManyEyesForConditionalGeneration) -> dict[GraphName, GraphFacts]:
    """Numbers in each graph of a model's bundle; a table that is the head too stands in two of them."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    of_decoder = [part for part in (model.language_model, model.reinjection) if part is not None]
    inside = {parameter for part in of_decoder for parameter in part.parameters()}
    products = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    decoder = sum(parameter.numel() for parameter in inside)
    rows = sum(parameter.numel() for parameter in table.parameters())
    if table.weight is not head.weight:
        decoder -= rows
    return {
        "vision": GraphFacts(
            parameters=sum(parameter.numel() for parameter in model.parameters() if parameter not in inside),
            matrices=sum(weight.numel() for weight in products if weight not in inside),
        ),
        "embed": GraphFacts(parameters=rows, matrices=rows),
        "decoder": GraphFacts(parameters=decoder, matrices=sum(w.numel() for w in products if w in inside)),
    }


def _stage(
    recipe: Recipe,
    name: StageName,
    spec: StageSpec,
    model: ManyEyesForConditionalGeneration,
    shape: ImageShape,
    text_config: PreTrainedConfig,
) -> list[StageFacts]:
    max_length = recipe.stage_model(name).language_model.max_length
    if name != "prealign":
        return [_count_stage(spec, model, shape, max_length, encoder=None)]
    found = []
    for encoder in recipe.prealigned_encoders():
        alone = build_skeleton(recipe.stage_model(name), text_config=text_config, encoders=[encoder])
        found.append(_count_stage(spec, alone, image_shape(alone), max_length, encoder=encoder))
    return found


def _count_stage(
    spec: StageSpec, model: ManyEyesForConditionalGeneration, shape: ImageShape, max_length: int, *, encoder: str | None
) -> StageFacts:
    layers = decoder_layers(model.language_model)
    linear = [module for module in layers.modules() if type(module) is nn.Linear]
    linear_widths = sum(module.in_features + module.out_features for module in linear)
    linear_parameters = sum(module.weight.numel() for module in linear)
    each = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    config = model.language_model.config.get_text_config()
    groups: ParameterGroups = model.parameter_groups()
    if spec.lora is not None:
        add_adapters(model.requires_grad_(False), spec.lora, seed=0)
        groups = adapters_alone(model.parameter_groups())
    groups = split_groups(groups, spec.train)
    rates = learning_rates(spec.train, groups)
    trained = freeze_others(groups, rates)
    model.train()
    for group in groups:
        if group not in rates:
            model.get_submodule(group).eval()
    blocks = [sum(own.numel() for own in part.parameters()) for part in encoder_parts(model)]
    # Many processes compute in it; one alone runs under autocast, see manyeyes.estimate.memory.
    model.to(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    longest = max(max_length - shape.tokens, 1)
    text = _text_tokens(max_length, shape.tokens)
    counts = count_sample(
        model,
        shape,
        text_tokens=text,
        longest_text=longest,
        supervised=SUPERVISED_TOKENS,
        checkpoint_encoders=spec.checkpoint_encoders,
    )
    # Where a layer is computed again, its input is kept, and what its attention gave: a vector and a logarithm a head.
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(table, torch.Tensor)
    assert isinstance(head, torch.Tensor)
    width = table.element_size()
    heads, in_head = config.num_attention_heads, getattr(config, "head_dim", None)
    of_heads = heads * (in_head or config.hidden_size // heads) * width + 4 * heads
    places = len(layers) * (shape.tokens + longest)
    facts = StageFacts(
        encoder=encoder,
        parameters=_by_part((name, parameter) for name, parameter in model.named_parameters()),
        trained=_by_part(trained.items()),
        matrices=_by_part(matrices(model)),
        frozen_matrices=_by_part(pair for pair in matrices(model) if not pair[1].requires_grad),
        layers=len(layers),
        layers_parameters=sum(each),
        layer_parameters=max(each),
        blocks_parameters=sum(blocks),
        block_parameters=max(blocks, default=0),
        linear_widths=linear_widths,
        linear_parameters=linear_parameters,
        vocabulary=head.shape[0],
        image_bytes=counts.image_bytes,
        layers_bytes=counts.layers_bytes,
        layer_bytes=counts.layer_bytes,
        inputs_bytes=places * table.shape[1] * width,
        attention_bytes=places * of_heads,
        other_bytes=counts.other_bytes,
        tokens=shape.tokens + longest,
        text_tokens=longest,
        flops=counts.flops,
    )
    model.to(torch.float32)
    merge_adapters(model)
    return facts


def _by_part(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    homes = {"reinjection": "fusion", "newline": "projector"}
    counts = dict.fromkeys(("encoders", "fusion", "projector", "language_model"), 0)
    for name, parameter in parameters:
        first = name.partition(".")[0]
        counts[homes.get(first, first)] += parameter.numel()
    return counts


def _text_tokens(max_length: int, visual_tokens: int) -> int:
    return max(1, min(TEXT_TOKENS, max_length - visual_tokens))


def count_parameters(model: ManyEyesForConditionalGeneration) -> ParameterCounts:
    """The parameters of a model's parts, each once; on the meta device as well as elsewhere."""
    groups = {
        group: sum(parameter.numel() for _, parameter in members) for group, members in model.parameter_groups().items()
    }
    reinjection = 0 if model.reinjection is None else sum(p.numel() for p in model.reinjection.parameters())
    return ParameterCounts(
        encoders={name: groups[f"encoders.{name}"] for name in model.encoders},
        fusion=groups["fusion"] - reinjection,
        projector=groups["projector"],
        language_model=groups["language_model"],
        reinjection=reinjection,
        total=sum(groups.values()),
    )


def count_model(config: PreTrainedConfig) -> ModelFacts:
    """What a model is in figures, by its configuration: counting needs no weights.

    Args:
        config: Of a ``ManyEyesForConditionalGeneration``; left as it is.
    """
    with meta_device():
        model = ManyEyesForConditionalGeneration(copy.deepcopy(config)).eval()
    return _model_facts(model)


def _model_facts(model: ManyEyesForConditionalGeneration) -> ModelFacts:
    counts = count_parameters(model)
    shape = image_shape(model)
    parts = {f"encoders.{name}": count for name, count in counts.encoders.items()} | {
        "fusion": counts.fusion,
        "projector": counts.projector,
        "language_model": counts.language_model,
        "reinjection": counts.reinjection,
    }
    return ModelFacts(
        parameters=counts.total,
        parts={name: count for name, count in parts.items() if count},
        encoders=list(counts.encoders),
        visual_tokens=shape.tokens,
        flops_per_sample=count_forward(model, shape, text_tokens=TEXT_TOKENS),
        text_tokens=TEXT_TOKENS,
    )


def count_checkpoint(checkpoint: Path) -> ModelFacts:
    """Count the model of a checkpoint's folder; its weights are not read."""
    return count_model(AutoConfig.from_pretrained(checkpoint))
