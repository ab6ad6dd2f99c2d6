"""What the model gives back.

Shapes: Q branches, L branch tokens, P prefix tokens, D width of the language model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class ManyEyesOutput(CausalLMOutputWithPast):
    """Output of ``forward``; ``num_supervised`` counts the tokens behind ``loss``."""

    num_supervised: Tensor | None = None


@dataclass
class BranchOutput(ModelOutput):
    """Output of ``forward_branches``.

    Attributes:
        loss: Sum over supervised tokens, with labels.
        num_supervised: How many there are, with labels.
        logits: ``[Q, V]`` after the last token of each branch, without labels.
        last_hidden_state: ``[Q, L, D]``.
        past_key_values: Prefix and branch, to go on from.
        attention_mask: ``[Q, P + L]`` over that cache.
    """

    loss: Tensor | None = None
    num_supervised: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class BranchAnswers:
    """Greedy answers of ``decode_branches``.

    Attributes:
        token_ids: Per branch the generated ids, the stop token left out.
        first_logits: ``[Q, V]``, before the first generated token.
    """

    token_ids: list[list[int]]
    first_logits: Tensor
