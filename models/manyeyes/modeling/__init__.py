"""The model as Hugging Face sees it: configuration and module."""

from manyeyes.modeling.configuration import ManyEyesConfig
from manyeyes.modeling.model import ManyEyesForConditionalGeneration
from manyeyes.modeling.outputs import BranchAnswers, BranchOutput, ManyEyesOutput
from manyeyes.modeling.parts import build_encoders

__all__ = [
    "BranchAnswers",
    "BranchOutput",
    "ManyEyesConfig",
    "ManyEyesForConditionalGeneration",
    "ManyEyesOutput",
    "build_encoders",
]
