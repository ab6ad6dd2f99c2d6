"""The graphs of every variant of a bundle, each written once however many variants have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import onnx_ir

from manyeyes.export.graphs import describe_graph, export_decoder, export_embed, export_vision, save_graph
from manyeyes.export.overflow import find_overflow
from manyeyes.export.precision import for_many_tokens, quantize_graph
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor
from manyeyes.recipe.recipe import GraphPrecision
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.bundle_contents import (
    DECODER,
    EMBED,
    PREFILL,
    VISION,
    BundleVariant,
    GraphName,
    GraphSignature,
    Precision,
)

_NAMES: dict[GraphName, str] = {"vision": VISION, "embed": EMBED, "decoder": DECODER}
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)
_SUFFIXES: dict[Precision, str] = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "int4": "_q4"}


def graph_file(graph: GraphName, precision: Precision) -> str:
    """Path of the file of a graph in its bundle."""
    return _NAMES[graph].replace(".onnx", f"{_SUFFIXES[precision]}.onnx")


def write_rounded(graph: GraphName, precision: Precision, folder: Path) -> dict[str, GraphSignature]:
    """Write a graph in int8 or int4, of the fp32 graph that lies in the folder; of a decoder in int4, both that it has.

    Args:
        graph: Which.
        precision: ``int8`` or ``int4``.
        folder: A bundle's.

    Returns:
        Inputs and outputs of what was written, by its path in ``folder``.
    """
    out = graph_file(graph, precision)
    rounded = quantize_graph(folder / graph_file(graph, "fp32"), precision)
    if precision == "int4" and graph == "vision":
        for_many_tokens(rounded)
    signatures = {out: describe_graph(rounded)}
    if precision == "int4" and graph == "decoder":
        # Both read the same weights, from files beside them.
        save_graph(rounded, folder / out, most_inside=0)
        prefill = onnx_ir.load(folder / out)
        for_many_tokens(prefill)
        onnx_ir.save(prefill, folder / PREFILL)
        signatures[PREFILL] = describe_graph(prefill)
    else:
        save_graph(rounded, folder / out)
    return signatures


def write_graphs(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    folder: Path,
    *,
    precisions: Mapping[str, GraphPrecision],
    opset: int,
    calibration: Sequence[Group],
) -> tuple[dict[str, GraphSignature], dict[str, BundleVariant]]:
    """Write the graphs that variants ask for.

    Args:
        model: In evaluation mode, fp32, on the CPU; it is in fp16 afterwards where a variant asks for that.
        processor: The model's.
        folder: To write into.
        precisions: Of each variant, by its name.
        opset: ONNX operator set.
        calibration: Questions about images, by which it is found whether fp16 holds what the model computes.

    Returns:
        Inputs and outputs of each graph by its path in ``folder``, and the variants.

    Raises:
        BundleError: A graph lacks an input, or fp16 does not hold what it computes.
    """
    asked: dict[GraphName, set[Precision]] = {
        graph: {getattr(precision, graph) for precision in precisions.values()} for graph in GRAPHS
    }
    signatures: dict[str, GraphSignature] = {}
    (folder / VISION).parent.mkdir()
    for graph, wanted in asked.items():
        whole = graph_file(graph, "fp32")
        if wanted != {"fp16"}:
            signatures[whole] = _trace(graph, model, processor, folder / whole, opset=opset)
        for precision in sorted(wanted - {"fp32", "fp16"}):
            signatures |= write_rounded(graph, precision, folder)
        if "fp32" not in wanted and whole in signatures:
            del signatures[whole]
            for file in _files(folder, whole):
                (folder / file).unlink()
    halved = [graph for graph, wanted in asked.items() if "fp16" in wanted]
    if halved:
        model.half()
        find_overflow(model, processor, calibration, graphs=halved)
        for graph in halved:
            out = graph_file(graph, "fp16")
            signatures[out] = _trace(graph, model, processor, folder / out, opset=opset)
    variants = {}
    for name, given in precisions.items():
        by_graph: dict[GraphName, Precision] = {graph: getattr(given, graph) for graph in GRAPHS}
        files = {graph: _files(folder, graph_file(graph, each)) for graph, each in by_graph.items()}
        prefill = PREFILL if given.decoder == "int4" else None
        variants[name] = BundleVariant(precision=by_graph, graphs=files, prefill=prefill)
    return signatures, variants


def _trace(
    graph: GraphName,
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    out: Path,
    *,
    opset: int,
) -> GraphSignature:
    if graph == "vision":
        sizes = {name: transform.size for name, transform in processor.image_transforms.items()}
        return export_vision(model, sizes, out, opset=opset)
    if graph == "embed":
        return export_embed(model.language_model, out, opset=opset)
    return export_decoder(model.language_model, out, opset=opset, reinjection=model.reinjection)


def _files(folder: Path, graph: str) -> list[str]:
    """The file of a graph, then those that hold its weights."""
    return [graph, *sorted(file.relative_to(folder).as_posix() for file in folder.glob(f"{graph}_data*"))]
