"""Tracing a module with torch's exporter, and writing what comes out as one ONNX file.

Tracing makes an axis static when a sample has 0 or 1 there, and folds a mask of ones away; so every dynamic axis is 2
or more in the samples, sizes differ where axes are independent, and a sample mask has zeros.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn

from manyeyes.errors import BundleError
from manyeyes.runtime.bundle_contents import GraphSignature, GraphTensor


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
        module: In evaluation mode, fp32, on the CPU.
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
