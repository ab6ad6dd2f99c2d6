"""How much memory a bundle may take."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_SHARE = 0.9
# Memory that a container may use: cgroup v2, then v1. No limit reads "max", or as a number beyond any machine.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def memory_limit() -> int:
    """Bytes: nine tenths of what the machine has, or of what its container may use where that is less."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows does not tell so
        limits = [2**62]
    for name in _CONTAINER_LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return int(_SHARE * min(limits))
