"""Graphs in int8 and int4, made from the fp32 graph.

- **int8**: products of matrices in 8 bits (``MatMulIntegerToFloat`` of ONNX Runtime), one scale a column of the weights
  and one a row of the input, found as it comes. The quickest for many tokens at once: prefill, encoders. One scale for
  a whole input, which ``DynamicQuantizeLinear`` finds and ``quantize_dynamic`` uses, ruins language models: the first
  token's activations are thousands of times those of the others, which become 0.
- **int4**: ``MatMulNBits`` of ONNX Runtime in blocks of 32, symmetric, one fp32 scale a block. The smallest. At
  accuracy level 4 inputs are rounded to int8 by block, which is the quickest for one token at a time; from 16 tokens
  on level 0, which multiplies in fp32, is quicker, and ``for_many_tokens`` sets it.

Convolutions are stored in as many bits and become fp32 while the graph loads, so they are as quick as in fp32. Norms
stay fp32. The weights are rounded here and not by ``onnxruntime.quantization``, which takes the whole model into memory
and leaves ``Conv``, ``Gemm`` and ``Gather`` out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from manyeyes.export.fused import CONTRIB, drop_unused
from manyeyes.runtime.decoding import KEPT

BLOCK = 32
_ROWS = 4096  # of a matrix, rounded at a time
_FEW = 4  # numbers of a constant that many nodes read
_FEWEST = 8  # weights of an output of a convolution for which scales pay


def for_many_tokens(model: onnx_ir.Model) -> None:
    """Let products with matrices in int4 be made in fp32, as is quicker for many tokens at once on a CPU.

    Products behind ``num_logits_to_keep`` stay as they are: they have one token a prompt.

    Args:
        model: From ``quantize_graph``; its weights may lie in files, and stay there.
    """
    behind = {value for value in model.graph.inputs if value.name == KEPT}
    for node in model.graph:
        if behind.intersection(node.inputs):
            behind.update(node.outputs)
        elif node.op_type == "MatMulNBits":
            node.attributes.add(onnx_ir.AttrInt64("accuracy_level", 0))


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
        elif node.op_type == "Conv":
            _store_convolution(writer, node, precision)
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

    def __post_init__(self) -> None:
        self.made = 0
        self.new: list[onnx_ir.Node] = []
        self.few: dict[tuple[str, np.dtype[Any], bytes] | None, onnx_ir.Value] = {}
        self.rounded: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
        self.one, self.step = self.weight("one", np.float32(1)), self.weight("step", np.float32(1 / 127))
        # A row of zeros has a scale too, whose reciprocal is finite.
        self.smallest = self.weight("smallest", np.float32(1e-30))
        self.middle, self.last_axis = self.weight("middle", np.uint8(128)), self.weight("last_axis", np.array([-1]))
        self.first, self.second = self.weight("first", np.array([0])), self.weight("second", np.array([1]))

    def weight(self, name: str, values: NDArray[np.generic] | np.generic) -> onnx_ir.Value:
        key = (name, values.dtype, values.tobytes()) if values.size <= _FEW else None
        if key in self.few:
            return self.few[key]
        self.made += 1
        tensor = onnx_ir.tensor(np.array(values, order="C"), name=f"{name}.{self.made}")
        value = onnx_ir.Value(
            name=tensor.name,
            const_value=tensor,
            shape=onnx_ir.Shape(np.shape(values)),
            type=onnx_ir.TensorType(tensor.dtype),
        )
        self.graph.register_initializer(value)
        if key is not None:
            self.few[key] = value
        return value

    def op(self, op_type: str, *inputs: onnx_ir.Value, domain: str = "", **attributes: Any) -> onnx_ir.Value:
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


def _store_convolution(writer: _Writer, node: onnx_ir.Node, precision: str) -> None:
    """Keep the weights of a convolution in fewer bits; ONNX Runtime makes fp32 of them while it loads the graph."""
    tensor = _input(node, 1).const_value
    if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT:
        return
    weight, name = np.asarray(tensor.numpy(), np.float32), str(_input(node, 1).name)
    rows = weight.reshape(len(weight), -1)
    if rows.shape[1] < _FEWEST:
        return
    whole = onnx_ir.DataType.FLOAT.value
    if precision == "int4" and rows.shape[1] >= 2 * BLOCK:
        packed, scales = quantize_blocks(rows)
        pairs = writer.weight(name, packed)
        lower = writer.op("BitwiseAnd", pairs, writer.weight("lower", np.uint8(15)))
        upper = writer.op("BitShift", pairs, writer.weight("upper", np.uint8(4)), direction="RIGHT")
        halves = (writer.op("Unsqueeze", half, writer.last_axis) for half in (lower, upper))
        numbers = writer.op("Cast", writer.op("Concat", *halves, axis=-1), to=whole)
        numbers = writer.op("Sub", numbers, writer.weight("zero", np.float32(8)))
        numbers = writer.op("Mul", numbers, writer.weight(f"{name}.scales", scales[..., None, None]))
        if rows.shape[1] % BLOCK:
            numbers = writer.op("Reshape", numbers, writer.weight("rows", np.array([len(rows), -1])))
            end = writer.weight("end", np.array([rows.shape[1]]))
            numbers = writer.op("Slice", numbers, writer.first, end, writer.last_axis)
    else:
        rounded, scales = quantize_vectors(rows, axis=1)
        numbers = writer.op("Cast", writer.weight(name, rounded), to=whole)
        numbers = writer.op("Mul", numbers, writer.weight(f"{name}.scales", scales[:, None]))
    restored = writer.op("Reshape", numbers, writer.weight("shape", np.array(weight.shape)))
    writer.graph.insert_before(node, writer.new)
    writer.new = []
    node.replace_input_with(1, restored)


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
