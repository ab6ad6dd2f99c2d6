"""Nothing is reported to anybody: the telemetry of packages that this one uses is off before they are imported.

``manyeyes/__init__.py`` calls ``switch_off``, because most packages read their variable when they are imported. A
variable that a user has set stays as it is.
"""

from __future__ import annotations

import os

OFF = {
    # ONNX Runtime otherwise makes a device id and a queue of events below ~/.cache/Microsoft when it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    # huggingface_hub, and with it transformers, diffusers, datasets and timm.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    # iterative_telemetry, which DVC brings along.
    "ITERATIVE_DO_NOT_TRACK": "1",
}


def switch_off() -> None:
    """Set what is not set yet; child processes inherit it."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
