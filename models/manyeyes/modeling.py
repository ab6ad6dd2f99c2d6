"""The model as Hugging Face sees it: configuration and module.

Shapes: B rows, T tokens, D width of the language model, V vocabulary, I images, N visual tokens an image, R prefixes,
P prefix tokens, Q branches, L branch tokens. ``_BTD`` behind a name says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from manyeyes.chat import IGNORE_INDEX
from manyeyes.connection import (
    Connection,
    VisualTokens,
    build_connection,
    connect,
    span_places,
    visual_context,
    window_index,
)
from manyeyes.encoders import Encoder, build_encoder
from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion import run_encoders
from manyeyes.language_model import compute_logits, decoder_of
from manyeyes.processor import PIXELS
from manyeyes.reinjection import VISUAL_CONTEXT, check_read
from manyeyes.vision_sampler import VisualWindows


class ManyEyesConfig(PreTrainedConfig):
    """What the model is.

    Attributes:
        text_config: The language model's own configuration.
        encoders: Per encoder ``name``, ``encoder`` (row of ENCODERS), ``image_size`` and ``small``.
        fusion: ``strategy`` (row of FUSIONS), ``grid`` and ``options``.
        projector: ``kind``, ``depth`` and ``options``.
        reinjection: ``start``, ``stride`` and ``count``; None when the language model does not look back.
        layout: How an image becomes tiles and its tokens a sequence; None for one tile, its tokens as they are.
        image_token_id: Id that stands where visual tokens go.
    """

    model_type = "manyeyes"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    # None only where transformers makes an empty configuration to learn the defaults.
    text_config: Any = None
    encoders: Any = None
    fusion: Any = None
    projector: Any = None
    reinjection: Any = None
    layout: Any = None
    image_token_id: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


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


def build_encoders(encoders: Sequence[Mapping[str, Any]]) -> nn.ModuleDict:
    """Make the encoders that a configuration names, freshly initialised."""
    return nn.ModuleDict(
        {
            entry["name"]: build_encoder(entry["encoder"], image_size=entry["image_size"], small=entry["small"])
            for entry in encoders
        }
    )


class ManyEyesForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Several vision encoders, a fusion, a projector and a causal language model."""

    config_class = ManyEyesConfig
    config: ManyEyesConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: ManyEyesConfig) -> None:
        super().__init__(config)
        self.encoders = build_encoders(config.encoders)
        self.language_model: PreTrainedModel = AutoModelForCausalLM.from_config(config.text_config)
        self.connect()
        for part in (self.encoders, self.fusion, self.projector, self.reinjection):
            if part is not None and all(tensor.device.type != "meta" for tensor in part.parameters()):
                # Already initialised, each as its own code wants it.
                part.apply(_mark_initialized)
        self.post_init()

    def connect(self) -> None:
        """Make the parts between encoders and language model anew, as the configuration says.

        Raises:
            RecipeError: An unknown name or option, or parts that cannot be combined.
            ShapeError: Grids or widths that do not fit together.
        """
        config, encoders = self.config, self._encoder_modules().values()
        num_layers = self.language_model.config.get_text_config().num_hidden_layers
        parts = build_connection(
            encoder_channels=self.encoder_channels,
            encoder_grids=[encoder.grid for encoder in encoders],
            hidden_size=self.language_model.get_input_embeddings().embedding_dim,
            num_layers=num_layers,
            fusion=config.fusion,
            projector=config.projector,
            reinjection=config.reinjection,
            layout=config.layout,
        )
        self.fusion, self.projector, self.reinjection = parts.fusion, parts.projector, parts.reinjection
        self.newline = parts.newline
        if self.reinjection is not None:
            self.reinjection.attach(decoder_of(self.language_model), num_layers=num_layers)

    @property
    def connection(self) -> Connection:
        """The parts between encoders and language model."""
        return Connection(
            fusion=self.fusion, projector=self.projector, reinjection=self.reinjection, newline=self.newline
        )

    def _encoder_modules(self) -> dict[str, Encoder]:
        return {name: module for name, module in self.encoders.items() if isinstance(module, Encoder)}

    @property
    def encoder_channels(self) -> list[int]:
        """Channels of each encoder's feature map, in recipe order."""
        return [encoder.channels for encoder in self._encoder_modules().values()]

    def _init_weights(self, module: nn.Module) -> None:
        # from_pretrained builds on the meta device: timm's non-persistent buffers (rotary tables, relative position
        # indices) come out of it as uninitialised memory, without a word.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding table."""
        table: nn.Module = self.language_model.get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens an image; with a layout, a tile."""
        return self.projector.num_tokens(self.fusion.num_tokens)

    def encoder_features(self, pixel_values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """First half of ``encode_images``: what a feature cache may keep.

        Args:
            pixel_values: Per encoder name ``[I, 3, size, size]``.

        Returns:
            Per encoder name ``[I, C_k, h_k, w_k]``, in recipe order.

        Raises:
            ShapeError: Pixels for other encoders than the model has.
        """
        encoders = self._encoder_modules()
        if set(pixel_values) != set(encoders):
            raise ShapeError(
                f"pixel_values for {sorted(pixel_values)}", f"for {sorted(encoders)} is needed", "Pass one per encoder."
            )
        maps = run_encoders(self.fusion, list(encoders.values()), [pixel_values[name] for name in encoders])
        return dict(zip(encoders, maps, strict=True))

    def fuse(
        self,
        features: Mapping[str, Tensor],
        *,
        image_sizes: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor | VisualTokens:
        """Second half of ``encode_images``: fusion and projector.

        Args:
            features: Per encoder name ``[I, C_k, h_k, w_k]``.
            image_sizes: As ``encode_images``.
            layout: As ``encode_images``.

        Returns:
            ``[I, N, D]``, visual tokens; with reinjection together with what they can look at.
        """
        maps = [features[name] for name in self.encoders]
        return connect(maps, self.connection, image_sizes=image_sizes, layout=layout)

    def encode_images(
        self,
        pixel_values: Mapping[str, Tensor],
        *,
        image_sizes: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor | VisualTokens:
        """Encoders, fusion and projector.

        Args:
            pixel_values: Per encoder name ``[I, 3, size, size]``; with tiles, one a tile.
            image_sizes: ``[I, 2]``, width and height of each image before it was padded to a square; only where the
                fusion masks padding.
            layout: ``[I, M]``: which token of all tiles' tokens stands at each place of an image, counted over the
                batch; -1 for a newline. As the processor makes it.

        Returns:
            ``[I, N, D]``, visual tokens; with reinjection together with what they can look at. Pass it on as
            ``visual_tokens``.

        Raises:
            ShapeError: Pixels for other encoders than the model has.
        """
        return self.fuse(self.encoder_features(pixel_values), image_sizes=image_sizes, layout=layout)

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
        embeds_BTD: Tensor = self.get_input_embeddings()(input_ids)
        if visual_tokens is not None and image_spans is None:
            raise ShapeError("images without image_spans", "spans say where they go", "Pass both, or neither.")
        if image_spans is None or image_spans.shape[0] == 0:
            return embeds_BTD
        if visual_tokens is None:
            raise ShapeError(
                "image_spans without images", "pixels or visual tokens are needed", "Pass both, or neither."
            )
        if isinstance(visual_tokens, VisualTokens):
            visual_tokens = visual_tokens.tokens
        places, wanted, image = span_places(image_spans, num_tokens=visual_tokens.shape[1], width=embeds_BTD.shape[1])
        values = visual_tokens[image][wanted].to(embeds_BTD.dtype)
        return embeds_BTD.flatten(0, 1).index_put((places,), values).view_as(embeds_BTD)

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
        pixel_values, kwargs = _gather_pixels(pixel_values, kwargs)
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
            position_ids = _positions(attention_mask)[:, -inputs_embeds.shape[1] :]
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
            loss, num_supervised = self._summed_loss(hidden_BTD, labels)
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
                position_ids=_positions(attention_mask),
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
        """Continue prefixes, each branch on its own: it sees its row's prefix and itself.

        Args:
            prefix_cache: From ``prefill_prefix``; not changed.
            prefix_mask: ``[R, P]``, the prefixes' attention mask.
            rows: ``[Q]``, each branch's prefix.
            input_ids: ``[Q, L]``, padded on the right.
            attention_mask: ``[Q, L]``, 1 for real tokens.
            labels: ``[Q, L]``, not shifted, -100 where the loss does not count; never at a branch's first token.

        Returns:
            With labels the summed loss and how many tokens it counts; without, the logits after each branch's last
            token. Divide the sums of a whole optimizer step yourself.

        Raises:
            ShapeError: A branch's first token is supervised.
            RecipeError: The language model's cache cannot be shared.
        """
        if labels is not None and bool((labels[:, :1] != IGNORE_INDEX).any()):
            raise ShapeError(
                "the first token of a branch is supervised",
                "its logits belong to the prefix, which has no head",
                "Leave at least one token in front of the answer.",
            )
        prefix_QP = prefix_mask[rows]
        mask = torch.cat([prefix_QP, attention_mask], dim=1)
        positions = prefix_QP.sum(1, keepdim=True) + _positions(attention_mask)
        cache = _select_rows(prefix_cache, rows)
        hidden_QLD = decoder_of(self.language_model)(
            inputs_embeds=self.get_input_embeddings()(input_ids),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        output = BranchOutput(last_hidden_state=hidden_QLD, past_key_values=cache, attention_mask=mask)
        if labels is not None:
            output.loss, output.num_supervised = self._summed_loss(hidden_QLD, labels)
            return output
        last = attention_mask.sum(1) - 1
        output.logits = compute_logits(self.language_model, hidden_QLD[torch.arange(len(rows)), last])
        return output

    @torch.no_grad()
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
        """Answer greedily, every branch on its own.

        Args:
            prefix_cache: From ``prefill_prefix``; not changed.
            prefix_mask: ``[R, P]``, the prefixes' attention mask.
            rows: ``[Q]``, each branch's prefix.
            input_ids: ``[Q, L]``, padded on the right; they end where the model goes on.
            attention_mask: ``[Q, L]``, 1 for real tokens.
            max_new_tokens: At most so many, at least 1.
            stop_token_ids: Ids that end an answer.

        Returns:
            The same ids as ``generate`` gives without its stop token, and the first logits.
        """
        output = self.forward_branches(prefix_cache, prefix_mask, rows, input_ids, attention_mask)
        assert output.logits is not None
        assert output.attention_mask is not None
        first_logits = logits = output.logits
        mask, cache = output.attention_mask, output.past_key_values
        stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=input_ids.device)
        answers: list[list[int]] = [[] for _ in range(len(rows))]
        running = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
        for step in range(max_new_tokens):
            token_Q = logits.argmax(-1)
            running &= ~torch.isin(token_Q, stops)
            for branch in running.nonzero().flatten().tolist():
                answers[branch].append(int(token_Q[branch]))
            if step + 1 == max_new_tokens or not bool(running.any()):
                break
            positions = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden_Q1D = decoder_of(self.language_model)(
                inputs_embeds=self.get_input_embeddings()(token_Q[:, None]),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = compute_logits(self.language_model, hidden_Q1D[:, 0])
        return BranchAnswers(token_ids=answers, first_logits=first_logits)

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
        pixel_values, kwargs = _gather_pixels(pixel_values, kwargs)
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

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by the names that a recipe's ``train`` uses; a tied parameter stands once.

        Returns:
            ``encoders.<name>`` for each encoder, ``fusion`` (with reinjection), ``projector`` (with the newline),
            ``language_model``; (full name, parameter).
        """
        homes = {"reinjection": "fusion", "newline": "projector"}
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {f"encoders.{name}": [] for name in self.encoders}
        groups |= {"fusion": [], "projector": [], "language_model": []}
        for name, parameter in self.named_parameters():
            first, _, rest = name.partition(".")
            home = f"encoders.{rest.partition('.')[0]}" if first == "encoders" else homes.get(first, first)
            groups[home].append((name, parameter))
        return groups

    def _summed_loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        # Only supervised positions reach the head: with a large vocabulary it is the dearest layer of all.
        targets = labels_BT[:, 1:]
        counted = targets != IGNORE_INDEX
        logits = compute_logits(self.language_model, hidden_BTD[:, :-1][counted]).float()
        loss = functional.cross_entropy(logits, targets[counted], reduction="sum")
        return loss, counted.sum()


def _mark_initialized(module: nn.Module) -> None:
    module._is_hf_initialized = True  # type: ignore[assignment]


def _positions(mask: Tensor) -> Tensor:
    """Positions that do not depend on padding, ``[B, T]`` from a mask ``[B, T]``."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _gather_pixels(
    pixel_values: Mapping[str, Tensor] | None, kwargs: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    dotted = {key.removeprefix(PIXELS): value for key, value in kwargs.items() if key.startswith(PIXELS)}
    others = {key: value for key, value in kwargs.items() if not key.startswith(PIXELS)}
    return {**(pixel_values or {}), **dotted} or None, others


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    # An embedding lookup, because its backward adds whole rows; index_select's adds element by element on a CPU.
    taken: Tensor = functional.embedding(rows, tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    return taken


def _select_rows(cache: Cache, rows: Tensor) -> DynamicCache:
    """A cache whose row q is row ``rows[q]`` of another; differentiable, and the other stays as it is."""
    selected = DynamicCache()
    for layer in cache.layers:
        # Not isinstance: hybrid layers are DynamicLayers too, with a recurrent state that would keep its old rows.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise RecipeError(
                f"the language model caches {type(layer).__name__}",
                "branches need keys and values of attention",
                "Use turns: chained with this language model.",
            )
        own = copy.copy(layer)
        if layer.is_initialized:
            own.keys, own.values = _take_rows(layer.keys, rows), _take_rows(layer.values, rows)
        selected.layers.append(own)
    return selected
