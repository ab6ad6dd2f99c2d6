"""``python -m bench.decoding WEIGHTS GRAPHS``: a bundle's language model in fp32, int8 and int4, beside two others.

These are torch eager, and the graphs of ``transformers.exporters`` with its fusions for ONNX Runtime on a CPU: in fp32,
in int8 and, where ``nncf`` is installed, in int4.
One thread, CPU time of the process, the sides in turn, medians of the rounds. WEIGHTS is a Hugging Face folder
(docs/smol.md makes one of 135 M parameters); fp32 graphs are exported into GRAPHS unless they are there. The prompt
is the beginning of README.md. As evidence fp32 writes torch's tokens, and the perplexity of the prompt says what
rounding costs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.exporters import (
    ExportFormat,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from transformers.exporters.utils import decompose_for_generation

from manyeyes.export.graphs import export_decoder, export_embed
from manyeyes.export.variants import graph_file, write_rounded
from manyeyes.runtime.bundle_contents import PREFILL
from manyeyes.runtime.decoding import Decoder
from manyeyes.runtime.sessions import CPU, Graph

PROMPT, WRITTEN, ROUNDS = 212, 8, 7
PRECISIONS = ("fp32", "int8", "int4")
PEER = "transformers.exporters"
MOST_PERPLEXITY = {"fp32": 1.0001, "int8": 1.15, "int4": 1.35, f"{PEER} fp32": 1.0001}


def write_graphs(model: PreTrainedModel, folder: Path) -> None:
    """Export what is not there yet."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    whole = {graph: folder / graph_file(graph, "fp32") for graph in ("embed", "decoder")}
    if not whole["decoder"].is_file():
        export_embed(model, whole["embed"], opset=20)
        export_decoder(model, whole["decoder"], opset=20)
    for graph in ("embed", "decoder"):
        for precision in ("int8", "int4"):
            write_rounded(graph, precision, folder)


class Torch:
    """The model in eager mode, as ``generate`` runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def step(self, ids: NDArray[np.int64], past: Any, keep: int) -> tuple[NDArray[np.float32], Any]:
        """Logits at the last ``keep`` of new tokens, and the longer cache."""
        with torch.no_grad():
            output = self.model(
                input_ids=torch.from_numpy(ids), past_key_values=past or DynamicCache(), logits_to_keep=keep
            )
        return output.logits[0].numpy(), output.past_key_values


class Ours:
    """Two graphs of a bundle, which the runtime's ``Decoder`` runs."""

    def __init__(self, folder: Path, precision: Any) -> None:
        files = [folder / graph_file(graph, precision) for graph in ("embed", "decoder")]
        files += [folder / PREFILL] if precision == "int4" else []
        self.bytes = sum(part.stat().st_size for file in files for part in folder.glob(f"onnx/{file.name}*"))
        embed, *decoders = (Graph(file, providers=[CPU], threads=1) for file in files)
        self.decoder = Decoder(embed, *decoders, stop_ids=())

    def step(self, ids: NDArray[np.int64], past: Any, keep: int) -> tuple[NDArray[np.float32], Any]:
        """Logits at the last ``keep`` of new tokens, and the longer cache."""
        decoder = self.decoder
        if past is None and keep == 1:
            nothing = decoder.run_prefixes([[]], [[]], [[]])
            logits, _, cache = decoder._run_prompts(nothing, [0], ids.tolist(), new=WRITTEN)
            return logits, (cache, ids.shape[1])
        if past is None:
            given = decoder._embed_tokens(ids), np.ones_like(ids), decoder._empty_cache(1)
            logits, cache = decoder._step(*given, keep=keep, graph=decoder._prefill)
            return logits[0], (cache, ids.shape[1])
        cache, used = past
        logits, cache = decoder.go_on(ids[0].tolist(), cache, [used], used + WRITTEN)
        return logits, (cache, used + 1)


def export_peer(model: PreTrainedModel, folder: Path) -> list[str]:
    """Let transformers.exporters make its graphs, unless they are there; the precisions that it can make here.

    Its best for one sequence: one graph for any number of new tokens after any past. It fuses GroupQueryAttention into
    such a graph for a batch of one alone, and leaves a mask of ones out.
    """
    (whole := folder / "fp32").mkdir(parents=True, exist_ok=True)
    if not (whole / "model.onnx").is_file():
        ids = torch.arange(3, 12)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        decoder, sample = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
        shapes = get_auto_dynamic_shapes({name: value for name, value in sample.items() if not isinstance(value, bool)})
        shapes = _lengths_alone(shapes)
        config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
        OnnxExporter().export(decoder, sample, config).save_pretrained(whole)
    quantizers: dict[str, Any] = {"int8": OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))}
    if find_spec("nncf"):
        from nncf import CompressWeightsMode
        from transformers.exporters import NNCFOnnxQuantizer, NNCFWeightCompressionConfig

        mode = CompressWeightsMode.INT4_SYM
        quantizers["int4"] = NNCFOnnxQuantizer(NNCFWeightCompressionConfig(mode=mode, group_size=32))
    for name, quantizer in quantizers.items():
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "model.onnx").is_file():
            program = OnnxExporter.load_program(whole / "model.onnx")
            quantized = quantizer.quantize(program, {}, ExportFormat.ONNX)
            OnnxExporter.save_program(quantized, folder / name / "model.onnx")
    return ["fp32", *quantizers]


def _lengths_alone(shapes: Any) -> Any:
    """Of tensors whose every axis may change, those that do: lengths, the axis before the last of four or the last."""
    if isinstance(shapes, dict) and all(isinstance(axis, int) for axis in shapes):
        length = 2 if len(shapes) == 4 else len(shapes) - 1
        return {length: shapes[length]} if shapes else {}
    if isinstance(shapes, dict):
        return {name: _lengths_alone(each) for name, each in shapes.items()}
    return [_lengths_alone(each) for each in shapes] if isinstance(shapes, list) else shapes


class Peer:
    """A graph of transformers.exporters; it gives logits at all new tokens."""

    def __init__(self, folder: Path) -> None:
        self.bytes = sum(part.stat().st_size for part in folder.glob("model.onnx*"))
        self.graph = Graph(folder / "model.onnx", providers=[CPU], threads=1)
        self.names = [name for name in self.graph.input_names if "past_key_values" in name]

    def inputs(self, ids: NDArray[np.int64], past: Any) -> dict[str, Any]:
        """What the graph takes for new tokens after a past."""
        if past is None:
            sizes = {name: self.graph.sizes(name, rank=4, fixed=(1, 3)) for name in self.names}
            past = {name: np.zeros((1, heads, 0, width), np.float32) for name, (heads, width) in sizes.items()}
            start = 0
        else:
            start = past[self.names[0]].shape()[2]
        places = np.arange(start, start + ids.shape[1])
        known = {"input_ids": ids, "attention_mask": np.ones((1, len(places) + start), np.int64)}
        known |= {"position_ids": places[None], "cache_position": places, **past}
        return {name: known[name] for name in self.graph.input_names}

    def step(self, ids: NDArray[np.int64], past: Any, keep: int) -> tuple[NDArray[np.float32], Any]:
        """Logits at the last ``keep`` of new tokens, and the longer cache."""
        outputs = self.graph.run(self.inputs(ids, past), on_host=("logits",))
        present = {name: outputs[f"output.{name.removeprefix('input.')}"] for name in self.names}
        return outputs["logits"].numpy()[0, -keep:], present


def run_round(step: Callable[..., Any], prompt: NDArray[np.int64]) -> tuple[float, float, list[int]]:
    """Seconds to the first token, seconds a further token, and what was written."""
    started = time.process_time()
    logits, past = step(prompt, None, 1)
    tokens = [int(logits[-1].argmax())]
    first = time.process_time() - started
    started = time.process_time()
    while len(tokens) < WRITTEN:
        logits, past = step(np.array([[tokens[-1]]]), past, 1)
        tokens.append(int(logits[-1].argmax()))
    return first, (time.process_time() - started) / (WRITTEN - 1), tokens


def perplexity(step: Callable[..., Any], prompt: NDArray[np.int64]) -> float:
    """Of the prompt."""
    logits, _ = step(prompt, None, prompt.shape[1])
    wide = logits[:-1].astype(np.float64)
    normaliser = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    return float(np.exp((normaliser - wide[np.arange(len(wide)), prompt[0, 1:]]).mean()))


def main() -> int:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="Tokens of the prompt.")
    parser.add_argument("--out", type=Path, default=Path("bench/results/decoding.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.weights, dtype=torch.float32).eval()
    text = Path("README.md").read_text(encoding="utf-8")
    prompt = np.array([AutoTokenizer.from_pretrained(arguments.weights)(text).input_ids[: arguments.prompt]])
    assert prompt.shape[1] == arguments.prompt, "README.md is shorter than the prompt"
    write_graphs(model, arguments.graphs)
    model.set_attn_implementation("sdpa")
    ours = {precision: Ours(arguments.graphs, precision) for precision in PRECISIONS}
    peers = arguments.graphs / "transformers_exporters"
    sides: dict[str, Any] = ours | {f"{PEER} {name}": Peer(peers / name) for name in export_peer(model, peers)}
    steps: dict[str, Any] = {"torch": Torch(model).step, **{name: side.step for name, side in sides.items()}}
    expected = perplexity(steps["torch"], prompt)
    rounds: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            timed = run_round(step, prompt)
            if number:  # the first round warms up
                rounds[name].append(timed)
    results = {}
    for name, found in rounds.items():
        firsts, nexts = [one[0] for one in found], [one[1] for one in found]
        ratio = perplexity(steps[name], prompt) / expected
        if ratio > MOST_PERPLEXITY.get(name, math.inf):
            raise SystemExit(f"{name}: perplexity is {ratio:.3f} times torch's")
        results[name] = {
            "first_token_ms": round(1000 * median(firsts), 1),
            "first_token_ratio": round(median(t[0] / o for t, o in zip(rounds["torch"], firsts, strict=True)), 2),
            "tokens_per_s": round(1 / median(nexts), 1),
            "decode_ratio": round(median(t[1] / o for t, o in zip(rounds["torch"], nexts, strict=True)), 2),
            "perplexity_ratio": round(ratio, 4),
            "bytes": sides[name].bytes if name in sides else None,
        }
        print(name, results[name])
    for name in ("fp32", f"{PEER} fp32"):
        assert rounds[name][0][2] == rounds["torch"][0][2], f"{name} writes other tokens than torch"
    facts = {"prompt": arguments.prompt, "written": WRITTEN, "rounds": ROUNDS, "load": os.getloadavg()[0]}
    arguments.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
