"""Put what published recipes cost on 8 to 512 GPUs into docs/scaling.md: ``make docs`` prints the page.

Everything is computed from the shipped facts of ``manyeyes.estimate``; the page states the assumptions.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from manyeyes.estimate import RecipeFacts, counted_fields, facts_key, shipped_facts, way_of, worst_memory
from manyeyes.recipe import StageName, StageSpec, load_recipe
from manyeyes.recipe.partial import take_fields
from manyeyes.sources import language_model_config_file
from manyeyes.storage import hash_file

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- made by docs/scaling.py: begin -->\n", "<!-- made by docs/scaling.py: end -->"
RECIPES = ("llava-1.5-7b", "llava-1.5-13b", "cambrian-1-34b")
NODES = (1, 2, 4, 8, 16, 64)
GPUS_A_NODE, GPU_GB = 8, 80
# Of an H100 SXM, dense bf16; the share of it that training is assumed to reach where nothing is waited for.
PEAK_FLOPS, SHARE = 989e12, 0.4
# What a sum over all GPUs is assumed to reach, bytes a second: inside a node, and between nodes.
INSIDE, BETWEEN = 300e9, 150e9
DOLLARS_AN_HOUR = 2.5


def facts_of(name: str) -> RecipeFacts:
    """What is shipped of a published recipe."""
    recipe = load_recipe(name)
    config = language_model_config_file(recipe.model.language_model.source, snapshot_path=None)
    part = take_fields(recipe, ("model", "stages"), reader="the estimate")
    found = shipped_facts(facts_key(counted_fields(part), hash_file(config)))
    assert found is not None, f"{name} is not counted: run docs/recipes.py"
    return found


def row(facts: RecipeFacts, stage: StageName, spec: StageSpec, nodes: int) -> list[str]:
    """Figures of one stage on so many nodes."""
    gpus = nodes * GPUS_A_NODE
    busy = min(gpus, spec.batch_size)
    branches = facts.stages[stage]
    way = way_of(spec, busy, GPU_GB)
    memory = worst_memory(branches, spec, way).total
    trained = max(sum(branch.trained.values()) for branch in branches)
    total = max(sum(branch.parameters.values()) for branch in branches)
    samples = -(-spec.batch_size // busy)
    compute_s = samples * max(branch.flops for branch in branches) / (PEAK_FLOPS * SHARE)
    sent = 2 * 4 * trained
    frozen = max(sum(branch.frozen_matrices.values()) for branch in branches)
    if spec.shards(
        processes=busy, parameters=total, trained=trained, frozen_matrices=frozen, memory_bytes=GPU_GB * 1e9
    ):
        # Weights in bf16 before and behind, and gradients in fp32, of each micro-batch.
        sent = -(-samples // way.micro_batch) * (2 * 2 * total + 4 * trained)
    step_s = compute_s + sent * (busy - 1) / busy / (INSIDE if nodes == 1 else BETWEEN)
    speed = spec.batch_size / step_s
    tokens = facts.visual_tokens + facts.text_tokens
    hours = 1e6 / speed / 3600
    share = spec.batch_size * max(branch.flops for branch in branches) / (gpus * PEAK_FLOPS * step_s)
    return [
        f"{nodes} x {GPUS_A_NODE}",
        str(samples) if busy == gpus else f"1 on {busy} of {gpus}",
        f"{memory:,.0f}" + ("" if memory <= GPU_GB else " (too much)"),
        f"{tokens * speed:,.0f}",
        f"{share:.0%}",
        f"{hours:,.1f}",
        f"{hours * gpus * DOLLARS_AN_HOUR:,.0f}",
    ]


def render() -> str:
    """The page with its table."""
    head = ["recipe", "stage", "nodes x GPUs", "samples a GPU", "GB a GPU", "tokens/s", "of the peak", "hours", "$"]
    rows = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in RECIPES:
        facts = facts_of(name)
        for stage, spec in load_recipe(name).present_stages():
            for nodes in NODES:
                first = [f"`{name}`", stage] if nodes == NODES[0] else ["", ""]
                rows.append(f"| {' | '.join([*first, *row(facts, stage, spec, nodes)])} |")
    table = BEGIN + "\n".join(rows) + "\n" + END
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), flags=re.DOTALL)
    return pattern.sub(lambda _: table, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.stdout.write(render())
