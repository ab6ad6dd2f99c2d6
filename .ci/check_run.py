"""Check the figures that the main job must reach in its summary.json; times are printed, not asserted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Print every figure beside what is needed; exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--cached", action="store_true", help="every step that may be cached must have been")
    arguments = parser.parse_args()
    summary = json.loads(arguments.summary.read_text(encoding="utf-8"))
    card = summary["scorecard"]["easy-vqa"]
    checks = [
        ("questions", card["n"], "9673", card["n"] == 9673),
        ("accuracy, image on", card["score"], "at least 92", card["score"] >= 92),
        ("accuracy, image off", card["image_off"], "60 to 68.5", 60 <= card["image_off"] <= 68.5),
        ("parity, token match", summary["parity"]["token_match"], "1.0", summary["parity"]["token_match"] == 1.0),
        ("gate", summary["gate"]["verdict"], "passed", summary["gate"]["verdict"] == "passed"),
        ("aliases", summary["model"]["aliases"], "champion", "champion" in summary["model"]["aliases"]),
        ("bundle", summary["bundle"]["path"], "exists", (Path(summary["bundle"]["path"]) / "manifest.json").is_file()),
    ]
    if arguments.cached:
        never_cached = {"preflight", "gate", "register", "summarise-run"}
        names = [step["name"].replace("_", "-") for step in summary["steps"] if not step["cached"]]
        ran = [name for name in names if name not in never_cached]
        checks.append(("steps that ran again", ran, "none", not ran))
    for name, found, needed, good in checks:
        print(f"{'ok  ' if good else 'MISS'} {name}: {found} (needed: {needed})")
    share = summary["overhead_s"] / summary["wall_s"]
    print(f"     wall {summary['wall_s']:.0f} s, overhead {summary['overhead_s']:.0f} s ({share:.0%})")
    for step in summary["steps"]:
        print(f"     {step['name']}: {step['seconds']:.1f} s{' (cached)' if step['cached'] else ''}")
    return 0 if all(good for *_, good in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
