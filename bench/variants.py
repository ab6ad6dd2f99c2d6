"""``python -m bench.variants [RECIPE ...]``: what int8 and int4 cost the tiny twins, through the whole pipeline.

Each twin trains on a share of its images, so that it knows some and not all, is exported in fp32, int8 and int4, and
every variant answers the same test questions. The table has what is right, the gate's own comparison with the
checkpoint (paired by question, clustered by image), the answers that are equal token for token, and the graphs' bytes.
Exit code 1: a variant is more than a point below the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from bench import RESULTS
from manyeyes.recipe import load_recipe
from manyeyes.runtime.bundle_contents import read_manifest

ROOT = Path(__file__).resolve().parents[1]
TWINS = ("tiny-llava", "tiny-eagle-x5", "tiny-cambrian", "tiny-mini-gemini", "tiny-mini-gemini-hd")
VARIANTS = {
    "int8": {"vision": "int8", "embed": "int8", "decoder": "int8"},
    "int4": {"vision": "int8", "embed": "int4", "decoder": "int4"},
    "int4-all": {"vision": "int4", "embed": "int4", "decoder": "int4"},
}
MOST_LOST = 1.0


def write_recipe(twin: str, folder: Path, *, images: int, items: int) -> Path:
    """The twin with the variants, and a gate that compares them."""
    values = load_recipe(twin).model_dump(mode="json")
    for stage in values["stages"].values():
        if stage:
            stage["max_samples"] = images
    values["stages"]["sft"]["epochs"] = 1
    values["evaluation"]["max_items"] = items
    values["export"]["variants"] = VARIANTS
    values["gate"].append({"rule": "precision", "margin": -MOST_LOST})
    path = folder / f"{twin}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def measure(twin: str, folder: Path, *, images: int, items: int) -> dict[str, Any]:
    """Scores, answers and bytes of each variant of a twin that was trained for this."""
    recipe = write_recipe(twin, folder, images=images, items=items)
    program = [str(Path(sys.executable).with_name("manyeyes")), "run", "train", "--recipe", str(recipe)]
    subprocess.run(program, cwd=ROOT, check=True)
    summary = json.loads((ROOT / "runs" / "latest" / "summary.json").read_text(encoding="utf-8"))
    score = summary["scorecard"]["easy-vqa"]["score"]
    manifest = read_manifest(Path(summary["bundle"]["path"]))
    graphs = {name for own in manifest["variants"]["default"]["graphs"].values() for name in own}
    (rule,) = [rule for rule in summary["gate"]["rules"] if rule["rule"] == "precision"]
    return {
        "recipe": twin,
        "checkpoint": score,
        "fp32": {
            "score": summary["bundle_scorecard"]["easy-vqa"]["score"],
            "bytes": sum(manifest["files"][name]["bytes"] for name in graphs),
        },
        **{
            name: {
                "score": own["scores"]["easy-vqa"]["score"],
                "lost": score - own["scores"]["easy-vqa"]["score"],
                "token_match": own["token_match"],
                "bytes": own["bytes"],
            }
            for name, own in summary["variants"].items()
        },
        "compared": rule["found"],
    }


def main() -> int:
    """Measure every twin that was asked for; 1 where a variant loses more than a point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=TWINS)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "variants.json")
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "bench" / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {"images": arguments.images, "items": arguments.items, "most_lost": MOST_LOST, "twins": rows}
    for twin in arguments.recipes:
        rows.append(measure(twin, folder, images=arguments.images, items=arguments.items))
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(rows[-1], indent=2))
    return int(any(row[name]["lost"] > MOST_LOST for row in rows for name in VARIANTS))


if __name__ == "__main__":
    sys.exit(main())
