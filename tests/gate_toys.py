"""The gate's rules as the page on the gate writes them: each with every field, so that tests can sweep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PAGE = (Path(__file__).parents[1] / "docs" / "gate.md").read_text(encoding="utf-8")
RULES: list[dict[str, Any]] = yaml.safe_load(PAGE.split("```yaml\n")[1].split("```")[0])["gate"]
