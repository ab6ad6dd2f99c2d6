"""The model: encoders, fusion and projector in front of a language model, as Hugging Face knows models.

Importing this package registers the model with the Auto classes of transformers.
"""

from manyeyes.model.branches import BranchAnswers, BranchBatch, BranchOutput, ManyEyesOutput
from manyeyes.model.checkpoint import (
    CheckpointManifest,
    build_model,
    build_processor,
    build_skeleton,
    checkpoint_digest,
    load_checkpoint,
    match_checkpoint,
    save_checkpoint,
    write_manifest,
)
from manyeyes.model.configuration import ManyEyesConfig
from manyeyes.model.modeling import ManyEyesForConditionalGeneration, build_encoders
from manyeyes.processor import ManyEyesProcessor

__all__ = [
    "BranchAnswers",
    "BranchBatch",
    "BranchOutput",
    "CheckpointManifest",
    "ManyEyesConfig",
    "ManyEyesForConditionalGeneration",
    "ManyEyesOutput",
    "ManyEyesProcessor",
    "build_encoders",
    "build_model",
    "build_processor",
    "build_skeleton",
    "checkpoint_digest",
    "load_checkpoint",
    "match_checkpoint",
    "save_checkpoint",
    "write_manifest",
]
