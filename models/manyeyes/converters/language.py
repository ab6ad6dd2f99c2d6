"""The language model inside a published checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from manyeyes.converters.source import OriginalCheckpoint, read_json
from manyeyes.converters.tables import KeyTable, Leave, Take, scaled
from manyeyes.errors import CheckpointError

# Fields of older configurations that transformers' own read, though a fresh one does not show them.
_OLDER = ("rope_theta", "rope_scaling")
_NOT_THE_MODELS = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def plan_text_config(
    checkpoint: OriginalCheckpoint,
    model_type: str,
    *,
    fields: Mapping[str, Any] | None = None,
    embeddings: str = "model.embed_tokens.weight",
) -> dict[str, Any]:
    """The language model's configuration, without the fields of what was built around it.

    Args:
        checkpoint: The whole.
        model_type: What transformers calls the language model, such as ``llama``.
        fields: Where its fields are; the checkpoint's ``config.json`` by default.
        embeddings: Key of its embedding table, whose rows say how large the vocabulary is.

    Raises:
        CheckpointError: No embedding table.
    """
    given = checkpoint.config() if fields is None else fields
    known = {*AutoConfig.for_model(model_type).to_dict(), *_OLDER} - {*_NOT_THE_MODELS}
    shape = checkpoint.shapes().get(embeddings)
    if shape is None or len(shape) != 2:
        raise CheckpointError(
            f'{checkpoint.path} has no "{embeddings}"',
            "the weights of its language model",
            "Fetch the whole checkpoint; for a projector or an adapter alone pass --base FOLDER.",
        )
    config = {key: value for key, value in given.items() if key in known}
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < shape[0]:
        # Written where a tokenizer had no padding token (-1); an embedding table refuses it.
        del config["pad_token_id"]
    # Config.json lags behind where tokens were added (Eagle on Llama 3).
    return {**config, "model_type": model_type, "vocab_size": shape[0]}


def image_factor(text_config: Mapping[str, Any]) -> float:
    """What visual tokens of published code are multiplied by before the first layer.

    The Gemma of transformers 4 multiplies everything that enters it by the root of its width, visual tokens too; that
    of transformers 5 only what comes out of its embedding table.

    Args:
        text_config: From ``plan_text_config``.
    """
    if text_config["model_type"] != "gemma":
        return 1.0
    return math.sqrt(AutoConfig.for_model(**text_config).hidden_size)


def scale_last(table: KeyTable, factor: float) -> KeyTable:
    """A projector's rules, its last layer multiplied.

    Raises:
        CheckpointError: It has no layer.
    """
    if factor == 1.0:
        return table
    if not table.takes:
        raise CheckpointError(
            "config.json has no layer between fusion and language model, which multiplies what it is given",
            "mm_projector_type linear or mlp<N>x_gelu",
            "It cannot be converted.",
        )
    *others, last = table.takes
    return replace(table, takes=(*others, scaled(last, factor)))


def language_table(*, tied: bool = False, inner: str = r"\1") -> KeyTable:
    r"""Rules for a language model whose keys are transformers' own.

    Args:
        tied: The head shares the embedding table; a copy of it is left out.
        inner: The stored key, ``\1`` being the language model's own.
    """
    leaves = [Leave(r".*rotary_emb\.inv_freq", "rotary frequencies follow from the configuration", recomputed=True)]
    if tied:
        leaves.append(Leave(r".*lm_head\.weight", "the head shares the embedding table"))
    return KeyTable(takes=(Take(r"language_model\.(.*)", (inner,)),), leaves=tuple(leaves))


def added_tokens(checkpoint: OriginalCheckpoint) -> frozenset[str]:
    """Tokens that its tokenizer holds beside its vocabulary of text, such as ``<|im_start|>``.

    They tell which markup a language model was trained on, where no configuration does.
    """
    folder, found = checkpoint.tokenizer_path, set()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name)
        if name == "added_tokens.json":
            found |= set(values)
        listed = values.get("added_tokens") or list((values.get("added_tokens_decoder") or {}).values())
        found |= {entry["content"] for entry in listed if isinstance(entry, dict) and "content" in entry}
    return frozenset(found)
