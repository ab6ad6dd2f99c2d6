"""``python -m bench.decoding WEIGHTS GRAPHS``: a bundle's language model in fp32, int8 and int4, beside torch eager.

One thread, CPU time of the process, the sides in turn, medians of the rounds. WEIGHTS is a Hugging Face folder
(docs/smol.md makes one of 135 M parameters); fp32 graphs are exported into GRAPHS unless they are there. The prompt
is the beginning of README.md. As evidence fp32 writes torch's tokens, and the perplexity of the prompt says what
rounding costs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from manyeyes.export.graphs import export_decoder, export_embed, save_graph
from manyeyes.export.precision import quantize_graph
from manyeyes.export.variants import graph_file
from manyeyes.runtime.sessions import CPU, Graph

PROMPT, WRITTEN, ROUNDS = 212, 8, 7
PRECISIONS = ("fp32", "int8", "int4")
MOST_PERPLEXITY = {"fp32": 1.0001, "int8": 1.15, "int4": 1.35}


def write_graphs(model: PreTrainedModel, folder: Path) -> None:
    """Export what is not there yet."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    whole = {graph: folder / graph_file(graph, "fp32") for graph in ("embed", "decoder")}
    if not whole["decoder"].is_file():
        export_embed(model, whole["embed"], opset=20)
        export_decoder(model, whole["decoder"], opset=20)
    for graph, source in whole.items():
        for precision in ("int8", "int4"):
            save_graph(quantize_graph(source, precision), folder / graph_file(graph, precision))  # type: ignore[arg-type]


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
    """Two graphs of a bundle."""

    def __init__(self, folder: Path, precision: Any) -> None:
        files = [folder / graph_file(graph, precision) for graph in ("embed", "decoder")]
        self.bytes = sum(file.stat().st_size for file in files)
        self.embed, self.decoder = (Graph(file, providers=[CPU], threads=1) for file in files)
        self.names = [name for name in self.decoder.input_names if name.startswith("past_key_values")]

    def step(self, ids: NDArray[np.int64], past: Any, keep: int) -> tuple[NDArray[np.float32], Any]:
        """Logits at the last ``keep`` of new tokens, and the longer cache."""
        if past is None:
            sizes = {name: self.decoder.sizes(name, rank=4, fixed=(1, 3)) for name in self.names}
            past = {name: np.zeros((1, heads, 0, width), np.float32) for name, (heads, width) in sizes.items()}
            start = 0
        else:
            start = past[self.names[0]].shape()[2]
        length = ids.shape[1]
        embeddings = self.embed.run({"input_ids": ids}, on_host=("inputs_embeds",))["inputs_embeds"].numpy()
        outputs = self.decoder.run(
            {
                "inputs_embeds": embeddings,
                "attention_mask": np.ones((1, start + length), np.int64),
                "position_ids": np.arange(start, start + length)[None],
                "num_logits_to_keep": np.array(keep),
                **past,
            },
            on_host=("logits",),
        )
        present = {name: outputs[name.replace("past_key_values", "present")] for name in self.names}
        return outputs["logits"].numpy()[0], present


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
    parser.add_argument("--out", type=Path, default=Path("bench/results/decoding.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.weights, dtype=torch.float32).eval()
    text = Path("README.md").read_text(encoding="utf-8")
    prompt = np.array([AutoTokenizer.from_pretrained(arguments.weights)(text).input_ids[:PROMPT]])
    write_graphs(model, arguments.graphs)
    model.set_attn_implementation("sdpa")
    ours = {precision: Ours(arguments.graphs, precision) for precision in PRECISIONS}
    steps: dict[str, Any] = {"torch": Torch(model).step, **{name: side.step for name, side in ours.items()}}
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
        if ratio > MOST_PERPLEXITY.get(name, 1.0001):
            raise SystemExit(f"{name}: perplexity is {ratio:.3f} times torch's")
        results[name] = {
            "first_token_ms": round(1000 * median(firsts), 1),
            "first_token_ratio": round(median(t[0] / o for t, o in zip(rounds["torch"], firsts, strict=True)), 2),
            "tokens_per_s": round(1 / median(nexts), 1),
            "decode_ratio": round(median(t[1] / o for t, o in zip(rounds["torch"], nexts, strict=True)), 2),
            "perplexity_ratio": round(ratio, 4),
            "bytes": ours[name].bytes if name in ours else None,
        }
        print(name, results[name])
    assert rounds["fp32"][0][2] == rounds["torch"][0][2], "fp32 writes other tokens than torch"
    facts = {"prompt": PROMPT, "written": WRITTEN, "rounds": ROUNDS, "load": os.getloadavg()[0]}
    arguments.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
