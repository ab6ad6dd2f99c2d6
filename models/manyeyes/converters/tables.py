"""Which tensor of a published checkpoint becomes which of ours.

A table is written from our side: a rule says of which stored tensors one of ours is made. What is missing can then be
named as its publisher names it, and what is left over is seen.

The last part is the language model inside a published checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from manyeyes.converters.source import OriginalCheckpoint, read_json
from manyeyes.errors import CheckpointError

Make = Callable[[Sequence[Tensor]], Tensor]
Shape = tuple[int, ...]
_SHOWN = 4


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """The tensor itself, or several joined along the first dimension (query, key and value to ``qkv``)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class Take:
    r"""Makes one of our tensors from stored ones.

    Attributes:
        ours: Regular expression that matches the whole of our key.
        sources: Keys of the stored tensors, with the groups of ``ours`` as in ``re.sub`` (``\1``).
        make: Makes ours from them. It also runs on the meta device, so that shapes are known before anything is read.
        dtype: What ours is stored in; that of its sources when left out.
    """

    ours: str
    sources: tuple[str, ...]
    make: Make = joined_rows
    dtype: torch.dtype | None = None


def scaled(rule: Take, factor: float) -> Take:
    """The same tensor, multiplied; in fp32, since half precision would round it anew."""
    make = rule.make
    return replace(rule, make=lambda parts: make(parts).float() * factor, dtype=torch.float32)


@dataclass(frozen=True)
class Leave:
    """Stored tensors that have no place in our model.

    Attributes:
        original: Regular expression that matches the whole stored key.
        why: Why it is left out, as the report says it.
        recomputed: It is computed anew rather than unused.
    """

    original: str
    why: str
    recomputed: bool = False


@dataclass(frozen=True)
class Refuse:
    """Stored tensors that mean something which our model cannot do.

    Attributes:
        original: Regular expression that matches the whole stored key.
        why: What it means.
        do: What the user can do.
    """

    original: str
    why: str
    do: str


@dataclass(frozen=True)
class Assignment:
    """What one of our tensors is made of.

    Attributes:
        sources: Stored keys.
        make: Makes ours from them.
        dtype: What ours is stored in; None for that of its sources.
    """

    sources: tuple[str, ...]
    make: Make
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Resolution:
    """Every key accounted for.

    Attributes:
        assignments: By our key.
        left: Stored keys that are left out, and why.
    """

    assignments: Mapping[str, Assignment]
    left: Mapping[str, str]


@dataclass(frozen=True)
class KeyTable:
    """Rules of one checkpoint.

    Attributes:
        takes: In order: of the rules that match a key, the first whose sources are all there counts.
        leaves: What may be left over.
        refusals: What must not be there.
    """

    takes: tuple[Take, ...]
    leaves: tuple[Leave, ...] = ()
    refusals: tuple[Refuse, ...] = ()
    _cache: dict[str, re.Pattern[str]] = field(default_factory=dict, repr=False, compare=False)

    def resolve(self, ours: Mapping[str, Shape], stored: Mapping[str, Shape], *, name: str) -> Resolution:
        """Account for every key, before any tensor is read.

        Args:
            ours: Shape of each tensor that our model needs of this checkpoint.
            stored: Shape of each stored tensor.
            name: The checkpoint, for messages.

        Raises:
            CheckpointError: A key is refused, missing, left over or of another shape; all of them are named.
        """
        for rule in self.refusals:
            for key in stored:
                if self._match(rule.original, key):
                    raise CheckpointError(f'{name} has "{key}": {rule.why}', "a model without it", rule.do)
        assignments: dict[str, Assignment] = {}
        missing: list[str] = []
        for key in ours:
            found, absent = self._assign(key, stored)
            if found is None:
                missing += [f'"{source}" (for {key} {list(ours[key])})' for source in absent]
            else:
                assignments[key] = found
        used = {source for assignment in assignments.values() for source in assignment.sources}
        left, extra = {}, []
        for key in stored:
            if key in used:
                continue
            rule_left = next((rule for rule in self.leaves if self._match(rule.original, key)), None)
            if rule_left is None:
                extra.append(f'"{key}" {list(stored[key])}')
            else:
                left[key] = f"{'recomputed' if rule_left.recomputed else 'unused'}: {rule_left.why}"
        misshapen = [
            problem
            for key, assignment in assignments.items()
            if (problem := _misfit(key, ours[key], assignment, stored)) is not None
        ]
        if missing or extra or misshapen:
            parts = (("missing", missing), ("left over", extra), ("misshapen", misshapen))
            raise CheckpointError(
                f"{name}: " + "; ".join(f"{label} {_first(problems)}" for label, problems in parts if problems),
                "every key of its layout and no other, in the shapes that its configuration gives",
                "Check that config.json belongs to these weights, or fetch them again.",
            )
        return Resolution(assignments=assignments, left=left)

    def _assign(self, key: str, stored: Mapping[str, Shape]) -> tuple[Assignment | None, list[str]]:
        absent: list[str] = []
        for rule in self.takes:
            match = self._match(rule.ours, key)
            if match is None:
                continue
            sources = tuple(match.expand(source) for source in rule.sources)
            lacking = [source for source in sources if source not in stored]
            if not lacking:
                return Assignment(sources=sources, make=rule.make, dtype=rule.dtype), []
            absent = absent or lacking
        return None, absent or [f"anything that gives {key}"]

    def _match(self, pattern: str, key: str) -> re.Match[str] | None:
        if pattern not in self._cache:
            self._cache[pattern] = re.compile(pattern)
        return self._cache[pattern].fullmatch(key)


def _misfit(key: str, shape: Shape, assignment: Assignment, stored: Mapping[str, Shape]) -> str | None:
    shapes = [stored[source] for source in assignment.sources]
    given = " and ".join(f'"{source}" {list(size)}' for source, size in zip(assignment.sources, shapes, strict=True))
    try:
        made = tuple(assignment.make([torch.empty(size, device="meta") for size in shapes]).shape)
    except (RuntimeError, IndexError, ValueError):
        return f"{given}, which do not give {key} {list(shape)}"
    return None if made == shape else f"{given}, for {key} {list(shape)}"


def _first(problems: Iterable[str]) -> str:
    listed = list(problems)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def join_tables(*tables: KeyTable) -> KeyTable:
    """One table after the other."""
    return KeyTable(
        takes=tuple(rule for table in tables for rule in table.takes),
        leaves=tuple(rule for table in tables for rule in table.leaves),
        refusals=tuple(rule for table in tables for rule in table.refusals),
    )


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
