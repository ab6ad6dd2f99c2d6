"""The three graphs of a bundle.

Each is traced with torch's exporter and written as one ONNX file. Tracing makes an axis static when a sample has 0 or
1 there, and folds a mask of ones away; so every dynamic axis is 2 or more in the samples, sizes differ where axes are
independent, and a sample mask has zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from manyeyes.errors import BundleError
from manyeyes.export.attention import use_grouped_attention
from manyeyes.export.cache import TRANSLATIONS, read_past
from manyeyes.export.fused import fuse
from manyeyes.fusion.cross_attention import VisionSampler, VisualWindows
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor
from manyeyes.model.connection import VisualTokens
from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.reinjection import VISUAL_CONTEXT, Reinjection, VisualContext, check_read
from manyeyes.runtime.bundle_contents import GraphSignature, GraphTensor
from manyeyes.runtime.decoding import CACHE_PROPERTY, KEPT, TAKES_BUFFER
from manyeyes.runtime.tiling import NEWLINE
from manyeyes.runtime.vision import IMAGE_SIZES, LAYOUT, PIXELS, PLACES, TOKENS, WINDOWS

MOST_BYTES = 2**31 - 2**26
"""Of weights in one file: a protobuf file ends at 2 GiB, and so does what some stores take."""


def export_graph(
    module: nn.Module,
    samples: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    out: Path,
    *,
    opset: int,
    input_names: list[str],
    output_names: list[str],
) -> GraphSignature:
    """Trace a module and write the graph.

    Args:
        module: In evaluation mode, on the CPU.
        samples: Arguments of its ``forward``.
        dynamic_shapes: As ``torch.export`` wants them: per argument the axes that may differ from the sample's.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.
        input_names: Names of the tensors in ``samples``, in order.
        output_names: Names of the tensors that come out, in order.

    Raises:
        BundleError: The graph lacks an input or an output.
    """
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
            custom_translation_table=TRANSLATIONS,
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
    if all(weight.dtype == torch.float32 for weight in module.parameters()):
        fuse(model)
    _strip_traces(model)
    if _POSITIONS in input_names:
        _keep_last(model)
        model.metadata_props[CACHE_PROPERTY] = TAKES_BUFFER
    save_graph(model, out)
    return describe_graph(model)


def save_graph(
    model: onnx_ir.Model, out: Path, *, most_bytes: int = MOST_BYTES, most_inside: int | None = None
) -> None:
    """Write a graph; what is larger than one file may be has its weights in files beside it.

    These are ``<out>_data``, ``<out>_data_1`` and so on, as transformers.js looks for them. ONNX Runtime maps them into
    memory. A tensor is never cut: one that is larger than ``most_bytes`` is a file of its own.

    Args:
        model: Its weights may lie in files; they are copied one by one.
        out: The ``.onnx`` file to write.
        most_bytes: Of a file.
        most_inside: Of a graph whose weights lie in its own file; by default ``most_bytes``.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= (most_bytes if most_inside is None else most_inside):
        onnx_ir.save(model, out)
        return
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if type(tensor) is onnx_ir.Tensor and not tensor.numpy().flags.c_contiguous:
            # A weight that was turned while folding: numpy would write it number by number.
            value.const_value = onnx_ir.LazyTensor(
                partial(_copy, tensor), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
            )
    with TemporaryDirectory(dir=out.parent) as name:
        onnx_ir.save(model, Path(name) / out.name, external_data="weights", max_shard_size_bytes=most_bytes)
        shards = sorted(file.name for file in Path(name).iterdir() if file.name != out.name)
        called = {shard: f"{out.name}_data{f'_{place}' if place else ''}" for place, shard in enumerate(shards)}
        proto = onnx.load(Path(name) / out.name, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = called[entry.value]
        for shard, given in called.items():
            (Path(name) / shard).replace(out.with_name(given))
        onnx.save(proto, out)


def _copy(tensor: onnx_ir.Tensor) -> onnx_ir.Tensor:
    return onnx_ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def describe_graph(model: onnx_ir.Model) -> GraphSignature:
    """What a graph takes and gives.

    Raises:
        BundleError: An input or output has no type.
    """
    return GraphSignature(
        inputs=[_describe(value) for value in model.graph.inputs],
        outputs=[_describe(value) for value in model.graph.outputs],
    )


def _strip_traces(model: onnx_ir.Model) -> None:
    """Take out what differs between two exports of one checkpoint: names of this machine's files."""
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


def _keep_last(model: onnx_ir.Model) -> None:
    """Let the decoder take how many of the last positions' logits are wanted (0: all), and not which positions.

    A number of positions that a tensor holds is a size that ``torch.export`` does not know; in ONNX it is a range.
    """
    graph = model.graph
    place, positions = next((place, value) for place, value in enumerate(graph.inputs) if value.name == _POSITIONS)
    embeddings = next(value for value in graph.inputs if value.name == "inputs_embeds")
    kept = onnx_ir.Value(name=KEPT, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
    nodes: list[onnx_ir.Node] = []

    def op(op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(op_type, inputs, attributes=attributes))
        return nodes[-1].outputs[0]

    zero, one = (op("Constant", value_int=number) for number in (0, 1))
    length = op("Gather", op("Shape", embeddings), one, axis=0)
    wanted = op("Where", op("Equal", kept, zero), length, op("Min", kept, length))
    chosen = op("Range", op("Sub", length, wanted), length, one)
    chosen.type, chosen.shape = positions.type, positions.shape
    positions.replace_all_uses_with(chosen)
    graph.inputs[place] = kept
    graph.insert_before(graph[0], nodes)


def _describe(value: onnx_ir.Value) -> GraphTensor:
    if value.name is None or value.dtype is None or value.shape is None:
        raise BundleError(f"graph value {value.name} has no type", "a typed value is needed", "Report the model.")
    return GraphTensor(
        name=value.name,
        dtype=str(value.dtype.numpy()),
        shape=[size if isinstance(size, int) else str(size) for size in value.shape],
    )


# Sizes of the samples' axes; see ``manyeyes.export.graphs``.
_ROWS, _QUERY, _PAST, _TILES, _LAID_OUT, _SIDE = 2, 3, 5, 7, 11, 32
_LOOKS = (0, 2, 3, 5)
_POSITIONS = "logits_positions"

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
    def __init__(self, model: ManyEyesForConditionalGeneration, names: Sequence[str], of_images: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.of_images = tuple(of_images)

    def forward(self, pixels: list[Tensor], of_images: Sequence[Tensor] = ()) -> Tensor | tuple[Tensor, ...]:
        tokens = self.model.encode_images(
            dict(zip(self.names, [each.to(self.model.dtype) for each in pixels], strict=True)),
            features=None,
            **dict(zip(self.of_images, of_images, strict=True)),
        )
        if not isinstance(tokens, VisualTokens):
            return tokens.float()
        windows = tokens.windows
        return tokens.tokens.float(), windows.keys.float(), windows.mask, windows.overall.float()


class _Embed(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embedding(input_ids)
        return embeddings.float()


class _Decoder(nn.Module):
    def __init__(self, language_model: PreTrainedModel, reinjection: Reinjection | None) -> None:
        super().__init__()
        self.language_model = language_model
        self.reinjection = reinjection

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_positions: Tensor,
        past: KeyValues,
        looks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, KeyValues]:
        dtype = self.language_model.dtype
        cache = read_past(past, attention_mask, inputs_embeds)
        context, keywords = None, {}
        if self.reinjection is not None:
            places, keys, mask, overall = looks
            keys, overall = keys.to(dtype), overall.to(dtype)
            context = VisualContext(places, VisualWindows(keys=keys, mask=mask, overall=overall))
            keywords[VISUAL_CONTEXT] = context
        output = decoder_of(self.language_model)(
            inputs_embeds=inputs_embeds.to(dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **keywords,
        )
        check_read(context, self.reinjection, self.language_model)
        logits = compute_logits(self.language_model, output.last_hidden_state[:, logits_positions])
        return logits.float(), [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def check_exportable(model: ManyEyesForConditionalGeneration, processor: ManyEyesProcessor) -> None:
    """Refuse a model whose bundle would not run.

    Args:
        model: In evaluation mode, fp32, on the CPU.
        processor: The model's.

    Raises:
        BundleError: The processor counts other visual tokens than the model makes, or an encoder has the name of
            another input of the vision graph.
    """
    for name in (LAYOUT, IMAGE_SIZES):
        if name in model.encoders:
            raise BundleError(
                f'an encoder is called "{name}"', "the vision graph has an input of that name", "Rename the encoder."
            )
    square = np.zeros((_SIDE, _SIDE, 3), np.uint8)
    sizes = torch.tensor([[_SIDE, _SIDE]]) if model.fusion.uses_image_sizes else None
    with torch.no_grad():
        tokens = model.encode_images(processor.pixel_values([square]), image_sizes=sizes)
    if isinstance(tokens, VisualTokens):
        tokens = tokens.tokens
    if tokens.shape[1] != processor.num_image_tokens:
        raise BundleError(
            f"this model has {tokens.shape[1]} visual tokens a tile",
            f"its processor counts {processor.num_image_tokens}",
            "Write the checkpoint again with the processor that belongs to it.",
        )


def own_structure(model: ManyEyesForConditionalGeneration) -> list[str]:
    """What of a model's structure other runtimes do not know; empty for one encoder, a projector and a language model.

    Args:
        model: Of any structure.
    """
    layout = model.config.layout
    found = {
        f"{len(model.encoders)} encoders": len(model.encoders) > 1,
        "pixels that the graph resizes (preprocess: shared)": model.shared_pixels is not None,
        "tiles, or an order of visual tokens (layout)": layout is not None,
        "a fusion that masks padding": model.fusion.uses_image_sizes,
        "a language model that looks back at the image (reinjection)": model.reinjection is not None,
    }
    return [what for what, is_there in found.items() if is_there]


def name_pixels(model: ManyEyesForConditionalGeneration, names: Iterable[str]) -> list[str]:
    """Names of the vision graph's inputs of pixels: the encoders', or for a structure that others know theirs.

    Args:
        model: Of any structure.
        names: What the processor calls them.
    """
    return list(names) if own_structure(model) else [PIXELS]


def export_vision(
    model: ManyEyesForConditionalGeneration, sides: Mapping[str, int], out: Path, *, opset: int
) -> GraphSignature:
    """Write encoders, fusion, projector and the layout of tokens as one graph.

    Args:
        model: In evaluation mode, fp32, on the CPU.
        sides: Side of each encoder's input in pixels.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.

    Returns:
        One input ``[tiles, 3, side, side]`` per encoder, called as ``name_pixels`` says; with a layout ``layout``
        ``[images, places]``, as ``encode_images`` takes it; where the fusion masks padding ``image_sizes``
        ``[images, 2]``, width and height. Output ``image_features`` ``[images, N, D]``; with reinjection also
        ``window_keys``, ``window_mask`` and ``window_overall``, what each token of each tile looks at.

    Raises:
        BundleError: The graph lacks an input.
    """
    layout = model.config.layout
    images, num_tiles = Dim("images"), _ROWS
    tiles: Any = images
    if layout is not None and layout.tiling == "grid":
        num_tiles = _ROWS * layout.num_tiles(_SIDE, _SIDE)
        tiles = layout.num_tiles(_SIDE, _SIDE) * images
    elif layout is not None and layout.tiling == "anyres":
        num_tiles, tiles = _TILES, Dim("tiles")
    whole = () if layout is None or layout.tiling == "none" else layout.whole
    if model.shared_pixels is not None and model.shared_pixels.image_grid > 1:
        # The model cuts the tiles itself, from one tensor that shows the whole image.
        whole = tuple(sides)
    pixels = [torch.zeros(_ROWS if name in whole else num_tiles, 3, side, side) for name, side in sides.items()]
    pixel_axes = [{0: images if name in whole else tiles} for name in sides]
    of_images: dict[str, tuple[Tensor, dict[int, Any]]] = {}
    if layout is not None:
        places = torch.arange(_ROWS * _LAID_OUT).view(_ROWS, _LAID_OUT) % (num_tiles * model.num_image_tokens)
        if layout.newline:
            places[:, 1] = NEWLINE
        of_images[LAYOUT] = (places, {0: images, 1: Dim("places")})
    if model.fusion.uses_image_sizes:
        of_images[IMAGE_SIZES] = (torch.tensor([[64, 48], [48, 64]]), {0: images})
    return export_graph(
        _Vision(model, list(sides), list(of_images)),
        (pixels, *_unless_empty([tensor for tensor, _ in of_images.values()])),
        (pixel_axes, *_unless_empty([axes for _, axes in of_images.values()])),
        out,
        opset=opset,
        input_names=[*name_pixels(model, sides), *of_images],
        output_names=[TOKENS] if model.reinjection is None else [TOKENS, *WINDOWS],
    )


def export_embed(language_model: PreTrainedModel, out: Path, *, opset: int) -> GraphSignature:
    """Write the embedding table.

    Args:
        language_model: In evaluation mode, fp32, on the CPU.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.

    Returns:
        Input ``input_ids`` ``[batch_size, query]``, int64; output ``inputs_embeds`` ``[batch_size, query, D]``.

    Raises:
        BundleError: The graph lacks an input.
    """
    return export_graph(
        _Embed(language_model.get_input_embeddings()),
        (torch.zeros(_ROWS, _QUERY, dtype=torch.long),),
        ({0: Dim("batch_size"), 1: Dim("query")},),
        out,
        opset=opset,
        input_names=["input_ids"],
        output_names=["inputs_embeds"],
    )


def export_decoder(
    language_model: PreTrainedModel, out: Path, *, opset: int, reinjection: Reinjection | None = None
) -> GraphSignature:
    """Write the language model as one graph for prefixes, questions and single tokens.

    Attention is traced as plain products with an additive, finite mask: a row of the mask without a single one (all
    padding) then gives a finite result that nothing looks at, and not NaN.

    Args:
        language_model: In evaluation mode, on the CPU. Its attention is set to what ``use_grouped_attention`` says.
        out: The ``.onnx`` file to write.
        opset: ONNX operator set.
        reinjection: Its blocks, attached to it; None without them.

    Returns:
        Inputs ``inputs_embeds`` ``[batch_size, query, D]``, ``attention_mask`` ``[batch_size, total]`` (past + query),
        ``position_ids`` ``[batch_size, query]``, ``num_logits_to_keep`` (a number: of how many of the last positions
        logits are wanted; 0 for all) and ``past_key_values.<layer>.key`` and ``.value``
        ``[batch_size, heads, past, width]``;
        with reinjection ``window_places`` ``[looks]`` (``row * query + position`` of each visual token; may be empty),
        ``window_keys`` ``[looks, cells, C]``, ``window_mask`` ``[looks, cells]`` and ``window_overall`` ``[looks, C]``;
        outputs ``logits`` ``[batch_size, kept, V]`` and ``present.<layer>.key`` and ``.value``
        ``[batch_size, heads, total, width]``. Past may be 0; ``manyeyes.export.cache`` says how it may be a buffer.

    Raises:
        BundleError: The graph lacks an input.
        RecipeError: This family of language models does not look back.
    """
    use_grouped_attention(language_model)
    shape = read_cache_shape(language_model)
    width = language_model.get_input_embeddings().weight.shape[1]
    attention_mask = torch.ones(_ROWS, _PAST + _QUERY, dtype=torch.long)
    attention_mask[0, :2] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -_QUERY:]
    past = [
        (torch.zeros(_ROWS, heads, _PAST, key_width), torch.zeros(_ROWS, heads, _PAST, value_width))
        for heads, (key_width, value_width) in zip(shape.heads, shape.widths, strict=True)
    ]
    batch, query, length, total, kept = Dim("batch_size"), Dim("query"), Dim("past"), Dim("total"), Dim("kept")
    layers = [f"{layer}.{kind}" for layer in range(len(past)) for kind in ("key", "value")]
    looks = [] if reinjection is None else _sample_looks(reinjection)
    return export_graph(
        _Decoder(language_model, reinjection),
        (
            torch.zeros(_ROWS, _QUERY, width),
            attention_mask,
            position_ids,
            torch.tensor([0, 2]),
            past,
            *_unless_empty(looks),
        ),
        (
            {0: batch, 1: query},
            {0: batch, 1: total},
            {0: batch, 1: query},
            {0: kept},
            [({0: batch, 2: length}, {0: batch, 2: length}) for _ in past],
            *_unless_empty([{0: Dim("looks")} for _ in looks]),
        ),
        out,
        opset=opset,
        input_names=[
            "inputs_embeds",
            "attention_mask",
            "position_ids",
            _POSITIONS,
            *(f"past_key_values.{layer}" for layer in layers),
            *((PLACES, *WINDOWS) if looks else ()),
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
        embeddings = torch.zeros(1, 2, width, dtype=language_model.dtype)
        output = language_model(inputs_embeds=embeddings, past_key_values=DynamicCache(), use_cache=True)
    layers = output.past_key_values.layers
    return CacheShape(
        heads=tuple(layer.keys.shape[1] for layer in layers),
        widths=tuple((layer.keys.shape[3], layer.values.shape[3]) for layer in layers),
    )


def _unless_empty(argument: list[Any]) -> list[list[Any]]:
    # The exporter gives axes their names only where every argument holds a tensor.
    return [argument] if argument else []


def _sample_looks(reinjection: Reinjection) -> list[Tensor]:
    sampler = reinjection.samplers[0]
    assert isinstance(sampler, VisionSampler)
    channels, cells = sampler.context_projection.in_features, sum(sampler.cells)
    mask = torch.ones(len(_LOOKS), cells, dtype=torch.bool)
    mask[0, -1] = False
    return [torch.tensor(_LOOKS), torch.zeros(len(_LOOKS), cells, channels), mask, torch.zeros(len(_LOOKS), channels)]
