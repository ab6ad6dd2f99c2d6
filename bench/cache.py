"""What keys and values cost a decoding step: ``python -m bench.cache``, attention alone, as several graphs compute it.

Thirty layers of SmolLM2-135M's attention (9 heads over 3 of keys, 64 wide) without weights, one new token a row.
``append`` is what a bundle's decoder does: past and new are joined to a new tensor, which IO binding hands on to the
next step without a copy to numpy. ``in place`` writes into a buffer with room that is both past and present;
``either`` does one or the other as the mask is as long as the past or longer, so that runtimes that know only the
first can use it. GroupQueryAttention is ONNX Runtime's, joined and in a shared buffer. One thread, CPU time of the
process, the sides in turn, medians of the steps; every side must give the results of ``append``.

``python -m bench.cache GRAPHS`` measures whole steps of a bundle's decoder instead, as the runtime takes them: joined,
and in a buffer. GRAPHS has the graphs that ``bench.decoding`` made. Both must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from manyeyes.export.variants import graph_file
from manyeyes.runtime.decoding import Decoder
from manyeyes.runtime.sessions import CPU, Graph

LAYERS, HEADS, GROUPS, WIDTH = 30, 9, 3, 64
ROOM, STEPS, DECODER_STEPS = 64, 9, 33
LENGTHS, ROWS = (200, 1000, 2000), (1, 4)
NAMES = [f"{layer}{kind}" for layer in range(LAYERS) for kind in "kv"]
SIDES = ("append", "in place", "either: append", "either: in place", "GQA: append", "GQA: in place")
Array = NDArray[Any]


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    """An operator of ONNX."""
    return helper.make_node(op, inputs, outputs, **attributes)


def tensor(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def cache_nodes(layer: int, graph: str) -> list[onnx.NodeProto]:
    """Of one layer: past and new to present."""

    def written(kind: str, out: str, *, in_place: bool) -> onnx.NodeProto:
        past = f"past.{layer}{kind}"
        if in_place:
            return node("ScatterElements", [past, "slots", kind], [out], axis=2)
        return node("Concat", [past, kind], [out], axis=2)

    if graph != "either":
        return [written(kind, f"present.{layer}{kind}", in_place=graph == "in place") for kind in "kv"]
    branches = {}
    for branch, in_place in (("then_branch", True), ("else_branch", False)):
        outs = [f"{branch}.{layer}{kind}" for kind in "kv"]
        nodes = [written(kind, out, in_place=in_place) for kind, out in zip("kv", outs, strict=True)]
        values = [tensor(out, "rows", GROUPS, branch, WIDTH) for out in outs]
        branches[branch] = helper.make_graph(nodes, f"{branch}.{layer}", [], values)
    return [node("If", ["has_room"], [f"present.{layer}{kind}" for kind in "kv"], **branches)]


def make_graph(graph: str) -> bytes:
    """Attention as ``manyeyes.export.attention`` has it, or as GroupQueryAttention."""
    fused = graph == "GQA"
    constants = {"scale": np.float32(WIDTH**-0.5)} | {
        name: np.array(shape)
        for name, shape in {
            "grouped": (0, GROUPS, HEADS // GROUPS, -1),
            "by_head": (0, HEADS, 1, -1),
        }.items()
    }
    new = {"query.0": HEADS, "k": GROUPS, "v": GROUPS}
    inputs = [
        tensor(name, "rows", 1, heads * WIDTH) if fused else tensor(name, "rows", heads, 1, WIDTH)
        for name, heads in new.items()
    ]
    inputs.append(tensor("bias", "rows", 1, 1, "total"))
    inputs += [tensor(name, *shape, kind=TensorProto.INT32) for name, shape in (("lasts", ["rows"]), ("total", []))]
    inputs.append(tensor("slot", 1, kind=TensorProto.INT64))
    inputs += [tensor(f"past.{name}", "rows", GROUPS, "past", WIDTH) for name in NAMES]
    nodes = [
        node("Shape", ["k"], ["of_new"]),
        node("Expand", ["slot", "of_new"], ["slots"]),
        node("Shape", ["bias"], ["columns"], start=3),
        node("Shape", ["past.0k"], ["past_length"], start=2, end=3),
        node("Equal", ["columns", "past_length"], ["equal"]),
        node("Squeeze", ["equal"], ["has_room"]),
    ]
    for layer in range(LAYERS):
        query, key, value, out = f"query.{layer}", f"present.{layer}k", f"present.{layer}v", f"query.{layer + 1}"
        if fused:
            taken = [query, "k", "v", f"past.{layer}k", f"past.{layer}v", "lasts", "total", "", "", "", "bias"]
            heads = {"num_heads": HEADS, "kv_num_heads": GROUPS}
            nodes.append(node("GroupQueryAttention", taken, [out, key, value], domain="com.microsoft", **heads))
            continue
        nodes += cache_nodes(layer, graph)
        steps = (
            ("Mul", query, "scale"),
            ("Reshape", None, "grouped"),
            ("MatMul", None, f"turned.{layer}"),
            ("Reshape", None, "by_head"),
            ("Add", None, "bias"),
            ("Softmax", None, None),
            ("Reshape", None, "grouped"),
            ("MatMul", None, value),
            ("Reshape", None, "by_head"),
        )
        nodes.append(node("Transpose", [key], [f"turned.{layer}"], perm=[0, 1, 3, 2]))
        before = ""
        for place, (op, first, second) in enumerate(steps):
            after = out if place == len(steps) - 1 else f"{layer}.{place}"
            nodes.append(node(op, [first or before, *([second] if second else [])], [after]))
            before = after
    outputs = [tensor(f"present.{name}", "rows", GROUPS, "slots", WIDTH) for name in NAMES]
    outputs.append(tensor(f"query.{LAYERS}", *("rows", 1, HEADS * WIDTH) if fused else ("rows", HEADS, 1, WIDTH)))
    made = helper.make_graph(
        nodes, "attention", inputs, outputs, [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    content: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


class Side:
    """One way to decode from a past."""

    def __init__(self, name: str, session: ort.InferenceSession, past: list[Array]) -> None:
        self.session, self.fused, self.in_place = session, name.startswith("GQA"), name.endswith("in place")
        self.length = past[0].shape[2]
        self.slots = self.length + (ROOM if self.in_place else 0)
        self.cache = [ort.OrtValue.ortvalue_from_numpy(np.pad(each, self._room())) for each in past]
        self.taken = {value.name for value in session.get_inputs()}

    def _room(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 0), (0, self.slots - self.length), (0, 0)]

    def step(self, new: dict[str, Array]) -> tuple[float, Array]:
        """CPU seconds, and what attention gives ``[rows, heads * width]``."""
        rows, self.length = len(new["k"]), self.length + 1
        # GroupQueryAttention looks at no slot behind the last token; products look at all, and need a mask.
        columns = self.slots if self.in_place and not self.fused else self.length
        bias = np.where(np.arange(columns) < self.length, 0, np.float32(-1e9)).astype(np.float32)
        inputs: dict[str, Array] = {
            "bias": np.ascontiguousarray(np.broadcast_to(bias, (rows, 1, 1, columns))),
            "lasts": np.full(rows, self.length - 1, np.int32),
            "total": np.array(self.length, np.int32),
            "slot": np.array([self.length - 1]),
            **{name: each.reshape(rows, 1, -1) if self.fused else each for name, each in new.items()},
        }
        started = time.process_time()
        binding = self.session.io_binding()
        for name in self.taken.intersection(inputs):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(inputs[name]))
        for name, value in zip(NAMES, self.cache, strict=True):
            binding.bind_ortvalue_input(f"past.{name}", value)
            if self.in_place:
                binding.bind_ortvalue_output(f"present.{name}", value)
            else:
                binding.bind_output(f"present.{name}", "cpu", 0)
        binding.bind_output(f"query.{LAYERS}", "cpu", 0)
        self.session.run_with_iobinding(binding)
        *present, out = binding.get_outputs()
        self.cache = self.cache if self.in_place else present
        return time.process_time() - started, out.numpy().reshape(rows, -1).copy()


def measure(sessions: dict[str, ort.InferenceSession], rows: int, length: int) -> dict[str, float]:
    """Milliseconds a step of each side."""
    drawn = np.random.default_rng(length)
    past = [drawn.standard_normal((rows, GROUPS, length, WIDTH), np.float32) for _ in NAMES]
    sides = {name: Side(name, sessions[name.split(":")[0]], past) for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(STEPS):
        new = {
            name: drawn.standard_normal((rows, heads, 1, WIDTH), np.float32)
            for name, heads in (("query.0", HEADS), ("k", GROUPS), ("v", GROUPS))
        }
        found = {name: side.step(new) for name, side in sides.items()}
        for name, (taken, out) in found.items():
            seconds[name].append(taken)
            # GroupQueryAttention adds up in another order.
            most = 1e-6 if name.startswith("GQA") else 0
            assert np.abs(out - found["append"][1]).max() <= most, f"{name} gives something else than append"
    return {name: round(1000 * median(each[1:]), 1) for name, each in seconds.items()}


def measure_decoder(decoder: Decoder, rows: int, length: int) -> dict[str, float]:
    """Milliseconds a step of a whole decoder, joined and in a buffer; copies that make room are part of it."""
    drawn = np.random.default_rng(length)
    first = {}
    for name, value in decoder.run_prefixes([[]] * rows, [[]] * rows, [[]] * rows).cache.items():
        _, heads, _, width = value.shape()
        first[name] = drawn.standard_normal((rows, heads, length, width), np.float32)
    tokens = dict.fromkeys(("joined", "in a buffer"), drawn.integers(3, 1000, rows).tolist())
    caches: dict[str, Any] = {
        side: {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in first.items()} for side in tokens
    }
    seconds: dict[str, list[float]] = {side: [] for side in tokens}
    for number in range(DECODER_STEPS):
        for side, last in tokens.items():
            decoder._takes_buffer = side != "joined"
            started = time.process_time()
            given = caches[side], [length + number] * rows, length + DECODER_STEPS
            logits, caches[side] = decoder.go_on(last, *given)
            seconds[side].append(time.process_time() - started)
            tokens[side] = logits.argmax(axis=-1).tolist()
        assert tokens["joined"] == tokens["in a buffer"], "in a buffer other tokens are written"
    found = {side: 1000 * sum(each[1:]) / (DECODER_STEPS - 1) for side, each in seconds.items()}
    ratio = median(a / b for a, b in zip(seconds["joined"][1:], seconds["in a buffer"][1:], strict=True))
    return {side: round(each, 1) for side, each in found.items()} | {"ratio": round(ratio, 2)}


def main() -> int:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.graphs is not None:
        results = []
        for precision in ("fp32", "int4"):
            files = (arguments.graphs / graph_file(graph, precision) for graph in ("embed", "decoder"))
            decoder = Decoder(*(Graph(file, providers=[CPU], threads=1) for file in files), stop_ids=())
            for rows in ROWS:
                for length in LENGTHS:
                    ms = measure_decoder(decoder, rows, length)
                    results.append({"precision": precision, "rows": rows, "tokens": length, "ms": ms})
                    print(results[-1], flush=True)
        return write(arguments.out or Path("bench/results/cache_decoder.json"), results, steps=DECODER_STEPS)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = {
        graph: ort.InferenceSession(make_graph(graph), options, providers=["CPUExecutionProvider"])
        for graph in ("append", "in place", "either", "GQA")
    }
    results = []
    for rows in ROWS:
        for length in LENGTHS:
            results.append({"rows": rows, "tokens": length, "ms": measure(sessions, rows, length)})
            print(results[-1], flush=True)
    return write(arguments.out or Path("bench/results/cache.json"), results, layers=LAYERS, room=ROOM, steps=STEPS)


def write(out: Path, results: list[dict[str, Any]], **facts: int) -> int:
    """Write the figures."""
    facts_of_run = {**facts, "load": round(os.getloadavg()[0], 1), "results": results}
    out.write_text(json.dumps(facts_of_run, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
