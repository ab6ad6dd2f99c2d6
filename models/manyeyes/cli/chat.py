"""``manyeyes chat``: a conversation as text, tokens and supervised mask, for checking against other implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyeyes.errors import RecordError, SourceError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from manyeyes.runtime.templates import ChatTemplate

# What LLaVA and its descendants put where an image goes, before features take its place.
IMAGE_TOKEN_ID = -200
SPEAKERS = ("human", "gpt")


@click.command("render")
@click.argument("template")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object; a list of them for a list of records.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A folder with a tokenizer, whichever files it has, or a tokenizer.json.",
)
@click.option("--system", help="Replaces the template's system text.")
@click.option("--image-tokens", default=1, show_default=True, help="Visual tokens an image.")
@click.option("--image-token-id", default=IMAGE_TOKEN_ID, show_default=True, help="Id at every visual token.")
def render_command(
    template: str,
    file: Path,
    as_json: bool,
    tokenizer: Path | None,
    system: str | None,
    image_tokens: int,
    image_token_id: int,
) -> None:
    """Render the conversation in FILE with chat template TEMPLATE.

    FILE holds a record as LLaVA writes it ({"conversations": [{"from": "human", "value": ...}, ...]}), its turns alone,
    or a list of records. A conversation that ends with a question gets a generation prompt.
    """
    from manyeyes.runtime.chat import encode_conversation, render_with_spans
    from manyeyes.storage import read_json_file

    chosen, rust = _open_template(template, tokenizer)
    content = read_json_file(file, error=RecordError)
    several = isinstance(content, list) and all(isinstance(entry, dict) and "from" not in entry for entry in content)
    shown: list[dict[str, Any]] = []
    for record in content if several else [content]:
        turns, num_images = _read_turns(record)
        asks = bool(turns) and turns[-1][0] == "human"
        text, spans = render_with_spans(chosen, turns, system=system, generation_prompt=asks)
        entry: dict[str, Any] = {"template": chosen.name, "text": text, "supervised_text": spans}
        if rust is not None:
            encoded = encode_conversation(
                rust,
                chosen,
                turns,
                image_tokens=[image_tokens] * num_images,
                image_token_id=image_token_id,
                system=system,
                generation_prompt=asks,
            )
            entry["ids"] = encoded.input_ids
            entry["supervised"] = encoded.supervised
            entry["image_spans"] = encoded.image_spans
        shown.append(entry)
    if as_json:
        click.echo(json.dumps(shown if several else shown[0], ensure_ascii=False, indent=2))
        return
    for entry in shown:
        _print(entry, rust)


def _print(entry: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    click.echo(entry["text"])
    if tokenizer is None:
        return
    click.echo()
    for token, supervised in zip(entry["ids"], entry["supervised"], strict=True):
        word = "<image>" if token < 0 else tokenizer.id_to_token(token)
        click.echo(f"{token:>8} {'learned' if supervised else '       '} {word!r}")


def _open_template(name: str, path: Path | None) -> tuple[ChatTemplate, Tokenizer | None]:
    from manyeyes.runtime.templates import TOKENIZER_TEMPLATE, get_chat_template

    if name != TOKENIZER_TEMPLATE:
        template = get_chat_template(name)
        return template, None if path is None else _load_tokenizer(path)
    if path is None or not path.is_dir():
        raise SourceError(
            f'template is "{name}" and --tokenizer is {path}',
            "the folder of a tokenizer that carries a chat template",
            "Name it with --tokenizer.",
        )
    from manyeyes.chat import read_tokenizer_template
    from manyeyes.tokenizer_files import load_tokenizer

    own = load_tokenizer(path)
    return read_tokenizer_template(own), own.backend_tokenizer


def _load_tokenizer(path: Path) -> Tokenizer:
    if path.is_dir():
        from manyeyes.tokenizer_files import load_published_tokenizer

        backend: Tokenizer = load_published_tokenizer(path).backend_tokenizer
        return backend
    if not path.is_file():
        raise SourceError(f"tokenizer is {path}", "no such file or folder", "Name a folder with a tokenizer.")
    from manyeyes.runtime.tokenizer import read_tokenizer

    return read_tokenizer(path, error=SourceError)


def _read_turns(record: Any) -> tuple[list[tuple[str, str]], int]:
    """Turns of a record, and how many images it has: as many as placeholders where it does not say."""
    from manyeyes.runtime.chat import IMAGE_PLACEHOLDER

    entries = record.get("conversations") if isinstance(record, dict) else record
    if not isinstance(entries, list):
        fields = sorted(record) if isinstance(record, dict) else []
        hint = "".join(did_you_mean(name, ["conversations"]) for name in fields)
        raise RecordError(
            f"record has the fields {fields}" if fields else f"record is {type(record).__name__}",
            "conversations, a list of turns",
            f"{hint}Write it as LLaVA does.",
        )
    turns = []
    for place, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("from"), str)
            or not isinstance(entry.get("value"), str)
        ):
            raise RecordError(f"turn {place} is {entry!r:.60}", "from and value, both text", "Fix the record.")
        if entry["from"] not in SPEAKERS:
            raise RecordError(
                f'turn {place} is from "{entry["from"]}"',
                f"one of {', '.join(SPEAKERS)}",
                did_you_mean(entry["from"], SPEAKERS) or "Fix the record.",
            )
        turns.append((entry["from"], entry["value"]))
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in turns if speaker == "human")
    num_images = _count_images(record, default=placeholders)
    if num_images != placeholders:
        raise RecordError(
            f"conversation has {placeholders} {IMAGE_PLACEHOLDER} and {num_images} images",
            "one placeholder per image is needed",
            "Fix the record.",
        )
    return turns, num_images


def _count_images(record: Any, *, default: int) -> int:
    if not isinstance(record, dict):
        return default
    images = record.get("images", record.get("image", ...))
    if images is ...:
        return default
    if isinstance(images, list):
        return len(images)
    return int(bool(images))
