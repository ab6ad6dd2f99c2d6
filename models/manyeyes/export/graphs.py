"""The three graphs of a bundle, traced by torch's exporter.

Tracing makes an axis static when a sample has 0 or 1 there, and folds a mask of ones away; so every dynamic axis is 2
or more in the samples, sizes differ where axes are independent, and the sample mask has zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from manyeyes.errors import BundleError, ShapeError
from manyeyes.export.manifest import GraphSignature, GraphTensor
from manyeyes.model import ManyEyesForConditionalGeneration

_ROWS, _QUERY, _PAST = 2, 3, 5

KeyValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of a language model.

    Attributes:
        heads: Key-value heads of each layer.
        widths: Width of a head, of each layer's keys and values.
    """

    heads: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]


class _Vision(nn.Module):
    def __init__(self, model: ManyEyesForConditionalGeneration, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, pixels: list[Tensor]) -> Tensor:
        tokens = self.model.encode_images(dict(zip(self.names, pixels, strict=True)))
        assert isinstance(tokens, Tensor)  # check_exportable has seen to it
        return tokens


class _Embed(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embedding(input_ids)
        return embeddings


class _Decoder(nn.Module):
    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_positions: Tensor,
        past: KeyValues,
    ) -> tuple[Tensor, KeyValues]:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_positions,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def check_exportable(
    model: ManyEyesForConditionalGeneration, image_sizes: Mapping[str, int], *, num_image_tokens: int
) -> None:
    """Refuse a model of which a bundle would leave something out.

    Args:
        model: In evaluation mode, fp32, on the CPU.
        image_sizes: Side of each encoder's input in pixels.
        num_image_tokens: Visual tokens an image, as the processor counts them.

    Raises:
        BundleError: The model cuts images into tiles, looks at them again from inside the language model, or needs
            to know where padding is.
    """
    if model.config.to_dict().get("layout") is not None:
        raise _not_exportable("model.layout", "one tile an image")
    with torch.no_grad():
        try:
            tokens = model.encode_images({name: torch.zeros(1, 3, size, size) for name, size in image_sizes.items()})
        except ShapeError as error:
            raise _not_exportable(error.needed, "pixels and nothing else") from error
    if not isinstance(tokens, Tensor):
        raise _not_exportable("model.reinjection", "visual tokens and nothing else")
    if tokens.shape[1] != num_image_tokens:
        raise _not_exportable(f"{tokens.shape[1]} visual tokens an image", f"{num_image_tokens}, as its processor says")


def _not_exportable(found: str, needed: str) -> BundleError:
    return BundleError(f"this model has {found}", f"a bundle of this format holds {needed}", "Evaluate it in torch.")


def export_vision(
    model: ManyEyesForConditionalGeneration, image_sizes: Mapping[str, int], out: Path, *, opset: int
) -> GraphSignature:
    """Write encoders, fusion and projector as one graph.

    Args:
        model: In evaluation mode, fp32, on the CPU.
        image_sizes: Side of each encoder's input in pixels.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.

    Returns:
        One input ``[tiles, 3, size, size]`` per encoder, named by it; output ``visual_tokens``, ``[images, N, D]``.

    Raises:
        BundleError: The graph lacks an input.
    """
    images = Dim("images")
    pixels = [torch.zeros(_ROWS, 3, size, size) for size in image_sizes.values()]
    return _export(
        _Vision(model, list(image_sizes)),
        (pixels,),
        ([{0: images} for _ in pixels],),
        out,
        opset=opset,
        input_names=list(image_sizes),
        output_names=["visual_tokens"],
    )


def export_embed(language_model: PreTrainedModel, out: Path, *, opset: int) -> GraphSignature:
    """Write the embedding table.

    Args:
        language_model: In evaluation mode, fp32, on the CPU.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.

    Returns:
        Input ``input_ids`` ``[batch, query]``, int64; output ``inputs_embeds`` ``[batch, query, D]``.

    Raises:
        BundleError: The graph lacks an input.
    """
    return _export(
        _Embed(language_model.get_input_embeddings()),
        (torch.zeros(_ROWS, _QUERY, dtype=torch.long),),
        ({0: Dim("batch"), 1: Dim("query")},),
        out,
        opset=opset,
        input_names=["input_ids"],
        output_names=["inputs_embeds"],
    )


def export_decoder(language_model: PreTrainedModel, out: Path, *, opset: int) -> GraphSignature:
    """Write the language model as one graph for prefixes, questions and single tokens.

    Attention is traced as plain products with an additive, finite mask: a row of the mask without a single one (all
    padding) then gives a finite result that nothing looks at, and not NaN.

    Args:
        language_model: In evaluation mode, fp32, on the CPU. Its attention implementation is set to ``eager``.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.

    Returns:
        Inputs ``inputs_embeds`` ``[batch, query, D]``, ``attention_mask`` ``[batch, total]`` (past + query),
        ``position_ids`` ``[batch, query]``, ``logits_positions`` ``[kept]`` (places in the query whose logits are
        wanted; may be empty) and ``past_key_values.<layer>.key`` and ``.value`` ``[batch, heads, past, width]``;
        outputs ``logits`` ``[batch, kept, V]`` and ``present.<layer>.key`` and ``.value``. Past may be 0.

    Raises:
        BundleError: The graph lacks an input.
    """
    language_model.set_attn_implementation("eager")
    shape = read_cache_shape(language_model)
    width = language_model.get_input_embeddings().weight.shape[1]
    attention_mask = torch.ones(_ROWS, _PAST + _QUERY, dtype=torch.long)
    attention_mask[0, :2] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -_QUERY:]
    past = [
        (torch.zeros(_ROWS, heads, _PAST, key_width), torch.zeros(_ROWS, heads, _PAST, value_width))
        for heads, (key_width, value_width) in zip(shape.heads, shape.widths, strict=True)
    ]
    batch, query, length, total, kept = Dim("batch"), Dim("query"), Dim("past"), Dim("total"), Dim("kept")
    layers = [f"{layer}.{kind}" for layer in range(len(past)) for kind in ("key", "value")]
    return _export(
        _Decoder(language_model),
        (torch.zeros(_ROWS, _QUERY, width), attention_mask, position_ids, torch.tensor([0, 2]), past),
        (
            {0: batch, 1: query},
            {0: batch, 1: total},
            {0: batch, 1: query},
            {0: kept},
            [({0: batch, 2: length}, {0: batch, 2: length}) for _ in past],
        ),
        out,
        opset=opset,
        input_names=[
            "inputs_embeds",
            "attention_mask",
            "position_ids",
            "logits_positions",
            *(f"past_key_values.{layer}" for layer in layers),
        ],
        output_names=["logits", *(f"present.{layer}" for layer in layers)],
    )


def read_cache_shape(language_model: PreTrainedModel) -> CacheShape:
    """Run two tokens to see what the language model keeps of them.

    Args:
        language_model: On the CPU.
    """
    width = language_model.get_input_embeddings().weight.shape[1]
    with torch.no_grad():
        output = language_model(inputs_embeds=torch.zeros(1, 2, width), past_key_values=DynamicCache(), use_cache=True)
    layers = output.past_key_values.layers
    return CacheShape(
        heads=tuple(layer.keys.shape[1] for layer in layers),
        widths=tuple((layer.keys.shape[3], layer.values.shape[3]) for layer in layers),
    )


def _export(
    module: nn.Module,
    samples: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    out: Path,
    *,
    opset: int,
    input_names: list[str],
    output_names: list[str],
) -> GraphSignature:
    with warnings.catch_warnings(), torch.no_grad():
        # torch 2.14 says so once for every further axis that has the same name; sharing names is the point.
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used", category=UserWarning)
        program = torch.onnx.export(
            module.eval(),
            samples,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    assert program is not None  # only a given file name makes it None
    model = program.model
    found = [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]
    if found != (input_names, output_names):
        raise BundleError(
            f"{out.name} has the inputs and outputs {found}",
            f"{(input_names, output_names)} are needed",
            "The exporter dropped one; report the model.",
        )
    _strip_traces(model)
    program.save(str(out))
    return GraphSignature(
        inputs=[_describe(value) for value in model.graph.inputs],
        outputs=[_describe(value) for value in model.graph.outputs],
    )


def _strip_traces(model: onnx_ir.Model) -> None:
    # Stack traces name files of this machine, and would make two exports of one checkpoint differ.
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


def _describe(value: onnx_ir.Value) -> GraphTensor:
    if value.name is None or value.dtype is None or value.shape is None:
        raise BundleError(f"graph value {value.name} has no type", "a typed value is needed", "Report the model.")
    return GraphTensor(
        name=value.name,
        dtype=str(value.dtype.numpy()),
        shape=[size if isinstance(size, int) else str(size) for size in value.shape],
    )
