"""ManyEyes: multimodal language models that look at an image through several vision encoders.

Importing this package loads nothing heavy. ``import manyeyes.model`` registers the Auto classes of transformers.
"""

from manyeyes.telemetry import switch_off

switch_off()

__version__ = "0.1.0"
