"""From links to records: pages are fetched, a question is written about each figure, and checked against the text.

One question an image, from caption and section, as Cambrian-1's engine has it (arXiv:2406.16860, section 4.1: 161k of
them). The check is ours: a second request sees the text, the question and the answer, and must quote the sentence that
says so; what has none is refused. The model reads text that anybody may have written. It can make the model write
nonsense, which the check and the strict form are for, but nothing that is read here is ever run or fetched.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from manyeyes.data.generation.dataset import GeneratedSample, UnusableItem
from manyeyes.data.generation.engine.page_figures import MOST_CHARACTERS, Figure, name_of, read_page
from manyeyes.data.generation.engine.prompts import CHECK, QUESTION
from manyeyes.data.generation.engine.topics import TOPICS, Link, Subfield, different_links, read_topics, topics_context
from manyeyes.data.generation.interview import Asking, RefusedError, Rehearsal
from manyeyes.data.generation.llava import check_voice, read_one_pair
from manyeyes.data.records import PLACEHOLDER, ImageFile, Turn, read_image_file
from manyeyes.errors import FetchError, ManyEyesError, RecordError
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import parse_json
from manyeyes.web.chat_client import ChatClient
from manyeyes.web.kept_pages import FetchesPages

MOST_PIXELS = 80_000_000
"""Of an image of the web: below what Pillow warns of."""

_MOST_PAGE_BYTES = 4 * 2**20
_PAGE_TYPES = ("text/html", "application/xhtml+xml", "")
_FAILURES_IN_A_ROW = 20
_SHORTEST_QUOTE = 3
"""Words."""

_GIVEN_AWAY = re.compile(
    r"\b(?:the|this|given|provided) (?:text|passage|article|section|paragraph|excerpt|web ?page)\b"
    r"|\b(?:according to|as (?:stated|mentioned|described)) (?:in )?(?:the|this)\b|\balternative text\b",
    re.IGNORECASE,
)
_SPACE = re.compile(r"\s+")
_MARKS = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")


@dataclass(frozen=True)
class WebFigure:
    """A figure of a page that was fetched.

    Attributes:
        id: From the address of its image.
        source: Address of its page.
        figure: The image's addresses, and what stands around it.
        link: What led to the page.
        licence: Address of the licence that the page names; may be empty.
    """

    id: str
    source: str
    figure: Figure
    link: Link
    licence: str


@dataclass
class FigureFinder:
    """Reads pages, one after the other.

    Attributes:
        pages: Fetches them.
        looked_at: Counts what was looked at and what was left out; grows.
    """

    pages: FetchesPages
    looked_at: Counter[str] = field(default_factory=Counter)

    def find(self, links: Iterable[Link | UnusableItem]) -> Iterator[WebFigure | UnusableItem]:
        """The figures of all pages in order, each image once; a page that cannot be read is an item that is refused.

        Raises:
            FetchError: Twenty pages in a row cannot be fetched now, so that the network is the likely reason.
        """
        failures = 0
        seen: set[str] = set()
        for link in different_links(iter(links), self.looked_at):
            if isinstance(link, UnusableItem):
                yield link
                continue
            try:
                found = list(self._read(link))
            except RefusedError as refused:
                yield UnusableItem(link.url, link.url, refused.reason, step="page")
            except FetchError as error:
                failures = failures + 1 if error.retry else 0
                if failures == _FAILURES_IN_A_ROW:
                    raise FetchError(
                        f"{failures} pages in a row cannot be fetched; the last: {error.found}",
                        "a network and hosts that answer",
                        "Run the same command again later: nothing that was fetched or answered is asked for again.",
                        retry=True,
                    ) from error
                yield UnusableItem(link.url, link.url, _say(error), step="page")
            else:
                failures = 0
                for figure in found:
                    if figure.id in seen:
                        self.looked_at["images that another page showed"] += 1
                        continue
                    seen.add(figure.id)
                    self.looked_at["figures"] += 1
                    yield figure

    def _read(self, link: Link) -> Iterator[WebFigure]:
        fetched = self.pages.fetch(link.url)
        if fetched.content_type not in _PAGE_TYPES:
            raise RefusedError(f"it is {fetched.content_type[:80]}; a page of HTML is needed")
        if len(fetched.content) > _MOST_PAGE_BYTES:
            raise RefusedError(f"it has {len(fetched.content)} bytes; at most {_MOST_PAGE_BYTES} are read")
        page = read_page(fetched.content, fetched.url)
        self.looked_at["pages"] += 1
        self.looked_at += page.left_out
        for figure in page.figures:
            digest = hashlib.sha256(figure.images[0].encode(errors="surrogatepass")).hexdigest()[:16]
            yield WebFigure(digest, fetched.url, figure, link, page.licence)


def fetch_image(figure: Figure, pages: FetchesPages, *, min_side: int, max_side: int) -> tuple[ImageFile, str]:
    """The image, encoded anew: whatever else a file of the web held is gone.

    Args:
        figure: Names it; its next address is tried where one cannot be fetched or read.
        pages: Fetches it.
        min_side: Pixels of the shorter side; smaller ones are refused.
        max_side: Pixels that the longer side is shrunk to.

    Returns:
        The image (JPEG where it was one, PNG otherwise), and its address.

    Raises:
        RefusedError: It cannot be fetched, is too small or too large, or is no image.
    """
    reason = ""
    for url in figure.images:
        try:
            data = pages.fetch(url).content
            pixels = decode_image(data, max_pixels=MOST_PIXELS)
        except (FetchError, RecordError) as error:
            reason = f"{url}: {_say(error)}"
            continue
        height, width, _ = pixels.shape
        if min(width, height) < min_side:
            raise RefusedError(f"{url} is {width} x {height} pixels; {min_side} are needed", step="small image")
        image = Image.fromarray(pixels)
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        photograph = data.startswith(b"\xff\xd8")
        encoded = io.BytesIO()
        image.save(encoded, format="JPEG" if photograph else "PNG", quality=95)
        return read_image_file(encoded.getvalue(), path=name_of(url)), url
    raise RefusedError(reason, step="image")


def read_question(text: str) -> tuple[str, str]:
    """A question and its answer.

    Raises:
        RefusedError: Another form, or it says where its knowledge comes from.
    """
    question, answer = read_one_pair(text)
    for said in (question, answer):
        check_voice(said)
        if (match := _GIVEN_AWAY.search(said)) is not None:
            raise RefusedError(f"it says {match[0]!r}; a text by somebody who sees the image is needed")
        if PLACEHOLDER in said:
            raise RefusedError(f"it has {PLACEHOLDER}; a text without is needed")
    return question, answer


def read_check(text: str, *, known: str) -> str:
    """What the text says in support of an answer, in its own words; empty where the answer is not supported.

    Args:
        text: The model's answer.
        known: The text that it was given.

    Raises:
        RefusedError: Another form, or a quote that the text does not have.
    """
    try:
        found = parse_json(text.strip().removeprefix("```json").removesuffix("```"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"it is no JSON ({error})") from error
    if (
        not isinstance(found, dict)
        or set(found) != {"supported", "quote"}
        or not isinstance(found["supported"], bool)
        or not isinstance(found["quote"], str)
    ):
        raise RefusedError(f"it is {text[:80]!r}; supported, true or false, and a quote are needed")
    if not found["supported"]:
        return ""
    quote = _plain(found["quote"])
    if len(quote.split()) < _SHORTEST_QUOTE or quote not in _plain(known):
        raise RefusedError(f"its quote {found['quote'][:80]!r} is not in the text, or is too short")
    return str(found["quote"])


def make_figure_sample(
    item: WebFigure, asking: Asking, *, pages: FetchesPages, min_side: int, max_side: int
) -> GeneratedSample:
    """A question about a figure, written and checked; the image comes first, so that one that is missing costs nothing.

    Raises:
        RefusedError: No image, no answer that can be read, or one that the page does not support.
    """
    image, url = fetch_image(item.figure, pages, min_side=min_side, max_side=max_side)
    known = item.figure.as_text()
    question, answer = asking.ask(QUESTION, known, read_question)
    context = f"{known}\n\n===\nQuestion: {question}\nAnswer: {answer}"
    quote = asking.ask(CHECK, context, partial(read_check, known=known))
    if not quote:
        said = f"Question:\n{question}\n===\nAnswer:\n{answer}"
        raise RefusedError("the page does not say so; an answer that it supports is needed", said, step="unsupported")
    subfield = item.link.subfield
    asking.note(
        image=url,
        topic=item.link.topic,
        field=f"{subfield.field}: {subfield.name}" if subfield else "",
        page_licence=item.licence,
        quote=quote,
    )
    return GeneratedSample((image,), (Turn("human", f"{PLACEHOLDER}\n{question}"), Turn("gpt", answer)))


def figure_sampler(
    pages: FetchesPages, *, min_side: int, max_side: int
) -> Callable[[WebFigure, Asking], GeneratedSample]:
    """``make_figure_sample`` for one source of images."""
    return partial(make_figure_sample, pages=pages, min_side=min_side, max_side=max_side)


def rehearse_engine(client: ChatClient, subfields: Sequence[Subfield], *, topics: int, figures: int) -> Rehearsal:
    """Count what would be asked, without asking; what pages hold is not known before they are fetched.

    Args:
        client: Would be asked.
        subfields: Whose topics would be written.
        topics: Of each.
        figures: That are asked about; each as if its section were as long as it may be.
    """
    planned, one = Rehearsal(client), Rehearsal(client)
    for subfield in subfields:
        planned.ask(TOPICS, topics_context(subfield, topics), read_topics)
    for prompt in (QUESTION, CHECK):
        one.ask(prompt, "x" * MOST_CHARACTERS, str)
    return Rehearsal(
        client,
        calls=planned.calls + figures * one.calls,
        kept=planned.kept,
        prompt_tokens=planned.prompt_tokens + figures * one.prompt_tokens,
        answer_tokens=planned.answer_tokens + figures * one.answer_tokens,
        most_answer_tokens=planned.most_answer_tokens + figures * one.most_answer_tokens,
    )


def _say(error: ManyEyesError) -> str:
    return f"{error.found}; needed: {error.needed.removesuffix(' is needed')}"


def _plain(text: str) -> str:
    """As quotes are compared: without regard to case, spaces and typographic marks."""
    return _SPACE.sub(" ", text.translate(_MARKS)).strip().casefold()
