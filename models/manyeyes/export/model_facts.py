"""What a model is in figures: parameters by part, visual tokens and the operations of one sample.

Counting needs the architecture alone and no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from manyeyes.runtime.bundle_contents import ModelFacts

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

__all__ = ["ModelFacts", "count_checkpoint", "count_model"]


def count_model(config: PreTrainedConfig) -> ModelFacts:
    """Count a model by its configuration, on the meta device.

    Args:
        config: Of a ``ManyEyesForConditionalGeneration``; left as it is.
    """
    import copy

    from manyeyes.encoders.weights import meta_device
    from manyeyes.estimate.dry_run import count_forward, image_shape
    from manyeyes.estimate.skeleton import TEXT_TOKENS, count_parameters
    from manyeyes.model import ManyEyesForConditionalGeneration

    with meta_device():
        model = ManyEyesForConditionalGeneration(copy.deepcopy(config)).eval()
    counts = count_parameters(model)
    shape = image_shape(model)
    parts = {f"encoders.{name}": count for name, count in counts.encoders.items()} | {
        "fusion": counts.fusion,
        "projector": counts.projector,
        "language_model": counts.language_model,
        "reinjection": counts.reinjection,
    }
    return ModelFacts(
        parameters=counts.total,
        parts={name: count for name, count in parts.items() if count},
        encoders=list(counts.encoders),
        visual_tokens=shape.tokens,
        flops_per_sample=count_forward(model, shape, text_tokens=TEXT_TOKENS),
        text_tokens=TEXT_TOKENS,
    )


def count_checkpoint(checkpoint: Path) -> ModelFacts:
    """Count the model of a checkpoint's folder; its weights are not read."""
    from transformers import AutoConfig

    import manyeyes.model  # noqa: F401  (registers the Auto classes)

    return count_model(AutoConfig.from_pretrained(checkpoint))
