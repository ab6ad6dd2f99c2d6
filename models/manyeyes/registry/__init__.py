"""MLflow runs and registry, the gate, promotion and pull."""

from __future__ import annotations

import os

# Read by mlflow when it is imported; what a user set stays.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
