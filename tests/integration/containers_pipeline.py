"""Runs a compiled pipeline with ``kfp.local.DockerRunner``; a process of its own, because kfp.local replaces ``print``.

``python -m tests.integration.containers_pipeline REQUEST.json``; the request has ``pipeline``, ``root``, ``arguments``
and ``environment``. Every container runs as a cluster that trusts nobody would run it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path


def main() -> None:
    from kfp import components, local

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Both concern the local runner only.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task that uses custom or non-Python base")
    warnings.filterwarnings("ignore", message="Task .* have no effect in the current local runner")
    hardened = {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "tmpfs": {"/tmp": "mode=1777", "/work": "mode=1777"},
    }
    # On the host's network, where the servers listen on the loopback. The credentials come through this process's
    # environment and not through the request, which stays on disk.
    environment = {**request["environment"], **{name: os.environ[name] for name in request["secrets"]}}
    runner = local.DockerRunner(network_mode="host", environment=environment, shm_size="1g", **hardened)
    local.init(runner, pipeline_root=request["root"], raise_on_error=True)
    components.load_component_from_file(request["pipeline"])(**request["arguments"])


if __name__ == "__main__":
    main()
