"""The model: text and images through the language model, in training and generation.

Shapes: B rows, T tokens, D width of the language model, V vocabulary, I images, N visual tokens an image, R prefixes,
P prefix tokens, Q branches, L branch tokens, C_k channels of encoder k. ``_BTD`` behind a name says so.

Sources: Eagle (arXiv:2408.15998) makes every encoder's input from one normalised tensor by bilinear interpolation with
aligned corners, in fp32, without antialiasing; Mini-Gemini (arXiv:2403.18814) makes the small image from the large one
so, corners not aligned, and cuts its tiles from the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from manyeyes.encoders import Encoder, build_encoder
from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion import run_encoders
from manyeyes.fusion.cross_attention import VisualWindows
from manyeyes.model import branches
from manyeyes.model.branches import BranchAnswers, BranchBatch, BranchOutput, ManyEyesOutput
from manyeyes.model.configuration import EncoderConfig, ManyEyesConfig
from manyeyes.model.connection import (
    Connection,
    VisualTokens,
    build_connection,
    make_visual_tokens,
    place_visual_tokens,
    visual_context,
    window_index,
)
from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.reinjection import VISUAL_CONTEXT, check_read
from manyeyes.model.segments import PACKED_ATTENTION, SEGMENTS, Segments, check_segments_read, enable_packing
from manyeyes.processor import PIXELS, SHARED
from manyeyes.runtime.tiling import TokenLayout


@dataclass(frozen=True)
class SharedPixels:
    """How every encoder's input is made from one normalised tensor.

    Attributes:
        image_size: Pixels a side of that tensor.
        align_corners: Corner pixels keep the place of their centres.
        antialias: Widen the filter when shrinking.
        image_grid: 2 and more: the tensor shows a whole image, and encoders but those of ``whole`` see it as a whole
            and as N times N tiles.
        whole: Encoders, by name, that see whole images.
    """

    image_size: int
    align_corners: bool
    antialias: bool
    image_grid: int = 1
    whole: tuple[str, ...] = ()

    def spread(self, pixels: Tensor, encoder_sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Make every encoder's input.

        Args:
            pixels: ``[I, 3, image_size, image_size]``, normalised.
            encoder_sizes: Pixels a side that each encoder takes, by its name.

        Returns:
            ``[I, 3, size, size]`` for each; with tiles ``[I * (1 + image_grid^2), 3, size, size]``, of each image first
            the whole (made from the canvas that tiles are cut from), then its tiles in rows from the top left.
        """
        return {
            name: self._resample(pixels, size)
            if self.image_grid == 1 or name in self.whole
            else self._tile(pixels, size)
            for name, size in encoder_sizes.items()
        }

    def _tile(self, pixels: Tensor, size: int) -> Tensor:
        grid = self.image_grid
        canvas = self._resample(pixels, size * grid)
        # [I, 3, G, s, G, s] -> [I, G * G, 3, s, s]
        cut = canvas.unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([self._resample(canvas, size)[:, None], cut], dim=1).flatten(0, 1)

    def _resample(self, pixels: Tensor, size: int) -> Tensor:
        if pixels.shape[-1] == size:
            return pixels
        resampled = functional.interpolate(
            pixels.float(),
            size=(size, size),
            mode="bilinear",
            align_corners=self.align_corners,
            antialias=self.antialias,
        )
        return resampled.to(pixels.dtype)


def gather_pixels(
    pixel_values: Mapping[str, Tensor] | None, kwargs: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """Take ``pixel_values.<name>`` keywords together, and give back the other keywords."""
    dotted = {key.removeprefix(PIXELS): value for key, value in kwargs.items() if key.startswith(PIXELS)}
    others = {key: value for key, value in kwargs.items() if not key.startswith(PIXELS)}
    return {**(pixel_values or {}), **dotted} or None, others


def build_encoders(encoders: Sequence[EncoderConfig]) -> nn.ModuleDict:
    """Make the encoders that a configuration names, freshly initialised."""
    return nn.ModuleDict(
        {
            entry.name: build_encoder(
                entry.encoder,
                image_size=entry.image_size,
                small=entry.small,
                architecture=_as_built(entry.architecture),
            )
            for entry in encoders
        }
    )


class ManyEyesParts(PreTrainedModel, ABC):
    """Encoders, fusion, projector and language model; what runs them is ``ManyEyesForConditionalGeneration``."""

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

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the language model over text and images."""

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

    @property
    def encoder_sizes(self) -> dict[str, int]:
        """Pixels a side that each encoder takes, by its name."""
        return {name: encoder.image_size for name, encoder in self._encoder_modules().items()}

    @property
    def shared_pixels(self) -> SharedPixels | None:
        """How every encoder's input is made from one tensor; None where each has its own."""
        shared = self.config.shared_pixels
        if shared is None:
            return None
        layout = self.config.layout or TokenLayout()
        image_grid = layout.image_grid if layout.tiling == "grid" else 1
        return SharedPixels(**shared.model_dump(), image_grid=image_grid, whole=layout.whole)

    def encoder_features(
        self, pixel_values: Mapping[str, Tensor], *, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """First half of ``encode_images``: what a feature cache may keep.

        Args:
            pixel_values: As ``encode_images``, for these encoders.
            names: Encoders to run; all by default. Some alone only where the fusion reaches into none.

        Returns:
            Per encoder name ``[I, C_k, h_k, w_k]``, in recipe order.

        Raises:
            ShapeError: Pixels for other encoders than these.
        """
        encoders = {name: own for name, own in self._encoder_modules().items() if names is None or name in names}
        wanted = [SHARED] if self.shared_pixels else list(encoders)
        if set(pixel_values) != set(wanted):
            raise ShapeError(
                f"pixel_values for {sorted(pixel_values)}", f"for {sorted(wanted)} is needed", "Pass what is needed."
            )
        if self.shared_pixels is not None:
            pixel_values = self.shared_pixels.spread(
                pixel_values[SHARED], {name: self.encoder_sizes[name] for name in encoders}
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
        return make_visual_tokens(maps, self.connection, image_sizes=image_sizes, layout=layout)

    def encode_images(
        self,
        pixel_values: Mapping[str, Tensor],
        *,
        features: Mapping[str, Tensor] | None = None,
        image_sizes: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor | VisualTokens:
        """Encoders, fusion and projector.

        Args:
            pixel_values: Per encoder name ``[I, 3, size, size]``; with tiles, one a tile. One entry ``shared`` where
                the configuration has ``shared_pixels``; then images that are cut into a fixed grid come whole.
            features: Encoders' features that are known, as ``encoder_features`` makes them; the others are run.
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
        known = features or {}
        names = [name for name in self.encoders if name not in known]
        made = self.encoder_features(pixel_values, names=names) if names else {}
        return self.fuse({**known, **made}, image_sizes=image_sizes, layout=layout)

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


def _as_built(architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    # JSON has no tuples, and families compare with them.
    given = (architecture or {}).items()
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given}


def _mark_initialized(module: nn.Module) -> None:
    module._is_hf_initialized = True  # type: ignore[assignment]


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
        segments: Segments | None = kwargs.get(SEGMENTS)
        if segments is not None:
            kwargs[SEGMENTS] = segments = replace(segments)
        outputs = decoder_of(self.language_model)(**kwargs)
        check_read(context, self.reinjection, self.language_model)
        if segments is not None:
            check_segments_read(segments, self.language_model)
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
        segments: Segments | None = None,
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
            segments: Whose each token is, where one row holds several samples; once ``enable_packing`` was called.
            labels: ``[B, T]``, not shifted, -100 where the loss does not count; with labels no logits are returned.
            use_cache: Whether to return the cache.
            logits_to_keep: Logits of the last N positions only, or of these positions; 0 for all.
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
        if segments is not None:
            self._check_packed(inputs_embeds, segments)
            kwargs[SEGMENTS] = segments
            position_ids = segments.positions().to(inputs_embeds.device)
            # transformers leaves a mask of four dimensions as it is; else it would make one of [T, T].
            attention_mask = inputs_embeds.new_zeros(1, 1, 1, 1)
        elif position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
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

    def enable_packing(self, *, longest: int) -> None:
        """Let ``forward`` take ``segments``; all else is computed as before.

        Args:
            longest: Tokens that a sample has at most.

        Raises:
            RecipeError: The language model's attention cannot be packed.
        """
        enable_packing(self.language_model, longest=longest)

    def _check_packed(self, inputs_embeds: Tensor, segments: Segments) -> None:
        if self.language_model.config._attn_implementation != PACKED_ATTENTION:
            raise ShapeError("segments", "attention that looks at them is needed", "Call enable_packing once before.")
        if inputs_embeds.shape[:2] != (1, segments.num_tokens):
            raise ShapeError(
                f"{' x '.join(map(str, inputs_embeds.shape[:2]))} tokens",
                f"one row of {segments.num_tokens}, as segments say, is needed",
                "Make the batch anew.",
            )

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
                "gradient checkpointing is on",
                "branches share a cache, which it drops",
                "Use turns: chained, or packing, which needs no cache.",
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

    def forward_branches(self, batch: BranchBatch) -> BranchOutput:
        """Continue prefixes, each branch on its own: ``manyeyes.model.branches.forward_branches``."""
        return branches.forward_branches(self.language_model, batch)

    def decode_branches(
        self, batch: BranchBatch, *, max_new_tokens: int, stop_token_ids: Sequence[int]
    ) -> BranchAnswers:
        """Answer greedily, every branch on its own: ``manyeyes.model.branches.decode_branches``."""
        return branches.decode_branches(
            self.language_model, batch, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids
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
