"""Graphs in int8 and int4, made from the fp32 graph.

- **int8**: products of matrices in 8 bits (``MatMulIntegerToFloat`` of ONNX Runtime), one scale a column of the weights
  and one a row of the input, found as it comes. The quickest for many tokens at once: prefill, encoders. One scale for
  a whole input, which ``DynamicQuantizeLinear`` finds and ``quantize_dynamic`` uses, ruins language models: the first
  token's activations are thousands of times those of the others, which become 0.
- **int4**: ``MatMulNBits`` of ONNX Runtime in blocks of 32, symmetric, one fp32 scale a block, accuracy level 4 (inputs
  are rounded to int8 by block). The smallest, and the quickest for one token at a time.

Convolutions and norms stay fp32. The weights are rounded here and not by ``onnxruntime.quantization``, which takes the
whole model into memory and leaves ``Gemm`` and ``Gather`` out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from manyeyes.export.fused import CONTRIB, drop_unused

BLOCK = 32
_ROWS = 4096  # of a matrix, rounded at a time


def quantize_blocks(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round rows to 4 bits in blocks of ``BLOCK``.

    The number furthest from 0 in a block becomes -8 of -8 to 7, so that it is exact.

    Args:
        rows: ``[N, K]``.

    Returns:
        Two numbers a byte, plus 8, the lower half first: ``[N, blocks, BLOCK / 2]``; scales ``[N, blocks]``.
    """
    count, width = rows.shape
    blocks = -(-width // BLOCK)
    packed = np.empty((count, blocks, BLOCK // 2), np.uint8)
    scales = np.empty((count, blocks), np.float32)
    for start in range(0, count, _ROWS):
        part = rows[start : start + _ROWS]
        padded = np.zeros((len(part), blocks * BLOCK), np.float32)
        padded[:, :width] = part
        padded = padded.reshape(len(part), blocks, BLOCK)
        furthest = np.take_along_axis(padded, np.abs(padded).argmax(axis=-1)[..., None], axis=-1)
        scale = furthest / -8
        rounded = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale != 0))
        nibbles = (np.clip(rounded, -8, 7) + 8).astype(np.uint8)
        packed[start : start + _ROWS] = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        scales[start : start + _ROWS] = scale[..., 0]
    return packed, scales


def quantize_vectors(values: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to int8 with one scale for all numbers along an axis.

    Args:
        values: ``[A, B]``.
        axis: 0 for a scale a column, 1 for a scale a row.
    """
    scales = np.maximum(np.abs(values).max(axis=axis, keepdims=True) / 127, np.finfo(np.float32).tiny)
    return np.rint(values / scales).astype(np.int8), scales.astype(np.float32).squeeze(axis)


def quantize_graph(source: Path, precision: str) -> onnx_ir.Model:
    """A graph with its matrices and tables in int8 or int4.

    Args:
        source: The graph in fp32; its weights are read one by one.
        precision: ``int8`` or ``int4``.
    """
    model = onnx_ir.load(source)
    graph = model.graph
    writer = _Writer(graph)
    for node in [*graph]:
        if node.op_type in ("MatMul", "Gemm"):
            weight = _matrix(node, 1)
            if weight is None or not _plain_gemm(node):
                continue
            writer.replace(node, _product(writer, node, weight, precision))
        elif node.op_type == "Gather":
            table = _matrix(node, 0)
            if table is None or node.attributes.get_int("axis", 0) != 0:
                continue
            writer.replace(node, _lookup(writer, node, table, precision))
    model.opset_imports[CONTRIB] = 1
    drop_unused(graph)
    return model


@dataclass
class _Writer:
    """Puts nodes in front of the one that they replace."""

    graph: onnx_ir.Graph
    made: int = 0

    def __post_init__(self) -> None:
        self.new: list[onnx_ir.Node] = []
        self.rounded: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
        self.one, self.step = self.weight("one", np.float32(1)), self.weight("step", np.float32(1 / 127))
        # A row of zeros has a scale too, whose reciprocal is finite.
        self.smallest = self.weight("smallest", np.float32(1e-30))
        self.middle, self.last_axis = self.weight("middle", np.uint8(128)), self.weight("last_axis", np.array([-1]))
        self.first, self.second = self.weight("first", np.array([0])), self.weight("second", np.array([1]))

    def weight(self, name: str, values: NDArray[np.generic] | np.generic) -> onnx_ir.Value:
        self.made += 1
        tensor = onnx_ir.tensor(np.array(values, order="C"), name=f"{name}.{self.made}")
        value = onnx_ir.Value(
            name=tensor.name,
            const_value=tensor,
            shape=onnx_ir.Shape(np.shape(values)),
            type=onnx_ir.TensorType(tensor.dtype),
        )
        self.graph.register_initializer(value)
        return value

    def op(self, op_type: str, *inputs: onnx_ir.Value, domain: str = "", **attributes: int) -> onnx_ir.Value:
        node = onnx_ir.node(op_type, inputs, attributes=attributes, domain=domain)
        self.new.append(node)
        return node.outputs[0]

    def round_rows(self, value: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Each row of an input in 8 bits, and its scale ``[..., 1]``."""
        # Query, key and value read one input, which is rounded once.
        if value not in self.rounded:
            largest = self.op("ReduceMax", self.op("Abs", value), self.last_axis, keepdims=1)
            # Of no rows at all, ONNX Runtime's ReduceMax keeps the width, which is to be 1.
            largest = self.op("Slice", largest, self.first, self.second, self.last_axis)
            scale = self.op("Mul", self.op("Max", largest, self.smallest), self.step)
            rounded = self.op("QuantizeLinear", self.op("Div", value, scale), self.one, self.middle)
            self.rounded[value] = rounded, scale
        return self.rounded[value]

    def replace(self, node: onnx_ir.Node, made: onnx_ir.Value) -> None:
        old = node.outputs[0]
        made.type, made.shape = old.type, old.shape
        self.graph.insert_before(node, self.new)
        self.new = []
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        name = old.name
        self.graph.remove(node, safe=True)
        made.name = name


def _product(writer: _Writer, node: onnx_ir.Node, weight: NDArray[np.float32], precision: str) -> onnx_ir.Value:
    given, name = _input(node, 0), str(_input(node, 1).name)
    if node.attributes.get_int("transB", 0):
        weight = weight.T
    width, outputs = weight.shape
    if precision == "int4":
        packed, scales = quantize_blocks(weight.T)
        made = writer.op(
            "MatMulNBits",
            given,
            writer.weight(name, packed),
            writer.weight(f"{name}.scales", scales),
            domain=CONTRIB,
            K=width,
            N=outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )
    else:
        rounded, scales = quantize_vectors(weight, axis=0)
        values, scale = writer.round_rows(given)
        matrix, columns = writer.weight(name, rounded), writer.weight(f"{name}.scales", scales)
        made = writer.op("MatMulIntegerToFloat", values, matrix, writer.one, columns, writer.middle, domain=CONTRIB)
        made = writer.op("Mul", made, scale)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return made if bias is None else writer.op("Add", made, bias)


def _lookup(writer: _Writer, node: onnx_ir.Node, table: NDArray[np.float32], precision: str) -> onnx_ir.Value:
    ids, name = _input(node, 1), str(_input(node, 0).name)
    if precision == "int4" and table.shape[1] % BLOCK == 0:
        packed, scales = quantize_blocks(table)
        return writer.op(
            "GatherBlockQuantized",
            writer.weight(name, packed.reshape(len(table), -1)),
            ids,
            writer.weight(f"{name}.scales", scales),
            domain=CONTRIB,
            bits=4,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
    rounded, scales = quantize_vectors(table, axis=1)
    rows = writer.op("Cast", writer.op("Gather", writer.weight(name, rounded), ids), to=onnx_ir.DataType.FLOAT.value)
    return writer.op("Mul", rows, writer.op("Gather", writer.weight(f"{name}.scales", scales[:, None]), ids))


def _input(node: onnx_ir.Node, place: int) -> onnx_ir.Value:
    value = node.inputs[place]
    assert value is not None  # one of those that the operator needs
    return value


def _matrix(node: onnx_ir.Node, place: int) -> NDArray[np.float32] | None:
    """The weights at an input: two axes, fp32, neither of them of length 1."""
    tensor = _input(node, place).const_value
    if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    values = np.asarray(tensor.numpy(), np.float32)
    return values if min(values.shape) > 1 else None


def _plain_gemm(node: onnx_ir.Node) -> bool:
    read = node.attributes.get_float
    return node.op_type == "MatMul" or (
        node.attributes.get_int("transA", 0) == 0 and read("alpha", 1.0) == 1.0 and read("beta", 1.0) == 1.0
    )
