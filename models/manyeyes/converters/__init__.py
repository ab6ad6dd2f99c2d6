"""Converters from published checkpoints, one file a system.

``convert`` reads the original layout of a system and writes a checkpoint of ours; ``prompt_logits`` is for checking
one against another. A new system is one file with a ``SYSTEM``, and one line in ``SYSTEMS``.
"""

from __future__ import annotations

from manyeyes.converters import cambrian, eagle, llava, llava_port, mini_gemini
from manyeyes.converters.system import EncoderPlan, Plan, System

__all__ = ["SYSTEMS", "EncoderPlan", "Plan", "System"]

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        llava.SYSTEM,
        llava_port.SYSTEM,
        eagle.SYSTEM,
        cambrian.SYSTEM,
        mini_gemini.SYSTEM,
    )
}
