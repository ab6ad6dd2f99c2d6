"""Check what a tiny twin's run must leave in its summary.json, whatever it scores."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Print every figure beside what is needed; exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="that the whole command took")
    parser.add_argument("--limit", type=float, required=True, help="seconds that it may take")
    arguments = parser.parse_args()
    summary = json.loads(arguments.summary.read_text(encoding="utf-8"))
    parity, gate, model = summary["parity"], summary["gate"], summary["model"]
    bundle = Path(summary["bundle"]["path"])
    parity_rule = [rule["passed"] for rule in gate["rules"] if rule["rule"] == "parity"]
    checks = [
        ("recipe", summary["recipe"], arguments.recipe, summary["recipe"] == arguments.recipe),
        ("status", summary["status"], "succeeded", summary["status"] == "succeeded"),
        ("parity, token match", parity["token_match"], "1.0", parity["token_match"] == 1.0),
        ("parity, logits", parity["max_abs_logit"], "at most 0.001", parity["max_abs_logit"] <= 1e-3),
        ("gate's parity rule", parity_rule, "passed", parity_rule == [True]),
        ("gate", gate["verdict"], "passed or failed", gate["verdict"] in ("passed", "failed")),
        ("registered", f"{model['name']} version {model['version']}", "a version", bool(model["version"])),
        ("bundle", bundle, "exists", (bundle / "manifest.json").is_file()),
        ("questions", summary["scorecard"]["easy-vqa"]["n"], "200", summary["scorecard"]["easy-vqa"]["n"] == 200),
        ("seconds", arguments.seconds, f"at most {arguments.limit:g}", arguments.seconds <= arguments.limit),
    ]
    for name, found, needed, good in checks:
        print(f"{'ok  ' if good else 'MISS'} {name}: {found} (needed: {needed})")
    return 0 if all(good for *_, good in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
