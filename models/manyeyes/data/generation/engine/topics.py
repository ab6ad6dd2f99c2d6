"""Topics of fields and their subfields, and the pages that a search service or a file names for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urldefrag

from manyeyes.data.generation.dataset import UnusableItem
from manyeyes.data.generation.interview import Asking, Prompt, RefusedError
from manyeyes.errors import DataError
from manyeyes.storage import parse_json
from manyeyes.web.link_search import LinkSearch

_LONGEST_TOPIC = 120
"""Characters."""

TOPICS = Prompt(
    name="topics 1",
    system=(
        "You plan an illustrated encyclopedia. You get a field of knowledge, one of its subfields, and a number. Write "
        "that many topics of the subfield, each of which an encyclopedia has an article about and pictures, diagrams, "
        "maps or photographs explain well. Choose concrete and different things, from basic to advanced; write each as "
        "the article would be called.\n"
        "Answer with a JSON list of strings and nothing else."
    ),
    examples=(
        (
            "Field: Music\nSubfield: Instruments\nNumber: 4",
            '["Hurdy-gurdy", "Valve (brass instrument)", "Gamelan", "Violin construction"]',
        ),
        ("Field: Earth science\nSubfield: Volcanology\nNumber: 3", '["Shield volcano", "Pyroclastic flow", "Caldera"]'),
    ),
    max_tokens=2048,
)


@dataclass(frozen=True)
class Subfield:
    """What topics are written for.

    Attributes:
        field: Of knowledge.
        name: Of the subfield.
    """

    field: str
    name: str


@dataclass(frozen=True)
class Link:
    """A page to read.

    Attributes:
        url: Its address.
        topic: What it was found for; empty where a file named it.
        subfield: That the topic is of.
    """

    url: str
    topic: str = ""
    subfield: Subfield | None = None


def read_subfields(path: Path) -> list[Subfield]:
    """Subfields from a text file, one field a line: ``Biology: Botany, Zoology``. Empty lines and ``#`` say nothing.

    Raises:
        DataError: It cannot be read, a line is none, or it names nothing.
    """
    found: dict[Subfield, None] = {}
    for number, line in _lines(path, "a field of knowledge a line"):
        field, colon, names = line.partition(":")
        subfields = [name for part in names.split(",") if (name := " ".join(part.split()))]
        if not colon or not field.strip() or not subfields:
            raise DataError(
                f"{path}:{number} is {line[:80]!r}", "a field, a colon and subfields", "Write: Biology: Botany, Zoology"
            )
        found |= {Subfield(" ".join(field.split()), name): None for name in subfields}
    if not found:
        raise DataError(f"{path} names no field", "a field a line", "Write: Biology: Botany, Zoology")
    return list(found)


def read_links(path: Path) -> Iterator[Link]:
    """Links from a text file, an address a line; empty lines and ``#`` say nothing.

    Raises:
        DataError: It cannot be read.
    """
    for _, line in _lines(path, "an address a line"):
        yield Link(line)


def _lines(path: Path, needed: str) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield number, line.strip()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", needed, "Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 ({error})", needed, "Save it as UTF-8.") from error


def topics_context(subfield: Subfield, number: int) -> str:
    """What the model gets beside ``TOPICS``."""
    return f"Field: {subfield.field}\nSubfield: {subfield.name}\nNumber: {number}"


def read_topics(text: str) -> list[str]:
    """Different topics, in the answer's order.

    Raises:
        RefusedError: No JSON list of short texts, or an empty one.
    """
    try:
        found = parse_json(text.strip().removeprefix("```json").removesuffix("```"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"it is no JSON ({error}); a list of topics is needed") from error
    if not isinstance(found, list) or not found or not all(isinstance(topic, str) for topic in found):
        raise RefusedError(f"it is {text[:80]!r}; a list of topics is needed")
    topics = [" ".join(topic.split()) for topic in found]
    if not all(0 < len(topic) <= _LONGEST_TOPIC for topic in topics):
        raise RefusedError(f"a topic is empty or longer than {_LONGEST_TOPIC} characters")
    return list(dict.fromkeys(topics))


@dataclass(frozen=True)
class TopicSearch:
    """How pages are looked for.

    Attributes:
        service: Is asked for links.
        topics: Of each subfield.
        links: Of each topic.
        query: What is looked for; ``{topic}``, ``{subfield}`` and ``{field}`` are filled in.
    """

    service: LinkSearch
    topics: int = 20
    links: int = 10
    query: str = "wikipedia {topic}"

    def __post_init__(self) -> None:
        try:
            self.query.format(topic="", subfield="", field="")
        except (ValueError, LookupError, AttributeError) as error:
            raise DataError(
                f'the query is "{self.query}" ({type(error).__name__} {error})',
                "a text with {topic}",
                "{subfield} and {field} may be in it too.",
            ) from error

    def find(
        self, subfields: list[Subfield], ask: Callable[[], Asking], looked_at: Counter[str]
    ) -> Iterator[Link | UnusableItem]:
        """Links for all topics of all subfields; a topic without is an item that is refused.

        Raises:
            FetchError: The service refuses.
            ServiceError: As ``Asking.ask``.
        """
        for subfield in subfields:
            looked_at["subfields"] += 1
            name = f"{subfield.field}: {subfield.name}"
            try:
                topics = ask().ask(TOPICS, topics_context(subfield, self.topics), read_topics)
            except RefusedError as refused:
                yield UnusableItem(name, name, refused.reason, refused.text, refused.step)
                continue
            for topic in topics[: self.topics]:
                looked_at["topics"] += 1
                query = self.query.format(topic=topic, subfield=subfield.name, field=subfield.field)
                found = self.service.find_links(query, self.links)
                if not found:
                    yield UnusableItem(f"{name}: {topic}", name, f"no page was found for {query!r}", step="search")
                yield from (Link(url, topic, subfield) for url in found)


def different_links(links: Iterator[Link | UnusableItem], looked_at: Counter[str]) -> Iterator[Link | UnusableItem]:
    """Each page once, whatever part of it is linked to and for however many topics."""
    seen: set[str] = set()
    for link in links:
        if isinstance(link, Link):
            looked_at["links"] += 1
            try:
                url = urldefrag(link.url).url
            except ValueError as error:
                yield UnusableItem(link.url, link.url, f"it is no address ({error})", step="page")
                continue
            if url in seen:
                looked_at["links to a page that was read already"] += 1
                continue
            seen.add(url)
            yield Link(url, link.topic, link.subfield)
        else:
            yield link
