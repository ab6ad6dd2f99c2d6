"""Operators of ONNX Runtime in place of several of the standard's, in fp32 graphs.

Where products are small, as for one new token, a graph takes as long as it has operators.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def fuse(model: onnx_ir.Model) -> None:
    """Fuse norms and rotary embeddings.

    - An RMS norm and the sum in front of it, by onnxscript's rules: ``SkipSimplifiedLayerNormalization``.
    - A rotary embedding of queries or keys, by a rule of our own: ``RotaryEmbedding``. That of onnxscript writes tables
      of cosines up to a longest position into the graph; here they are computed of the positions given, as before.

    Args:
        model: In fp32; is changed where it has such.
    """
    norms = fuse_rms_normalization(model)
    if norms:
        fuse_skip_rms_normalization(model)
    rotated = _Rotary.rule().apply_to_model(model, commute=True)
    if rotated:
        # Every layer reads the same tables.
        CommonSubexpressionEliminationPass()(model)
    if norms or rotated:
        model.opset_imports[CONTRIB] = 1
        drop_unused(model.graph)


class _Rotary(pattern.RewriteRuleClassBase):
    """``x * cos + rotate_half(x) * sin``, x being ``[batch_size, heads, query, width]``.

    Cosines and sines are ``[batch_size, 1, query, width]``, their second half equal to the first.
    """

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, start: Any, middle: Any, middle_again: Any, end: Any) -> Any:
        first = op.Slice(x, start, middle, [3], [1])
        second = op.Slice(x, middle_again, end, [3], [1])
        return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin

    def check(
        self,
        context: Any,  # noqa: ARG002
        *,
        x: onnx_ir.Value,
        cos: onnx_ir.Value,
        sin: onnx_ir.Value,
        start: onnx_ir.Value,
        middle: onnx_ir.Value,
        middle_again: onnx_ir.Value,
        end: onnx_ir.Value,
        **_: Any,
    ) -> bool:
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return False
        width = x.shape[3]
        cuts = [_number(value) for value in (start, middle, middle_again, end)]
        return (
            cuts[:3] == [0, width // 2, width // 2]
            and cuts[3] is not None
            and cuts[3] >= width
            and all(_is_doubled(value, x) for value in (cos, sin))
        )

    def rewrite(self, op: Any, x: onnx_ir.Value, cos: onnx_ir.Value, sin: onnx_ir.Value, **_: Any) -> Any:
        assert x.shape is not None
        assert isinstance(x.shape[3], int)
        half = x.shape[3] // 2
        zero, one, axis, whole, cut = (op.Constant(value_ints=each) for each in ([0], [1], [3], [-1, half], [half]))
        # A row of the tables for each token, in the tokens' order: each token's position is its place there.
        tables = [op.Reshape(op.Slice(value, zero, cut, axis, one), whole) for value in (cos, sin)]
        sizes = op.Concat(op.Shape(cos, start=0, end=1), op.Shape(cos, start=2, end=3), axis=0)
        count = op.ReduceProd(sizes, keepdims=0)
        numbers = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        return op.RotaryEmbedding(x, op.Reshape(numbers, sizes), *tables, interleaved=0, _domain=CONTRIB)


def _number(value: onnx_ir.Value) -> int | None:
    constant = value.const_value
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def _is_doubled(table: onnx_ir.Value, x: onnx_ir.Value) -> bool:
    """Whether a table is of one head and of x's tokens, its second half equal to the first."""
    assert x.shape is not None
    if table.shape is None or list(table.shape) != [x.shape[0], 1, *list(x.shape)[2:]]:
        return False
    node = table.producer()
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Cos", "Sin", "Mul"):
        # A factor behind the cosine has one number.
        sized = [value for value in node.inputs if value is not None and _number(value) is None]
        node = sized[0].producer() if len(sized) == 1 else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    return node.inputs[0] is node.inputs[1] and node.attributes.get_int("axis", 0) in (-1, len(table.shape) - 2)


def drop_unused(graph: onnx_ir.Graph) -> None:
    """Take out initializers that nothing reads."""
    unused = [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]
    for name in unused:
        del graph.initializers[name]
