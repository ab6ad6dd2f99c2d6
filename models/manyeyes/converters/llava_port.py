"""LLaVA as transformers has it (``llava-hf/...``): the same model under other keys.

Code: transformers ``LlavaForConditionalGeneration`` (Apache-2.0). Two generations of its keys exist: the language model
under ``language_model.model.``, and since 4.52 under ``model.language_model.``. Images are cropped, not padded, unless
the image processor says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyeyes.converters.clip import clip_row, clip_table, plan_clip
from manyeyes.converters.llava import DEFAULT_MAX_LENGTH, ENCODER
from manyeyes.converters.source import OriginalCheckpoint, read_json
from manyeyes.converters.system import EncoderSources, FoundEncoder, Plan, System
from manyeyes.converters.tables import KeyTable, Leave, Take, join_tables, language_table, plan_text_config
from manyeyes.errors import CheckpointError
from manyeyes.recipe import FusionSpec, ProjectorSpec

_MARKER = "embeddings.class_embedding"
_LONGEST = 1_000_000


def recognises(config: Mapping[str, Any]) -> bool:
    """Transformers' own configuration nests those of its parts."""
    return config.get("model_type") == "llava" and all(
        isinstance(config.get(part), dict) for part in ("text_config", "vision_config")
    )


def plan(checkpoint: OriginalCheckpoint, encoders: EncoderSources) -> Plan:
    """Read configuration and shapes."""
    config = checkpoint.config()
    _check_supported(config)
    renewed = checkpoint.has("model.language_model.")
    inner = "model.language_model." if renewed else "language_model.model."
    head = "lm_head.weight" if checkpoint.has("lm_head.") else "language_model.lm_head.weight"
    outer = "model." if checkpoint.has("model.multi_modal_projector.") else ""
    text_config = plan_text_config(
        checkpoint,
        str(config["text_config"].get("model_type", "llama")),
        fields=config["text_config"],
        embeddings=inner + "embed_tokens.weight",
    )
    stored = checkpoint.shapes()
    prefix = next((key.removesuffix(_MARKER) for key in stored if key.endswith(_MARKER)), None)
    if prefix is None:
        raise CheckpointError(f'{checkpoint.path} has no "{_MARKER}"', "its vision tower", "Fetch it again.")
    preprocessor = _preprocessor(checkpoint)
    # Its tower's configuration is part of its own; one that is given wins.
    given = encoders.find(ENCODER, published="vision_config", row="clip-l14-336")
    found = FoundEncoder(ENCODER, "vision_config", given.config or config["vision_config"], preprocessor, None)
    encoder = plan_clip(
        found,
        row=clip_row("", stored, prefix),
        fit="pad" if preprocessor.get("do_pad") else "crop",
        select_layer=int(config.get("vision_feature_layer", -2)),
        stored=stored,
        prefix=prefix,
    )
    tied = bool(text_config.get("tie_word_embeddings"))
    projector = Take(r"projector\.layers\.(linear_[12])\.(weight|bias)", (outer + r"multi_modal_projector.\1.\2",))
    language = KeyTable(
        takes=(
            Take(r"language_model\.lm_head\.weight", (head,)),
            Take(r"language_model\.model\.(.*)", (inner + r"\1",)),
        )
    )
    return Plan(
        text_config=text_config,
        encoders=(encoder,),
        fusion=FusionSpec(grid=encoder.image_size // int(encoder.architecture.get("patch_size", 14))),
        projector=ProjectorSpec(kind="mlp", depth=2),
        keys=join_tables(
            language,
            KeyTable(takes=(projector,), leaves=(Leave(r".*image_newline", "one tile, no rows"),)),
            clip_table(ENCODER, prefix=prefix, plan=encoder),
            KeyTable(takes=(), leaves=language_table(tied=tied).leaves),
        ),
        template="vicuna_v1" if text_config["model_type"] == "llama" else "mistral",
        max_length=_max_length(checkpoint, text_config),
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    refused = {
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default") != "default",
        "vision_feature_layer": not isinstance(config.get("vision_feature_layer", -2), int),
        "projector_hidden_act": config.get("projector_hidden_act", "gelu") != "gelu",
        "multimodal_projector_bias": config.get("multimodal_projector_bias", True) is not True,
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"config.json has {field} {config[field]!r}",
                "one layer's patches without the class token, and a projector of two linear layers with bias and gelu",
                "This checkpoint cannot be converted.",
            )


def _preprocessor(checkpoint: OriginalCheckpoint) -> Mapping[str, Any]:
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (checkpoint.path / name).is_file():
            values = read_json(checkpoint.path / name)
            nested = values if part is None else values.get(part)
            if isinstance(nested, dict):
                return nested
    return {}


def _max_length(checkpoint: OriginalCheckpoint, text_config: Mapping[str, Any]) -> int:
    settings = checkpoint.tokenizer_path / "tokenizer_config.json"
    longest = read_json(settings).get("model_max_length") if settings.is_file() else None
    if isinstance(longest, int | float) and longest < _LONGEST:
        return int(longest)
    return int(text_config.get("max_position_embeddings") or DEFAULT_MAX_LENGTH)


SYSTEM = System(
    name="llava-hf",
    recognises=recognises,
    plan=plan,
    describes="model_type llava with text_config and vision_config (transformers' port)",
)
