"""A web page's sections, and the figures in them, with what the page says about each.

A section reaches from one heading to the next. What is kept of it are paragraphs and figures, each with its caption and
its alternative text; menus, references and footnotes are no part of it.

Source: Cambrian-1, arXiv:2406.16860, section 4.1, and its published data engine: sections of h2 to h6 with both text
and images, without those about history, of more than 50 words.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urljoin, urlsplit

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PreformattedString, Tag
from bs4.exceptions import ParserRejectedMarkup

from manyeyes.data.generation.interview import RefusedError

FEWEST_WORDS = 50
"""A section has more than that."""

MOST_CHARACTERS = 6000
"""Of a section's text; what is longer is cut between paragraphs."""

MOST_IMAGES = 500
"""Of a page."""

_SMALLEST_SIDE = 100
"""Pixels, where the page says how large an image is shown: icons, flags and buttons are smaller."""

_LONGEST_ADDRESS = 2000
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_SKIPPED = (
    "script",
    "style",
    "template",
    "noscript",
    "nav",
    "footer",
    "form",
    "svg",
    "math",
    "iframe",
    "button",
    "select",
)
# Of MediaWiki, and common elsewhere.
_SKIPPED_CLASSES = {
    "mw-editsection",
    "reference",
    "reflist",
    "navbox",
    "ambox",
    "metadata",
    "toc",
    "sidebar",
    "noprint",
}
_CONTAINERS = {"thumb", "tsingle", "gallerybox", "infobox-image", "wp-caption"}
_CAPTIONS = {"thumbcaption", "gallerytext", "infobox-caption", "wp-caption-text"}
_UNTOLD_SECTIONS = re.compile(
    r"(?:.*\bhistory\b.*|references|see also|external links|further reading|bibliography|notes|sources|citations"
    r"|footnotes|gallery|awards?|works cited)",
    re.IGNORECASE,
)
# https://commons.wikimedia.org/wiki/Commons:FAQ: the file itself is where its thumbnail is, without /thumb and size.
_WIKIMEDIA_THUMB = re.compile(r"(https?://upload\.wikimedia\.org/.+)/thumb(/.+\.(?:jpe?g|png|gif|webp))/[^/]+", re.I)
_FILE_NAME = re.compile(r"[^/<>]+\.(?:jpe?g|png|gif|svg|webp|tiff?)", re.IGNORECASE)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Figure:
    """An image of a page, and what stands around it.

    Attributes:
        images: Addresses of the image, the best one first.
        caption: Below it; may be empty.
        alternative: Its alternative text; may be empty.
        title: Of the page.
        section: Heading of its section; empty in front of the first.
        paragraphs: Of its section.
    """

    images: tuple[str, ...]
    caption: str
    alternative: str
    title: str
    section: str
    paragraphs: tuple[str, ...]

    def as_text(self) -> str:
        """What a model without eyes gets to know."""
        facts = (
            ("Article", self.title),
            ("Section", self.section),
            ("Caption", self.caption),
            ("Alternative text", self.alternative),
        )
        lines = [f"{name}: {fact}" for name, fact in facts if fact]
        return "\n".join(lines) + "\n\n" + "\n\n".join(self.paragraphs)


@dataclass(frozen=True)
class PageFigures:
    """What a page has.

    Attributes:
        figures: In the page's order, each image once.
        licence: Address of the licence that the page names; empty where it names none.
        left_out: Sections and images that are none, by what they lack.
    """

    figures: tuple[Figure, ...]
    licence: str
    left_out: Counter[str]


@dataclass
class _Image:
    addresses: tuple[str, ...]
    alternative: str
    caption: str = ""


@dataclass
class _Container:
    images: list[_Image] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)


@dataclass
class _Section:
    heading: str = ""
    paragraphs: list[str] = field(default_factory=list)
    images: list[_Image] = field(default_factory=list)


def read_page(content: bytes, url: str) -> PageFigures:
    """Find the figures of an HTML page.

    Args:
        content: The page, however broken.
        url: Its address, which relative ones are relative to.

    Raises:
        RefusedError: The parser gives up.
    """
    try:
        text: bytes | str = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content  # in the encoding that it declares
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is read the same
        try:
            soup = BeautifulSoup(text, "html.parser")
        except ParserRejectedMarkup as error:
            raise RefusedError(f"its markup cannot be parsed ({error}); a page of HTML is needed") from error
    base = soup.find("base", href=True)
    reader = _Reader(_join(url, _attribute(base, "href")) if isinstance(base, Tag) else url)
    reader.read(soup.find("main") or soup.find("article") or soup.body or soup)
    title = _words(soup.title.get_text()) if soup.title else ""
    licences = soup.find_all(["a", "link"], rel="license", href=True, limit=1)
    licence = _join(url, _attribute(licences[0], "href")) if licences else ""
    return PageFigures(tuple(_figures(reader, title)), licence, reader.left_out)


def _figures(reader: _Reader, title: str) -> Iterator[Figure]:
    seen: set[str] = set()
    for section in reader.sections:
        if not section.images:
            continue
        words = sum(len(paragraph.split()) for paragraph in section.paragraphs)
        if _UNTOLD_SECTIONS.fullmatch(section.heading):
            reader.left_out["images in sections of history or references"] += len(section.images)
            continue
        if words <= FEWEST_WORDS:
            reader.left_out[f"images in sections of at most {FEWEST_WORDS} words"] += len(section.images)
            continue
        paragraphs = _cut(section.paragraphs)
        for image in section.images:
            if image.addresses[0] in seen:
                reader.left_out["images that a page shows again"] += 1
            elif not image.caption and not image.alternative:
                reader.left_out["images without a caption or alternative text"] += 1
            else:
                seen.add(image.addresses[0])
                yield Figure(image.addresses, image.caption, image.alternative, title, section.heading, paragraphs)


def _cut(paragraphs: list[str]) -> tuple[str, ...]:
    kept: list[str] = []
    left = MOST_CHARACTERS
    for paragraph in paragraphs:
        if len(paragraph) > left and kept:
            break
        kept.append(paragraph[:left])
        left -= len(paragraph)
    return tuple(kept)


class _Reader:
    """One pass over a page, in time that grows with its length however deep it nests."""

    def __init__(self, base: str) -> None:
        self.sections = [_Section()]
        self.left_out: Counter[str] = Counter()
        self._base = base
        self._containers: list[_Container] = []
        self._images = 0
        self._captions = 0
        self._paragraphs = 0
        self._headings = 0
        self._text: list[str] = []

    def read(self, root: Tag) -> None:
        """Read what is below a tag."""
        open_tags: list[tuple[Tag, Iterator[object]]] = [(root, iter(root.contents))]
        while open_tags:
            tag, children = open_tags[-1]
            child = next(children, None)
            if child is None:
                open_tags.pop()
                if open_tags:
                    self._leave(tag)
            elif isinstance(child, Tag):
                if child.name not in _SKIPPED and not _SKIPPED_CLASSES & _classes(child):
                    self._enter(child)
                    open_tags.append((child, iter(child.contents)))
            elif isinstance(child, NavigableString) and not isinstance(child, PreformattedString):
                self._say(str(child))

    def _say(self, text: str) -> None:
        if self._captions and self._containers:
            self._containers[-1].caption.append(text)
        elif self._paragraphs or self._headings:
            self._text.append(text)

    def _enter(self, tag: Tag) -> None:
        if tag.name == "img" and any(name.startswith("mwe-math") for name in _classes(tag)):
            self._say(_attribute(tag, "alt"))  # a formula, as LaTeX
        elif tag.name == "img":
            self._add_image(tag)
        elif tag.name in ("br", "td", "li"):
            self._say(" ")
        if _is_container(tag):
            self._containers.append(_Container())
        if _is_caption(tag):
            self._captions += 1
        elif tag.name in _HEADINGS:
            self._end_paragraph()
            self._headings += 1
        elif tag.name == "p" and not self._captions:
            # A p that is never closed ends where the next one begins.
            self._end_paragraph()
        if tag.name == "p":
            self._paragraphs += 1

    def _leave(self, tag: Tag) -> None:
        if _is_caption(tag):
            self._captions -= 1
        elif tag.name in _HEADINGS:
            self._headings -= 1
            heading, self._text = _words("".join(self._text)), []
            self.sections.append(_Section(heading))
        if tag.name == "p":
            self._paragraphs -= 1
            if not self._captions:
                self._end_paragraph()
        if _is_container(tag):
            container = self._containers.pop()
            caption = _words("".join(container.caption))
            for image in container.images:
                image.caption = image.caption or caption
            if self._containers:
                self._containers[-1].images += container.images

    def _end_paragraph(self) -> None:
        text, self._text = _words("".join(self._text)), []
        if text:
            self.sections[-1].paragraphs.append(text)

    def _add_image(self, tag: Tag) -> None:
        addresses = tuple(dict.fromkeys(self._addresses(tag)))
        sides = [_pixels(_attribute(tag, name)) for name in ("width", "height")]
        if not addresses:
            self.left_out["images without an address"] += 1
        elif urlsplit(addresses[-1]).path.lower().endswith(".svg"):
            self.left_out["images that are vector graphics"] += 1
        elif any(side is not None and side < _SMALLEST_SIDE for side in sides):
            self.left_out[f"images shown smaller than {_SMALLEST_SIDE} pixels"] += 1
        elif self._images == MOST_IMAGES:
            self.left_out[f"images beyond a page's first {MOST_IMAGES}"] += 1
        else:
            self._images += 1
            alternative = _words(_attribute(tag, "alt"))
            image = _Image(addresses, "" if _FILE_NAME.fullmatch(alternative) else alternative)
            self.sections[-1].images.append(image)
            if self._containers:
                self._containers[-1].images.append(image)

    def _addresses(self, tag: Tag) -> Iterator[str]:
        """The original where it can be told, then the largest copy."""
        copies = [(0.0, _attribute(tag, "data-src") or _attribute(tag, "src"))]
        for copy in re.split(r",\s+", _attribute(tag, "srcset") or _attribute(tag, "data-srcset")):
            address, _, size = copy.strip().partition(" ")
            copies.append((_number(size.strip()[:-1]), address))
        for _, address in sorted(copies, key=lambda copy: -copy[0]):
            found = _join(self._base, address.strip())
            if address and urlsplit(found).scheme in ("http", "https"):
                if (thumb := _WIKIMEDIA_THUMB.fullmatch(found)) is not None:
                    yield thumb[1] + thumb[2]
                yield found
                return


def name_of(url: str) -> str:
    """The file's name in an address, for people."""
    return unquote(urlsplit(url).path.rpartition("/")[2])[:100]


def _is_container(tag: Tag) -> bool:
    return tag.name == "figure" or bool(_CONTAINERS & _classes(tag))


def _is_caption(tag: Tag) -> bool:
    return tag.name == "figcaption" or bool(_CAPTIONS & _classes(tag))


def _classes(tag: Tag) -> set[str]:
    found = tag.get("class")
    return set(found) if isinstance(found, list) else set()


def _attribute(tag: Tag, name: str) -> str:
    found = tag.get(name)
    return found if isinstance(found, str) else ""


def _join(base: str, address: str) -> str:
    """The whole address, without a fragment; empty where it is none, or too long for one."""
    try:
        found = urljoin(base, address[:_LONGEST_ADDRESS]).partition("#")[0]
        urlsplit(found)
    except ValueError:
        return ""
    return found if len(address) < _LONGEST_ADDRESS else ""


def _pixels(text: str) -> float | None:
    return _number(text.removesuffix("px")) or None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _words(text: str) -> str:
    return _SPACE.sub(" ", text).strip()
