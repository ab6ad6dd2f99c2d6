"""The parts of the model, and the way of an image through them.

Shapes: I images, N visual tokens an image, D width of the language model; C_k channels of encoder k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from manyeyes.encoders import Encoder, build_encoder
from manyeyes.errors import ShapeError
from manyeyes.fusion import run_encoders
from manyeyes.model.configuration import ManyEyesConfig
from manyeyes.model.connection import Connection, VisualTokens, build_connection, connect
from manyeyes.model.language_model import decoder_of
from manyeyes.model.pixels import SharedPixels
from manyeyes.processor import SHARED
from manyeyes.runtime.tiling import TokenLayout


def build_encoders(encoders: Sequence[Mapping[str, Any]]) -> nn.ModuleDict:
    """Make the encoders that a configuration names, freshly initialised."""
    return nn.ModuleDict(
        {
            entry["name"]: build_encoder(
                entry["encoder"],
                image_size=entry["image_size"],
                small=entry["small"],
                architecture=_as_built(entry.get("architecture")),
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
        layout = TokenLayout.from_dict(self.config.layout or {})
        image_grid = layout.image_grid if layout.tiling == "grid" else 1
        return SharedPixels(**shared, image_grid=image_grid, whole=layout.whole)

    def encoder_features(self, pixel_values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """First half of ``encode_images``: what a feature cache may keep.

        Args:
            pixel_values: As ``encode_images``.

        Returns:
            Per encoder name ``[I, C_k, h_k, w_k]``, in recipe order.

        Raises:
            ShapeError: Pixels for other encoders than the model has.
        """
        encoders = self._encoder_modules()
        wanted = [SHARED] if self.shared_pixels else list(encoders)
        if set(pixel_values) != set(wanted):
            raise ShapeError(
                f"pixel_values for {sorted(pixel_values)}", f"for {sorted(wanted)} is needed", "Pass what is needed."
            )
        if self.shared_pixels is not None:
            pixel_values = self.shared_pixels.spread(pixel_values[SHARED], self.encoder_sizes)
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
            pixel_values: Per encoder name ``[I, 3, size, size]``; with tiles, one a tile. One entry ``shared`` where
                the configuration has ``shared_pixels``; then images that are cut into a fixed grid come whole.
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
