"""Ports for servers of tests, which open them seconds after they were chosen."""

from __future__ import annotations

import os
import socket
from itertools import count

# Below the ports that systems give out by themselves (Linux from 32768), so that no connection and no other server
# of this machine takes one before its owner opens it. Each of the runner's processes has a range of its own.
FIRST, RANGE, RANGES = 18000, 2000, 7
_asked = count(os.getpid() * 37)


def free_port() -> int:
    """A port of the loopback at which nobody listens, and which this process was not given before.

    Raises:
        OSError: Every port of the range is taken.
    """
    runner = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % RANGES
    for _ in range(RANGE):
        port = FIRST + runner * RANGE + next(_asked) % RANGE
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {FIRST + runner * RANGE} on")
