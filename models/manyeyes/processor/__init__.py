"""From images and conversations to one batch for the model.

Pixels come from ``manyeyes.runtime.preprocess`` and tokens from ``manyeyes.runtime.chat``, the same code that a bundle
runs.
"""

from manyeyes.processor.matching import Conversation, Image, Images
from manyeyes.processor.processor import PIXELS, SHARED, CutImage, ManyEyesProcessor

__all__ = ["PIXELS", "SHARED", "Conversation", "CutImage", "Image", "Images", "ManyEyesProcessor"]
