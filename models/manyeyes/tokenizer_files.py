"""Tokenizers from their files, as the Rust library ``tokenizers`` runs them, which a bundle needs.

Most published checkpoints hold a sentencepiece model (``tokenizer.model``) alone, and their code ran sentencepiece on
it. It is read here without sentencepiece's or protobuf's Python packages: transformers 5.23 needs both to convert one,
and their versions must agree to the letter (https://protobuf.dev/support/cross-version-runtime-guarantee). A
``tokenizer.json`` is taken as it is; transformers would build some classes (Llama's) anew from its parts.

Source: ``sentencepiece_model.proto`` of github.com/google/sentencepiece (Apache-2.0) for the numbers of fields.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from manyeyes.errors import CheckpointError, SourceError
from manyeyes.runtime.tokenizer import library_errors, read_tokenizer
from manyeyes.storage import read_json_file

RUST_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
_SPACE = "▁"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_BPE = 2
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_LONGEST = 1_000_000
# Without a vocabulary beside them transformers makes an empty tokenizer of these.
_SETTINGS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")


@dataclass
class SentencePieceModel:
    """What is needed of a ``tokenizer.model``.

    Attributes:
        pieces: Text, score and kind of each piece, by its id.
        is_bpe: Pieces are joined by merges; else the likeliest split is taken (unigram).
        byte_fallback: Characters without a piece become bytes.
        charsmap: Compiled normalisation; empty for none.
        add_dummy_prefix: A space is put in front of a text.
        remove_extra_whitespaces: Runs of spaces become one.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    is_bpe: bool = False
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a Hugging Face folder, and make sure that it can pad.

    Transformers reads it, but for a ``tokenizer.model`` alone, which it can convert only with packages that are not
    needed here.

    Raises:
        SourceError: Not readable, or not one that the Rust library ``tokenizers`` runs, which a bundle needs.
        CheckpointError: A ``tokenizer.model`` that cannot be read.
    """
    if (path / MODEL_FILE).is_file() and not (path / RUST_FILE).is_file():
        return load_published_tokenizer(path)
    return _load_by_transformers(path)


def load_published_tokenizer(folder: Path, *, model_type: str | None = None) -> PreTrainedTokenizerBase:
    """Read a published tokenizer, whichever files it has.

    Args:
        folder: Holds ``tokenizer.json``, ``tokenizer.model``, or what transformers can convert.
        model_type: The language model's, for those last; None where the tokenizer's own files say enough.

    Returns:
        A tokenizer that can pad, and whose ids are those of the publisher's code.

    Raises:
        CheckpointError: No tokenizer, or one that cannot be read.
        SourceError: Transformers cannot convert it.
    """
    settings = _read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    _check_settings(folder, settings)
    spaces_text = False
    if (folder / RUST_FILE).is_file():
        tokenizer = read_tokenizer(folder / RUST_FILE, error=CheckpointError)
        # Llama's and Gemma's fast classes put in front what their settings say, whatever the file says.
        resets_bos = "add_bos_token" in settings and str(settings.get("tokenizer_class", "")).startswith(
            ("Llama", "Gemma", "CodeLlama")
        )
    elif (folder / MODEL_FILE).is_file():
        tokenizer = build_sentencepiece(
            parse_sentencepiece((folder / MODEL_FILE).read_bytes(), name=str(folder / MODEL_FILE)),
            legacy=settings.get("legacy") is not False,
            described=_described(settings),
        )
        # Llama's newer rule: a space in front of the whole text, and no other.
        spaces_text = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace)
        resets_bos = True
    else:
        return _convert_by_transformers(folder, model_type)
    names = _named_tokens(folder, settings, tokenizer)
    added = _add_tokens(tokenizer, folder, settings, behind_normalizer=spaces_text)
    marks = [token for token in added if token not in {*names.values(), *_more_specials(folder, settings)}]
    if spaces_text:
        _space_start(tokenizer, marks)
    if resets_bos:
        _set_bos(tokenizer, names, settings)
    longest = settings.get("model_max_length")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        **({"model_max_length": int(longest)} if isinstance(longest, int | float) and longest < _LONGEST else {}),
        **_chat_template(folder, settings),
    )
    if fast.pad_token_id is None:
        fast.pad_token = fast.unk_token or fast.eos_token or fast.convert_ids_to_tokens(0)
    return fast


def parse_sentencepiece(data: bytes, *, name: str) -> SentencePieceModel:
    """Read a serialised ``ModelProto``.

    Raises:
        CheckpointError: Truncated, or something else.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
                model.is_bpe = trainer.get(3, 1) == _BPE
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                model.charsmap = bytes(normalizer.get(2, b""))
                model.add_dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read ({error})", "a sentencepiece model", "Fetch it again.") from error
    if not model.pieces:
        raise CheckpointError(f"{name} has no pieces", "a sentencepiece model", "Fetch it again.")
    return model


def build_sentencepiece(
    model: SentencePieceModel, *, legacy: bool, described: Mapping[str, Mapping[str, Any]] | None = None
) -> Tokenizer:
    """The same ids by the Rust library.

    Args:
        model: From ``parse_sentencepiece``.
        legacy: Llama's older rule: the text behind a special token gets a space in front too, not the first alone.
        described: By token, how ``tokenizer_config.json`` has it found in a text.
    """
    ids = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
    unknown = next((number for number, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN), None)
    if model.is_bpe:
        unknown_piece = model.pieces[unknown][0] if unknown is not None else None
        core: Any = models.BPE(
            vocab=ids,
            merges=_merges(model, ids),
            unk_token=unknown_piece,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    else:
        scored = [(piece, score) for piece, score, _ in model.pieces]
        core = models.Unigram(scored, unk_id=unknown, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    spaces_text = model.add_dummy_prefix and not legacy
    if not spaces_text:
        steps.append(normalizers.Replace(" ", _SPACE))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    marks = [(piece, kind) for piece, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    for piece, kind in marks:
        entry = (described or {}).get(piece, {})
        added = _added(piece, entry, special=kind != _USER_DEFINED, normalized=spaces_text)
        if kind == _USER_DEFINED:
            tokenizer.add_tokens([added])
        else:
            tokenizer.add_special_tokens([added])
    return tokenizer


def _merges(model: SentencePieceModel, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    # Sentencepiece joins the pair whose whole scores highest; every way to split a piece is a pair.
    found = []
    for piece, score, _ in model.pieces:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted(
            (pair for pair in pairs if pair[0] in ids and pair[1] in ids), key=lambda pair: (ids[pair[0]], ids[pair[1]])
        )
        found += [(score, pair) for pair in known]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]


def _piece(data: bytes) -> tuple[str, float, int]:
    values = dict(_fields(data))
    score = struct.unpack("<f", values[2])[0] if 2 in values else 0.0
    return bytes(values[1]).decode("utf-8"), float(score), int(values.get(3, 1))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an integer, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7

    while place < len(data):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            if kind != 2:
                raise ValueError(f"no field of kind {kind}")
            length = varint()
        if place + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[place : place + length]
        place += length


def _read_object(file: Path) -> dict[str, Any]:
    values = read_json_file(file, error=CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {type(values).__name__}", "a JSON object", "Fetch it again.")
    return values


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    listed = settings.get("added_tokens_decoder") or {}
    fits = isinstance(listed, dict) and all(
        number.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
        for number, entry in listed.items()
    )
    if not fits:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} has added_tokens_decoder {str(listed)[:60]}",
            "an object of ids with the content of each token",
            "Fetch it again.",
        )


def _named_tokens(folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    file = folder / "special_tokens_map.json"
    given = {**(_read_object(file) if file.is_file() else {}), **settings}
    names = {}
    for name in _NAMED:
        token = given.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            names[name] = token
    # Llama's class has these where no file says otherwise.
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        if name not in given and tokenizer.token_to_id(token) is not None:
            names[name] = token
    return names


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    # Newer releases keep it in a file of its own, which wins.
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"chat_template": file.read_text(encoding="utf-8", errors="replace")}
    template = settings.get("chat_template")
    return {"chat_template": template} if isinstance(template, str) else {}


def _space_start(tokenizer: Tokenizer, marks: Sequence[str]) -> None:
    # The published code puts a space in front of the whole text before it looks for marks, so that one that starts with
    # a mark, or with a space, starts with a space of its own; bos, eos and the like it takes away again. Metaspace puts
    # one in front of the first piece of text alone. Marks are looked for behind this normaliser, which also
    # normalises them: it leaves a mark that stands alone as it is.
    starts = "|".join([*(re.escape(mark) + "(?m:.)" for mark in marks), " "])
    own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([*own, normalizers.Replace(Regex(rf"\A(?={starts})"), _SPACE)])


def _add_tokens(
    tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any], *, behind_normalizer: bool
) -> list[str]:
    """Add tokens that stand beside the vocabulary, and return them."""
    file = folder / "added_tokens.json"
    wanted = _read_object(file) if file.is_file() else {}
    if not all(isinstance(number, int) for number in wanted.values()):
        raise CheckpointError(
            f"{file} has {str(wanted)[:60]}", "an id, a whole number, for each token", "Fetch it again."
        )
    described = _described(settings)
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        wanted.setdefault(entry["content"], int(number))
    added: list[str] = []
    for token, number in sorted(wanted.items(), key=lambda entry: entry[1]):
        if tokenizer.token_to_id(token) is None:
            entry = described.get(token, {})
            special = bool(entry.get("special", True))
            tokenizer.add_special_tokens([_added(token, entry, special=special, normalized=behind_normalizer)])
            added.append(token)
        found = tokenizer.token_to_id(token)
        if found != number:
            raise CheckpointError(
                f'tokenizer in {folder} gives "{token}" the id {found}',
                f"{number}, as its files say",
                "Fetch it again.",
            )
    return added


def _more_specials(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    file = folder / "special_tokens_map.json"
    given = {**(_read_object(file) if file.is_file() else {}), **settings}
    listed = given.get("additional_special_tokens") or []
    return [str(entry["content"] if isinstance(entry, dict) else entry) for entry in listed]


def _described(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {entry["content"]: entry for entry in (settings.get("added_tokens_decoder") or {}).values()}


def _added(token: str, entry: Mapping[str, Any], *, special: bool, normalized: bool = False) -> AddedToken:
    # Phi-3's marks take the white space behind them along, line breaks of the template included.
    strips = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(token, normalized=normalized, special=special, **strips)


def _set_bos(tokenizer: Tokenizer, names: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    bos, eos = names.get("bos_token"), names.get("eos_token")
    before = f"{bos}:0 " if bos and settings.get("add_bos_token", True) else ""
    after = f" {eos}:0" if eos and settings.get("add_eos_token", False) else ""
    specials = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A:0{after}",
        pair=f"{before}$A:0{after} {before}$B:0{after}",
        special_tokens=[(token, number) for token, number in specials if number is not None],
    )


def _convert_by_transformers(folder: Path, model_type: str | None) -> PreTrainedTokenizerBase:
    # Beside config.json transformers would look for the kind of the whole model, which it does not know or takes for
    # another; only the language model's kind matters.
    with tempfile.TemporaryDirectory() as own:
        for pattern in _FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, Path(own) / file.name)
        if {file.name for file in Path(own).iterdir()} <= _SETTINGS:
            raise CheckpointError(
                f"{folder} has no tokenizer", "tokenizer.model or tokenizer.json", "Fetch the checkpoint again, whole."
            )
        if model_type is not None:
            (Path(own) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        tokenizer = _load_by_transformers(Path(own))
    tokenizer.name_or_path = ""
    return tokenizer


def _load_by_transformers(path: Path) -> PreTrainedTokenizerBase:
    try:
        with library_errors(SourceError, found=f"tokenizer in {path} cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise SourceError(f"tokenizer in {path} cannot be read ({error})", "tokenizer.json", "Check it.") from error
    if not tokenizer.is_fast:
        raise SourceError(f"tokenizer in {path} has no tokenizer.json", "a bundle needs one", "Convert it first.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
