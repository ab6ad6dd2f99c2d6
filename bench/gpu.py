"""``python -m bench.gpu``: LLaVA-1.5-7B's stages on one GPU, with random weights of its shapes.

A language model and a tokenizer are written in the hub's format, photographs of noise with long conversations become a
snapshot, and each case goes through the stage that ships, in a process of its own: pretrain as published, sft with
adapters, sft with adapters on 4 bits. Micro-batches are the largest that the estimate lets fit. Printed are tokens and
images a second, MFU (40% is wanted), the highest memory beside what the estimate says (within 10% is wanted), and the
share of the time that training waited for data (2%). A memory further off fails. ``--tiny`` goes the same way in small
shapes on any machine; a CPU's memory says nothing there, and is not compared.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import open_folder
from manyeyes.estimate import way_of, worst_memory
from manyeyes.estimate.skeleton import count_facts
from manyeyes.recipe import Recipe, StageName, change_recipe, load_recipe
from manyeyes.sources import language_model_config_file
from manyeyes.training.stage import run_stage
from tests.model_toys import write_tokenizer

RESULT = Path(__file__).parent / "results" / "gpu.json"
MFU, MEMORY, DATA_WAIT = 0.4, 0.1, 0.02
RECORDS, STEPS = 64, 12
RATES = {"projector": 2e-5, "language_model": 2e-4}
LORA = {"rank": 128, "alpha": 256}
CASES: dict[str, tuple[StageName, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "lora": ("sft", {"train": RATES, "lora": LORA}),
    "qlora": ("sft", {"train": RATES, "lora": {**LORA, "quantize": "nf4"}}),
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 4}
# Of the GPU's memory, what a case may take by the estimate.
FILLED = 0.85


def write_parts(folder: Path, recipe: Recipe, *, tiny: bool) -> None:
    """A language model of random weights, and a snapshot whose conversations are cut to the greatest length."""
    config = AutoConfig.from_pretrained(
        language_model_config_file(recipe.model.language_model.source, snapshot_path=None), **(TINY if tiny else {})
    )
    write_tokenizer(folder / "lm")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "lm")
    draw, noise = random.Random(0), np.random.default_rng(0)
    records = []
    for number in range(RECORDS):
        # As photographs: 640 x 480, smooth enough to be compressed.
        rough = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        rough.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
        words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(600)]
        turns = (Turn("human", "<image>\n" + " ".join(words[:4])), Turn("gpt", " ".join(words[4:])))
        image = read_image_file(buffer.getvalue(), path=f"{number}.jpg")
        records.append(Record(f"noise/{number}", "noise", (image,), turns))
    write_shards(records, folder / "data" / "noise", "train", rows_per_shard=RECORDS)
    write_snapshot_manifest(folder / "data", provenance={"noise-train": Provenance("CC0-1.0", "made for a benchmark")})


def recipe_of(folder: Path, name: str, *, tiny: bool) -> tuple[Recipe, StageName]:
    """LLaVA-1.5-7B with random weights, its mixture and length changed, and the micro-batch still to be found."""
    stage, changes = CASES[name]
    own: dict[str, Any] = {
        "mixture": [{"dataset": "noise-train"}],
        "too_long": "cut",
        "max_steps": STEPS,
        "template": None,
        **changes,
    }
    encoder: dict[str, Any] = {"name": "clip", "encoder": "clip-l14-336"}
    small: dict[str, Any] = {}
    if tiny:
        encoder = {"name": "clip", "encoder": "vit-tiny-p16-64"}
        small = {"model.fusion.grid": 4, "model.language_model.max_length": 512}
    recipe = change_recipe(
        load_recipe("llava-1.5-7b"),
        {
            "model.encoders": [encoder],
            "model.language_model.source": f"dir:{folder / 'lm'}",
            **small,
            **{f"stages.{stage}.{field}": value for field, value in own.items()},
        },
    )
    return recipe, stage


def run_case(folder: Path, name: str, *, tiny: bool) -> dict[str, Any]:
    """Train some steps at the largest micro-batch that fits; what was seen, and what the estimate says."""
    on_gpu = torch.cuda.is_available()
    capacity = torch.cuda.get_device_properties(0).total_memory / 1e9 if on_gpu else 1.0
    recipe, stage = recipe_of(folder, name, tiny=tiny)
    facts = count_facts(recipe, snapshot_path=folder / "data").stages[stage]
    for size in (1,) if tiny else (32, 16, 8, 4, 2, 1):
        sized = {f"stages.{stage}.{field}": size for field in ("batch_size", "micro_batch_size")}
        recipe = change_recipe(recipe, sized)
        spec = getattr(recipe.stages, stage)
        memory = worst_memory(facts, spec, way_of(spec, 1))
        if memory.total <= FILLED * capacity:
            break
    report = run_stage(
        recipe,
        stage,
        snapshot=open_folder(folder / "data"),
        code_digest="bench",
        out=folder / name,
        work_dir=folder / "work",
        data_workers=4 if on_gpu else 0,
    )
    # The first points hold the warming up.
    late = report.history[len(report.history) // 3 :]
    rates = {
        field: sum(getattr(point, field) for point in late) / len(late)
        for field in ("tokens_per_s", "samples_per_s", "mfu", "data_wait")
    }
    return {
        "case": name,
        "micro_batch": spec.micro_batch_size,
        "tokens": memory.tokens,
        **rates,
        "peak_memory_gb": report.peak_memory_gb,
        "estimated_gb": memory.total,
        "losses": [report.first_loss, report.final_loss],
    }


def main(given: list[str] | None = None) -> int:
    """Run each case; exit 1 where the memory is not what the estimate says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine; nothing is written")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.case:
        print(json.dumps(run_case(arguments.folder, arguments.case, tiny=arguments.tiny)))
        return 0
    if not (arguments.tiny or torch.cuda.is_available()):
        print("SKIPPED: no GPU, and nothing of it was measured", file=sys.stderr)
        return 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    print(f"{device}; MFU {MFU:.0%}, memory within {MEMORY:.0%}, data wait below {DATA_WAIT:.0%} are wanted")
    head = ("micro-batch", 12), ("tokens/s", 11), ("images/s", 10), ("MFU", 8), ("data wait", 11), ("GB (estimate)", 17)
    print(f"{'case':<10}" + "".join(f"{text:>{width}}" for text, width in head))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_parts(folder, load_recipe("llava-1.5-7b"), tiny=arguments.tiny)
        for name in CASES:
            # Each in a process of its own: the highest memory is a process's.
            command = [sys.executable, "-m", "bench.gpu", "--case", name, "--folder", str(folder)]
            command += ["--tiny"] if arguments.tiny else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print(
                f"{name:<10}{row['micro_batch']:>12}{row['tokens_per_s']:>11,.0f}{row['samples_per_s']:>10.1f}"
                f"{row['mfu']:>8.0%}{row['data_wait']:>11.1%}"
                f"{row['peak_memory_gb']:>9.1f} ({row['estimated_gb']:.1f})",
                flush=True,
            )
    if not torch.cuda.is_available():
        return 0
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if not arguments.tiny:
        result = {"device": device, "goals": {"mfu": MFU, "memory": MEMORY, "data_wait": DATA_WAIT}, "cases": found}
        RESULT.write_text(json.dumps({**result, "versions": versions}, indent=2) + "\n", encoding="utf-8")
    off = [row["case"] for row in found if abs(row["peak_memory_gb"] / row["estimated_gb"] - 1) > MEMORY]
    if off and not arguments.tiny:
        print(f"FAILED: the memory of {', '.join(off)} is more than {MEMORY:.0%} off the estimate", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
