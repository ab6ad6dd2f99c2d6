"""The model: text and images through the language model, in training and generation.

Shapes: B rows, T tokens, D width of the language model, V vocabulary, I images, N visual tokens an image, R prefixes,
P prefix tokens, Q branches, L branch tokens. ``_BTD`` behind a name says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion.vision_sampler import VisualWindows
from manyeyes.model import branches
from manyeyes.model.connection import VisualTokens, place_visual_tokens, visual_context, window_index
from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.outputs import BranchAnswers, BranchOutput, ManyEyesOutput
from manyeyes.model.parts import ManyEyesParts
from manyeyes.model.pixels import gather_pixels
from manyeyes.model.reinjection import VISUAL_CONTEXT, check_read


class ManyEyesForConditionalGeneration(ManyEyesParts, GenerationMixin):
    """Several vision encoders, a fusion, a projector and a causal language model."""

    def embed(
        self, input_ids: Tensor, *, visual_tokens: Tensor | VisualTokens | None, image_spans: Tensor | None
    ) -> Tensor:
        """Token embeddings with visual tokens in their places.

        Args:
            input_ids: ``[B, T]``.
            visual_tokens: ``[I, N, D]``.
            image_spans: ``[S, 4]``: row, start and length in tokens, and image; an image may stand in several rows.

        Returns:
            ``[B, T, D]``.

        Raises:
            ShapeError: Spans without visual tokens or the reverse, or a span longer than N.
        """
        return place_visual_tokens(self.get_input_embeddings()(input_ids), visual_tokens, image_spans)

    def _looks(
        self, input_ids: Tensor, visual_tokens: Tensor | VisualTokens | None, image_spans: Tensor | None
    ) -> dict[str, Any]:
        # What reinjection needs besides the embeddings; the index is a tensor, so that generate expands it for beams.
        if not isinstance(visual_tokens, VisualTokens) or image_spans is None or image_spans.shape[0] == 0:
            return {}
        rows, width = input_ids.shape
        index = window_index(visual_tokens, image_spans, rows=rows, width=width)
        return {"visual_windows": visual_tokens.windows, "window_index": index}

    def _decode(
        self, *, visual_windows: VisualWindows | None = None, window_index: Tensor | None = None, **kwargs: Any
    ) -> Any:
        context = visual_context(visual_windows, window_index)
        if context is not None:
            kwargs[VISUAL_CONTEXT] = context
        outputs = decoder_of(self.language_model)(**kwargs)
        check_read(context, self.reinjection, self.language_model)
        return outputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Mapping[str, Tensor] | None = None,
        visual_tokens: Tensor | VisualTokens | None = None,
        image_spans: Tensor | None = None,
        image_sizes: Tensor | None = None,
        layout: Tensor | None = None,
        visual_windows: VisualWindows | None = None,
        window_index: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ManyEyesOutput | tuple[Any, ...]:
        """Run the language model over text and images.

        Args:
            input_ids: ``[B, T]``; anything at image spans.
            attention_mask: ``[B, P + T]``, 1 for real tokens; padding may be on either side.
            position_ids: ``[B, T]``; counted from the mask when left out.
            past_key_values: Cache of P tokens.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``, images already in place.
            pixel_values: Per encoder name ``[I, 3, size, size]``; also taken as ``pixel_values.<name>`` keywords.
            visual_tokens: ``[I, N, D]`` instead of pixels, from ``encode_images``.
            image_spans: ``[S, 4]``: row, start and length in tokens, and image.
            image_sizes: As ``encode_images``.
            layout: As ``encode_images``.
            visual_windows: With ``inputs_embeds`` and reinjection: what visual tokens look at.
            window_index: ``[B, T]``, each position's place in ``visual_windows``; -1 for none.
            labels: ``[B, T]``, not shifted, -100 where the loss does not count; with labels no logits are returned.
            use_cache: Whether to return the cache.
            logits_to_keep: Logits of the last so many positions only, or of these positions; 0 for all.
            num_items_in_batch: Divides the summed loss instead of the number of supervised tokens; 1 gives the sum.
            return_dict: False for a tuple.
            kwargs: Passed on to the language model.

        Returns:
            ``loss`` and ``num_supervised`` with labels, else ``logits`` ``[B, T, V]``; ``past_key_values``.

        Raises:
            ShapeError: Images, spans and tokens do not fit together.
        """
        pixel_values, kwargs = gather_pixels(pixel_values, kwargs)
        if inputs_embeds is None:
            if input_ids is None:
                raise ShapeError("neither input_ids nor inputs_embeds", "one of them is needed", "Pass one.")
            if visual_tokens is None and pixel_values:
                visual_tokens = self.encode_images(pixel_values, image_sizes=image_sizes, layout=layout)
            inputs_embeds = self.embed(input_ids, visual_tokens=visual_tokens, image_spans=image_spans)
            looks = self._looks(input_ids, visual_tokens, image_spans)
        else:
            looks = {"visual_windows": visual_windows, "window_index": window_index}
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = branches.positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        outputs = self._decode(
            **looks,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **{key: value for key, value in kwargs.items() if value is not None},
        )
        hidden_BTD = outputs.last_hidden_state
        loss = num_supervised = logits = None
        if labels is not None:
            loss, num_supervised = branches.summed_loss(self.language_model, hidden_BTD, labels)
            loss = loss / (num_supervised.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = compute_logits(self.language_model, hidden_BTD[:, kept])
        output = ManyEyesOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_supervised=num_supervised,
        )
        return output.to_tuple() if return_dict is False else output

    def prefill_prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        visual_tokens: Tensor | VisualTokens | None,
        image_spans: Tensor | None,
    ) -> Cache:
        """Keys and values of prefixes that several branches share; gradients flow through them.

        Args:
            input_ids: ``[R, P]``, padded on the left; P may be 0.
            attention_mask: ``[R, P]``, 1 for real tokens; a row may be all padding.
            visual_tokens: ``[I, N, D]``.
            image_spans: ``[S, 4]``: row, start and length in tokens, and image.

        Returns:
            A cache of P tokens in R rows. The head is not run.

        Raises:
            ShapeError: As ``embed``.
        """
        if self.training and getattr(decoder_of(self.language_model), "gradient_checkpointing", False):
            # transformers' GradientCheckpointingLayer drops the cache without an error: branches would not see it.
            raise RecipeError(
                "gradient checkpointing is on", "branches share a cache, which it drops", "Use turns: chained."
            )
        cache = DynamicCache(config=self.config.text_config)
        if input_ids.shape[1] > 0:
            self._decode(
                **self._looks(input_ids, visual_tokens, image_spans),
                inputs_embeds=self.embed(input_ids, visual_tokens=visual_tokens, image_spans=image_spans),
                attention_mask=attention_mask,
                position_ids=branches.positions(attention_mask),
                past_key_values=cache,
                use_cache=True,
            )
        return cache

    def forward_branches(
        self,
        prefix_cache: Cache,
        prefix_mask: Tensor,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> BranchOutput:
        """Continue prefixes, each branch on its own: ``manyeyes.model.branches.forward_branches``."""
        return branches.forward_branches(
            self.language_model, prefix_cache, prefix_mask, rows, input_ids, attention_mask, labels
        )

    def decode_branches(
        self,
        prefix_cache: Cache,
        prefix_mask: Tensor,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> BranchAnswers:
        """Answer greedily, every branch on its own: ``manyeyes.model.branches.decode_branches``."""
        return branches.decode_branches(
            self.language_model,
            prefix_cache,
            prefix_mask,
            rows,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        pixel_values: Mapping[str, Tensor] | None = None,
        visual_tokens: Tensor | VisualTokens | None = None,
        image_spans: Tensor | None = None,
        image_sizes: Tensor | None = None,
        layout: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as any Hugging Face model does; images are encoded once, before the first step.

        Args:
            inputs: ``[B, T]`` token ids; also as ``input_ids``. Pad on the left.
            args: As in ``GenerationMixin.generate``.
            pixel_values: Per encoder name ``[I, 3, size, size]``; also as ``pixel_values.<name>`` keywords.
            visual_tokens: ``[I, N, D]`` instead of pixels.
            image_spans: ``[S, 4]``: row, start and length in tokens, and image.
            image_sizes: As ``encode_images``.
            layout: As ``encode_images``.
            kwargs: As in ``GenerationMixin.generate``; ``attention_mask`` belongs to padded batches.

        Returns:
            As ``GenerationMixin.generate``: prompt and answer ids.

        Raises:
            ShapeError: Images, spans and tokens do not fit together.
        """
        pixel_values, kwargs = gather_pixels(pixel_values, kwargs)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is not None and (pixel_values or visual_tokens is not None or image_spans is not None):
            if visual_tokens is None and pixel_values:
                visual_tokens = self.encode_images(pixel_values, image_sizes=image_sizes, layout=layout)
            # generate expands embeddings for beams and returned sequences, but knows nothing of spans.
            kwargs["inputs_embeds"] = self.embed(input_ids, visual_tokens=visual_tokens, image_spans=image_spans)
            kwargs |= self._looks(input_ids, visual_tokens, image_spans)
        return super().generate(input_ids, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does, which looks for ``inputs_embeds`` here; only the first step holds images to look at."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("inputs_embeds") is None:
            inputs.pop("visual_windows", None)
            inputs.pop("window_index", None)
        return inputs
