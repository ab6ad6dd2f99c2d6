"""``manyeyes data generate KIND ...``: data that a language model writes, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manyeyes.cli.group import CommandGroup, OutPath

if TYPE_CHECKING:
    from manyeyes.data.generation.dataset import GenerationReport
    from manyeyes.data.generation.interview import Rehearsal
    from manyeyes.web.chat_client import ChatClient

API_KEY = "MANYEYES_GENERATION_KEY"
"""Environment variable that holds the key, unless ``--key-from`` names another."""

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_SERVICE = (
    click.option("--endpoint", required=True, help="OpenAI-compatible, for instance https://models.example/v1."),
    click.option("--model", required=True, help="Name of the language model there."),
    click.option("--key-from", default=API_KEY, show_default=True, metavar="VARIABLE", help="Holds the key."),
    click.option("--temperature", type=float, help="What each prompt was written for by default."),
    click.option("--timeout", "timeout_s", type=float, help="Longest time for one request in seconds; 60 by default."),
    click.option("--concurrency", type=int, help="Most requests at a time; 4 by default, fewer while it is busy."),
    click.option("--rate", "requests_per_minute", type=float, help="Most requests a minute; no limit by default."),
    click.option("--readings", type=int, help="Answers to one question until one can be read; 3 by default."),
    click.option("--price-in", type=float, help="Of a million prompt tokens, to count the cost."),
    click.option("--price-out", type=float, help="Of a million answered tokens."),
    click.option("--max-cost", type=float, help="Most that it may cost, earlier runs included; needs both prices."),
    click.option("--cache", type=_FOLDER, help="Keeps answers; answers in MANYEYES_CACHE by default."),
    click.option("--ask-again", is_flag=True, help="Ask again where an earlier answer could not be read."),
)
_RUN = (
    click.option("--limit", type=click.IntRange(min=1), help="The first N items alone."),
    click.option("--dry-run", is_flag=True, help="Say what it would ask and cost, and ask nothing."),
)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def asks(command: _Command) -> _Command:
    """Options for the service, which the command gets as ``client``, and for the run."""

    @functools.wraps(command)
    def with_client(
        cache: Path | None, ask_again: bool, endpoint: str, model: str, key_from: str, **others: Any
    ) -> None:
        names = (
            *("temperature", "timeout_s", "concurrency", "requests_per_minute", "readings"),
            *("price_in", "price_out", "max_cost"),
        )
        settings = {name: others.pop(name) for name in names}
        given = {name: value for name, value in settings.items() if value is not None}
        service = {"endpoint": endpoint, "model": model, "key_from": key_from, **given}
        command(client=_make_client(service, cache, ask_again=ask_again), **others)

    decorated: Any = with_client
    for option in reversed(_SERVICE + _RUN):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _make_client(service: dict[str, Any], cache: Path | None, *, ask_again: bool) -> ChatClient:
    import pydantic

    from manyeyes.errors import ServiceError
    from manyeyes.recipe.service import ServiceSpec
    from manyeyes.storage import cache_dir
    from manyeyes.web.chat_client import ChatClient

    try:
        spec = ServiceSpec.model_validate(service)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        option = f"--{str((first['loc'] or ('max_cost',))[0]).replace('_', '-')} does not do"
        raise ServiceError(option, first["msg"], "See: manyeyes data generate KIND --help") from None
    return ChatClient(spec, cache=cache or cache_dir() / "answers", keep_unreadable=not ask_again)


@click.group("generate", cls=CommandGroup)
def generate_group() -> None:
    """Data that a language model writes; --dry-run says first what it would cost."""


def _add_llava_command(kind: str, what: str) -> None:
    @generate_group.command(kind, help=f"{what} about the images in DESCRIPTIONS, into the snapshot in OUT.")
    @click.argument("descriptions", type=_FILE)
    @click.argument("out", type=OutPath())
    @click.option("--images", type=_FOLDER, required=True, help="Folder that the images are below.")
    @click.option("--instances", type=_FILE, help="COCO: the boxes, beside its captions.")
    @click.option("--name", default=f"generated-{kind}", show_default=True, help="Of the data set.")
    @click.option("--licence", required=True, help="SPDX name of what comes out.")
    @asks
    def command(
        descriptions: Path,
        out: Path,
        images: Path,
        instances: Path | None,
        name: str,
        licence: str,
        client: ChatClient,
        limit: int | None,
        dry_run: bool,
    ) -> None:
        from manyeyes.data.generation.descriptions import read_descriptions
        from manyeyes.data.generation.llava import sampler

        _write_dataset(
            lambda: read_descriptions(descriptions, instances=instances),
            sampler(kind, images),
            client,
            kind=kind,
            out=out,
            name=name,
            licence=licence,
            limit=limit,
            dry_run=dry_run,
        )


_add_llava_command("conversation", "LLaVA's conversations")
_add_llava_command("detail", "LLaVA's detailed descriptions")
_add_llava_command("complex", "LLaVA's complex reasoning")


def _add_drawing_command(kind: str, what: str) -> None:
    @generate_group.command(kind, help=f"{what}, of those in the JSON Lines ITEMS, into the snapshot in OUT.")
    @click.argument("items", type=_FILE)
    @click.argument("out", type=OutPath())
    @click.option("--name", default=f"generated-{kind}", show_default=True, help="Of the data set.")
    @click.option("--licence", required=True, help="SPDX name of what comes out.")
    @asks
    def command(items: Path, out: Path, client: ChatClient, **facts: Any) -> None:
        from manyeyes.data.generation import drawing_kinds

        kinds: dict[str, tuple[Any, Any]] = {
            "recaption": (drawing_kinds.read_picture_captions, drawing_kinds.make_recaption),
            "dialogue-drawing": (drawing_kinds.read_dialogues, drawing_kinds.make_dialogue_drawing),
        }
        read, make = kinds[kind]
        _write_dataset(lambda: read(items), make, client, kind=kind, out=out, **facts)


_add_drawing_command("recaption", "Mini-Gemini's requests to draw, with prompts, of captions")
_add_drawing_command("dialogue-drawing", "Mini-Gemini's prompts behind answers of dialogues")


@generate_group.command("llava-bench")
@click.argument("descriptions", type=_FILE)
@click.argument("out", type=OutPath())
@click.option("--images", type=_FOLDER, required=True, help="Folder that the images are below.")
@click.option("--instances", type=_FILE, help="COCO: the boxes, beside its captions.")
@click.option("--count", default=30, show_default=True, type=click.IntRange(min=1), help="Images, drawn by their ids.")
@click.option("--licence", required=True, help="SPDX name of what comes out.")
@asks
def llava_bench_command(
    descriptions: Path,
    out: Path,
    images: Path,
    instances: Path | None,
    count: int,
    licence: str,
    client: ChatClient,
    limit: int | None,
    dry_run: bool,
) -> None:
    """Three questions, with references, on each of 30 images of DESCRIPTIONS: OUT's data set llava-bench-coco."""
    from manyeyes.data.generation.dataset import rehearse
    from manyeyes.data.generation.descriptions import read_descriptions
    from manyeyes.data.generation.llava_bench import NAME, draw_images, generate_questions, question_maker

    items = draw_images(read_descriptions(descriptions, instances=instances), min(count, limit or count))
    if dry_run:
        _say_rehearsal(rehearse(items, question_maker(images), client))
        return
    _say_key(client)
    report = generate_questions(items, client, images=images, out=out, licence=licence, on_progress=_progress(client))
    _say_report(report, out / NAME)
    _refuse_nothing(report, out / NAME)


@generate_group.command("engine")
@click.argument("out", type=OutPath())
@click.option("--links", "links_file", type=_FILE, help="Pages to read, an address a line; no search is needed then.")
@click.option(
    "--fields", "fields_file", type=_FILE, help="A field a line, Biology: Botany, Zoology; with --search-url."
)
@click.option(
    "--search-url", metavar="TEMPLATE", help="https://searx.example/search?q={query}&format=json, or another."
)
@click.option("--search-links", default="results.url", show_default=True, metavar="PATH", help="Where links are in it.")
@click.option(
    "--search-key-from", default="", metavar="VARIABLE", help="Holds the key, {key} in the address or header."
)
@click.option("--search-header", default="", metavar="TEMPLATE", help="One more header, X-Key: {key} for instance.")
@click.option(
    "--query", default="wikipedia {topic}", show_default=True, help="{subfield} and {field} may be in it too."
)
@click.option("--topics", default=20, show_default=True, type=click.IntRange(1, 200), help="Of each subfield.")
@click.option("--pages", "links", default=10, show_default=True, type=click.IntRange(1, 100), help="Of each topic.")
@click.option("--contact", required=True, help="Where those whose pages are read find you; part of the agent's name.")
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(0), help="Seconds between requests to a host."
)
@click.option("--allow-host", multiple=True, metavar="HOST", help="May be at a private address; all others may not.")
@click.option("--min-side", default=100, show_default=True, type=click.IntRange(1), help="Smallest image, in pixels.")
@click.option(
    "--max-side", default=2048, show_default=True, type=click.IntRange(1), help="Larger ones are shrunk to it."
)
@click.option("--name", default="generated-engine", show_default=True, help="Of the data set.")
@click.option("--licence", required=True, help="SPDX name of what comes out.")
@asks
def engine_command(
    out: Path,
    links_file: Path | None,
    fields_file: Path | None,
    search_url: str | None,
    search_links: str,
    search_key_from: str,
    search_header: str,
    query: str,
    topics: int,
    links: int,
    contact: str,
    interval: float,
    allow_host: tuple[str, ...],
    min_side: int,
    max_side: int,
    name: str,
    licence: str,
    client: ChatClient,
    limit: int | None,
    dry_run: bool,
) -> None:
    """Cambrian-1's data engine: questions on figures of web pages, written from the text around them, into OUT.

    Pages are those of --links, or those that a search finds for topics of --fields. What was fetched and answered is
    kept: after a stop the same command goes on.
    """
    from manyeyes.data.generation.engine.engine import FigureFinder, figure_sampler, rehearse_engine
    from manyeyes.data.generation.engine.topics import TopicSearch, read_links, read_subfields
    from manyeyes.data.generation.interview import Interview
    from manyeyes.errors import DataError
    from manyeyes.storage import cache_dir
    from manyeyes.web.fetcher import Fetcher, FetchLimits
    from manyeyes.web.kept_pages import KeptFetcher
    from manyeyes.web.link_search import JsonLinkSearch, SearchService

    if (links_file is None) == (fields_file is None) or (fields_file is None) != (search_url is None):
        raise DataError(
            "it is not said which pages to read", "--links FILE, or --fields FILE and --search-url", "Give one of both."
        )
    subfields = [] if fields_file is None else read_subfields(fields_file)
    if dry_run:
        _say_rehearsal(rehearse_engine(client, subfields, topics=topics, figures=limit or 0))
        pages = f"{len(subfields) * topics * links:,} pages at most" if subfields else "the pages"
        figures = (
            f"{limit:,} figures, each with the longest text" if limit else "no figure: each takes two questions more"
        )
        click.echo(f"this counts {figures}; how many figures {pages} have is known when they are fetched")
        return
    kept = cache_dir()
    limits = FetchLimits(interval_s=interval, private_hosts=allow_host, contact=contact)
    pages_of_web = KeptFetcher(Fetcher(limits), kept / "pages")
    finder = FigureFinder(pages_of_web)
    if links_file is not None:
        found: Iterable[Any] = read_links(links_file)
    else:
        service = SearchService(
            search_url or "", links=search_links, key_from=search_key_from, header=search_header, contact=contact
        )
        search = TopicSearch(JsonLinkSearch(service, cache=kept / "searches"), topics, links, query)
        found = search.find(subfields, lambda: Interview(client), finder.looked_at)
    _write_dataset(
        lambda: finder.find(found),
        figure_sampler(pages_of_web, min_side=min_side, max_side=max_side),
        client,
        kind="engine",
        out=out,
        name=name,
        licence=licence,
        looked_at=finder.looked_at,
        limit=limit,
        dry_run=False,
    )


def _write_dataset(
    read: Callable[[], Iterable[Any]],
    make: Callable[..., Any],
    client: ChatClient,
    *,
    kind: str,
    out: Path,
    name: str,
    licence: str,
    limit: int | None,
    dry_run: bool,
    looked_at: Mapping[str, int] | None = None,
) -> None:
    from manyeyes.data.generation.dataset import PAGE_FILE, check_name, generate_dataset, rehearse

    check_name(name)
    if dry_run:
        _say_rehearsal(rehearse(islice(read(), limit), make, client))
        return
    _say_key(client)
    report = generate_dataset(
        islice(read(), limit),
        make,
        client,
        kind=kind,
        out=out,
        name=name,
        licence=licence,
        looked_at=looked_at,
        on_progress=_progress(client),
    )
    _say_report(report, out / name)
    click.echo(f"report: {out / name / PAGE_FILE}")
    _refuse_nothing(report, out / name)


def _refuse_nothing(report: GenerationReport, folder: Path) -> None:
    from manyeyes.errors import DataError

    if not report.records:
        raise DataError("no item gave a record", "at least one that does", f"Read {folder / 'refused.jsonl'}.")


def _progress(client: ChatClient) -> Callable[[int, int], None]:
    """One line a few seconds, on stderr."""
    last = time.monotonic()

    def say(done: int, refused: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            cost = "" if client.spent is None else f", cost {client.spent:.2f}"
            click.echo(f"{done:,} done, {refused:,} refused{cost}", err=True)

    return say


def _say_key(client: ChatClient) -> None:
    if not os.environ.get(client.spec.key_from, "").strip():
        click.echo(f"no key in {client.spec.key_from}: asking without one", err=True)


def _say_rehearsal(counted: Rehearsal) -> None:
    click.echo(
        f"{counted.calls:,} questions to ask, {counted.kept:,} answered already; about {counted.prompt_tokens:,} "
        f"prompt tokens and {counted.answer_tokens:,} answered ones, at most {counted.most_answer_tokens:,}"
    )
    likely = counted.client.price(counted.prompt_tokens, counted.answer_tokens)
    most = counted.client.price(counted.prompt_tokens, counted.most_answer_tokens)
    if likely is None or most is None:
        click.echo("cost: unknown; give --price-in and --price-out")
    else:
        click.echo(
            f"cost: about {likely:.2f}, at most about {most:.2f} where every answer can be read the first time; "
            "--max-cost sets a limit"
        )


def _say_report(report: GenerationReport, folder: Path) -> None:
    click.echo(f"{report.records:,} records in {folder}, {report.refused:,} items refused (refused.jsonl says why)")
    click.echo(report.service.in_words())
