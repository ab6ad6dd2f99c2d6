"""The data engine, from topics to questions, with servers that fail, stall, redirect and talk nonsense."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from manyeyes.data.generation.dataset import GenerationReport, RefusedItem, UnusableItem
from manyeyes.data.generation.engine.engine import FigureFinder, read_check, read_question
from manyeyes.data.generation.engine.page_figures import MOST_CHARACTERS, MOST_IMAGES, read_page
from manyeyes.data.generation.engine.prompts import CHECK, QUESTION
from manyeyes.data.generation.engine.topics import (
    TOPICS,
    Link,
    Subfield,
    different_links,
    read_links,
    read_subfields,
    read_topics,
)
from manyeyes.data.generation.interview import RefusedError
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_folder
from manyeyes.errors import DataError, FetchError
from manyeyes.runtime.preprocess import decode_image
from manyeyes.web.fetcher import Fetched
from manyeyes.web.link_search import JsonLinkSearch, SearchService
from tests.cli_calls import call
from tests.judge_server import Trouble, judge_server
from tests.web_server import Page, WebServer, web_server

PARAGRAPH = "A lock lifts a boat from one level of water to another one. " * 5
QUOTE = "lifts a boat from one level"
ASKED = "Question:\nWhat does this do?\n===\nAnswer:\nIt lifts a boat.\n==="
SUPPORTED = json.dumps({"supported": True, "quote": QUOTE})


def page(body: str, head: str = "<title>Locks</title>") -> bytes:
    return f"<html><head>{head}</head><body><main>{body}</main></body></html>".encode()


def figure(name: str, caption: str = "A lock", more: str = "") -> str:
    return f'<figure><img src="{name}" {more}><figcaption>{caption}</figcaption></figure>'


def picture(size: tuple[int, int] = (160, 120), form: str = "PNG", colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format=form)
    return file.getvalue()


def answers(body: dict[str, Any], before: int) -> str:
    return {TOPICS.system: '["Canal lock"]', QUESTION.system: ASKED, CHECK.system: SUPPORTED}[
        body["messages"][0]["content"]
    ]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("manyeyes.web.fetcher.time.sleep", lambda _seconds: None)


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_figure_has_its_caption_its_section_and_its_largest_copy() -> None:
    body = (
        f'<h1>Locks</h1><p>Intro <b>here</b>.</p><h2>Operation<span class="mw-editsection">[edit]</span></h2><p>'
        f'{PARAGRAPH}<sup class="reference">[1]</sup></p><script>let x = "a word";</script><p>Second.'
        + figure("/a/1.jpg", 'A <i>lock</i>\n in "use"', 'srcset="/a/1-2x.jpg 2x, /a/1-1.5x.jpg 1.5x" alt="Gates"')
        + '<div class="thumb"><img src="//upload.wikimedia.org/c/thumb/a/ab/L.png/250px-L.png" width="250"/>'
        '<div class="thumbcaption">From above</div></div>'
        '<div class="thumb"><img src="//upload.wikimedia.org/c/thumb/a/ab/L.svg/250px-L.svg.png" alt="A plan"></div>'
    )
    found = read_page(
        page(body, '<title>Locks</title><link rel="license" href="/by-sa">'), "https://w.example/wiki/L#x"
    )
    assert found.licence == "https://w.example/by-sa"
    first, second, third = found.figures
    assert (first.title, first.section, first.caption) == ("Locks", "Operation", 'A lock in "use"')
    assert first.images == ("https://w.example/a/1-2x.jpg",)
    assert first.paragraphs == (PARAGRAPH.strip(), "Second.")
    thumb = "https://upload.wikimedia.org/c/thumb/a/ab/L.png/250px-L.png"
    assert second.images == ("https://upload.wikimedia.org/c/a/ab/L.png", thumb)
    assert second.caption == "From above"
    assert third.images == ("https://upload.wikimedia.org/c/thumb/a/ab/L.svg/250px-L.svg.png",)
    assert (third.caption, third.alternative) == ("", "A plan")
    assert first.as_text().startswith(
        'Article: Locks\nSection: Operation\nCaption: A lock in "use"\nAlternative text: Gates\n\nA lock lifts'
    )


def test_what_is_no_figure_is_counted_by_what_it_lacks() -> None:
    body = (
        f"<p>{PARAGRAPH}{figure('a.png')}{figure('a.png')}{figure('icon.png', more='width=20 height=20')}"
        f"{figure('f.svg')}{figure('n.png', '', 'alt=My_house.JPG')}"
        f"{figure('', 'none')}{figure('data:image/png;base64,AAAA')}{figure('b.png', ' ')}"
        f"<nav>{figure('menu.png')}</nav></p>"
        f"<h2>Short</h2><p>Few words.</p>{figure('c.png')}<h2>Early history</h2><p>{PARAGRAPH}</p>{figure('d.png')}"
        f"<h2>References</h2><p>{PARAGRAPH}</p>{figure('e.png')}"
    )
    found = read_page(page(body), "http://w.example/")
    assert [each.images for each in found.figures] == [("http://w.example/a.png",)]
    assert found.left_out == Counter(
        {
            "images without an address": 2,
            "images in sections of history or references": 2,
            "images that a page shows again": 1,
            "images shown smaller than 100 pixels": 1,
            "images without a caption or alternative text": 2,
            "images that are vector graphics": 1,
            "images in sections of at most 50 words": 1,
        }
    )


def test_paragraphs_that_are_never_closed_are_told_once_and_formulas_are_text() -> None:
    formula = '<math>x</math><img class="mwe-math-fallback-image-inline" alt="x^2" src="/math/svg/1"> '
    found = read_page(page(f"<p>One.<p>Two.<p>{formula}{PARAGRAPH}{figure('a.png')}"), "http://w.example/")
    assert found.figures[0].paragraphs == ("One.", "Two.", f"x^2 {PARAGRAPH}".strip())
    long = read_page(page(f"<p>{PARAGRAPH * 30}</p><p>More.</p>{figure('a.png')}"), "http://w.example/")
    assert [len(each) for each in long.figures[0].paragraphs] == [MOST_CHARACTERS]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00<",
        b"<![if gte]><!DOCTYPE html [<!ENTITY a 'b'>]>&a;",
        b"<![foo[",
        b"<div>" * 1500 + b"<img src=a.png alt=x>" * 100,
        b"<figure>" * 1500 + b"<img src=a.png alt=x>" * 100,
        b"<b>" * 1500 + b"</i>" * 1500,
        b"<p>a" * 2000,
        b"<img alt=x src='https://upload.wikimedia.org/" + b"/thumb" * 20_000 + b"'>",
        b"<base href='http://['><a rel=license href='http://['>x</a><img alt=x src='http://['>",
        "<meta charset=latin-1><p>\xe9</p>".encode("latin-1"),
        b"<?xml version='1.0'?><html xmlns='x'><body><p>&#xD800;&#0;</p></body></html>",
    ],
    ids=range(12),
)
def test_hostile_pages_have_no_figures_and_take_no_long_time(content: bytes) -> None:
    try:
        assert read_page(content, "http://w.example/").figures == ()
    except RefusedError as refused:
        assert "markup" in refused.reason  # noqa: PT017


def test_images_of_a_page_have_a_bound() -> None:
    many = "".join(figure(f"{number}.png") for number in range(MOST_IMAGES + 9))
    found = read_page(page(f"<p>{PARAGRAPH}</p>{many}"), "http://w.example/")
    assert len(found.figures) == MOST_IMAGES
    assert found.left_out == {f"images beyond a page's first {MOST_IMAGES}": 9}


# --- topics, links -----------------------------------------------------------------------------------------------


def test_fields_and_links_are_read_or_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("\ufeff# comment\n\nEarth  science: Volcanology ,  Soil science\n", encoding="utf-8")
    assert read_subfields(tmp_path / "f") == [
        Subfield("Earth science", "Volcanology"),
        Subfield("Earth science", "Soil science"),
    ]
    for text, said in (("Biology\n", ":1 is 'Biology'"), ("a: ,\n", ":1"), ("# a\n", "names no field")):
        (tmp_path / "f").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            read_subfields(tmp_path / "f")
    with pytest.raises(DataError, match="cannot be read"):
        read_subfields(tmp_path / "missing")
    (tmp_path / "f").write_bytes(b"\xff")
    with pytest.raises(DataError, match="no UTF-8"):
        list(read_links(tmp_path / "f"))
    looked_at: Counter[str] = Counter()
    links = [Link("http://a.example/1"), Link("http://a.example/1#part"), Link("http://[#"), Link("http://a.example/2")]
    found = list(different_links(iter(links), looked_at))
    assert [link.url for link in found if isinstance(link, Link)] == ["http://a.example/1", "http://a.example/2"]
    assert [link.step for link in found if isinstance(link, UnusableItem)] == ["page"]
    assert looked_at == {"links": 4, "links to a page that was read already": 1}


def test_topics_are_a_list_of_short_texts() -> None:
    for _, answer in TOPICS.examples:
        assert read_topics(answer)
    assert read_topics('```json\n["A  b", "A b", "c"]\n```') == ["A b", "c"]
    for text in ("Sure!", "[]", "{}", '["a", 1]', '["a", " "]', f'["{"x" * 121}"]', "[" * 100_000):
        with pytest.raises(RefusedError):
            read_topics(text)


def test_links_are_found_where_the_path_says_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", "se cret")
    results = {"results": [{"url": f"https://a.example/{number}"} for number in range(3)]}
    pages = {
        "/search?q=canal%20%26%20lock&k=se%20cret": Page(json.dumps(results).encode()),
        "/open?q=a": Page(json.dumps(["a", ["A"], ["https://a.example/A"]]).encode()),
        "/html?q=a": Page(b"<html>"),
        "/other?q=a": Page(b'{"results": [{"link": 1}]}'),
        "/forbidden?q=a": Page(status=403),
        "/moved?q=a": Page(status=302, headers={"Location": "/open?q=a"}),
        "/busy?q=a": Page(status=429, headers={"Retry-After": "7"}),
    }
    waits: list[float] = []
    with web_server(pages) as server:

        def search(path: str, **facts: Any) -> JsonLinkSearch:
            service = SearchService(server.url + path, interval_s=0.0, contact="me@home.example", **facts)
            return JsonLinkSearch(service, cache=tmp_path, wait=waits.append)

        keyed = search("/search?q={query}&k={key}", key_from="SEARCH_KEY")
        for _ in range(2):
            assert keyed.find_links("canal & lock", 2) == ["https://a.example/0", "https://a.example/1"]
        assert len(server.asked) == 1
        assert server.agents == {"ManyEyes/1.0 (me@home.example)"}
        assert search("/open?q={query}", links="2").find_links("a", 5) == ["https://a.example/A"]
        for path, said in (
            *(("/html", "answers b'<html>'"), ("/other", "no url"), ("/forbidden", "answers 403")),
            *(("/moved", "answers 302"), ("/busy", "answers 429")),
        ):
            with pytest.raises(FetchError, match=said) as raised:
                search(path + "?q={query}").find_links("a", 5)
            assert raised.value.retry == (path == "/busy")
        assert 7.0 in waits
        monkeypatch.delenv("SEARCH_KEY")
        with pytest.raises(FetchError, match="SEARCH_KEY is empty"):
            keyed.find_links("b", 2)
    assert not any(b"cret" in file.read_bytes() + file.name.encode() for file in tmp_path.rglob("*.json"))
    for facts in (
        {"url": "ftp://a/{query}"},
        {"url": "http://a/"},
        {"url": "http://a/{query}{other}"},
        {"url": "http://a/{query}{"},
        {"url": "http://a/{query}{key}"},
        {"url": "http://a/{query}", "header": "X-Key"},
    ):
        with pytest.raises(FetchError, match="cannot be used"):
            SearchService(**facts)  # type: ignore[arg-type]


# --- questions and checks ----------------------------------------------------------------------------------------


def test_a_question_that_speaks_of_its_source_is_refused() -> None:
    for _, answer in QUESTION.examples:
        assert read_question(answer)
    assert read_question(ASKED) == ("What does this do?", "It lifts a boat.")
    for said in ("The article says so.", "According to this, it does.", "It is in the caption.", "See <image>."):
        with pytest.raises(RefusedError, match=r"it says|it has"):
            read_question(ASKED.replace("It lifts a boat.", said))


def test_a_check_must_quote_the_text() -> None:
    for (context, answer), supported in zip(CHECK.examples, (False, True), strict=True):
        assert bool(read_check(answer, known=context.partition("===")[0])) == supported
    assert read_check('{"supported": true, "quote": "it\u2019s  A lock"}', known="Yes: It's a\nlock.")
    for text in (
        "true",
        '{"supported": "yes", "quote": "it is a lock"}',
        '{"supported": true}',
        '{"supported": true, "quote": "another thing entirely"}',
        '{"supported": true, "quote": "a"}',
    ):
        with pytest.raises(RefusedError):
            read_check(text, known="it is a lock")


# --- all of it ---------------------------------------------------------------------------------------------------


def engine(out: Path, web: WebServer, endpoint: str, *more: str) -> list[str]:
    words = ["data", "generate", "engine", str(out), "--licence", "CC-BY-SA-4.0", "--contact", "me@home.example"]
    return [*words, "--interval", "0", "--endpoint", endpoint, "--model", "writer", "--readings", "2", *more]


def test_topics_become_records_with_their_provenance_and_all_that_is_refused_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = bytearray(picture((1, 1)))
    bomb[16:24] = (10_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    names = ("good.jpg", "small.png", "bomb.png", "text.png", "short.png", "odd.png", "doubt.png", "away.png")
    good = page(f"<p>{PARAGRAPH}</p>" + "".join(figure(f"/{name}", f"Lock {name}") for name in names))
    html = {"Content-Type": "text/html; charset=utf-8"}
    pages = {
        "/good": Page(good, headers=html),
        "/again": Page(page(f"<p>{PARAGRAPH}</p>{figure('/good.jpg')}"), headers=html),
        "/pdf": Page(b"%PDF", headers={"Content-Type": "application/pdf"}),
        "/inside": Page(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data"}),
        "/loop": Page(status=302, headers={"Location": "http://localhost/"}),
        "/broken": Page(status=302, headers={"Location": "http://["}),
        "/lies": Page(b"<html>", length=10**12),
        "/good.jpg": Page(picture((160, 120), "JPEG")),
        "/small.png": Page(picture((160, 90))),
        "/bomb.png": Page(bytes(bomb)),
        "/text.png": Page(b"not an image"),
        "/short.png": Page(picture()[:60]),
        "/odd.png": Page(picture(colour="blue")),
        "/doubt.png": Page(picture(colour="green")),
        "/away.png": Page(status=302, headers={"Location": "http://10.0.0.1/x.png"}),
    }

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        system, asked = body["messages"][0]["content"], body["messages"][-1]["content"]
        if system == QUESTION.system and "odd.png" in asked:
            return "Well ..."
        if system == CHECK.system and "doubt.png" in asked:
            return '{"supported": false, "quote": ""}'
        if system == TOPICS.system and "Nothing" in asked:
            return "no list"
        return answers(body, before)

    fields, out = tmp_path / "fields.txt", tmp_path / "out"
    fields.write_text("Engineering: Canals, Nothing\n", encoding="utf-8")
    with web_server(pages) as web, judge_server(say) as server:
        paths = ("/good", "/good#part", "/again", "/pdf", "/inside", "/loop", "/broken", "/lies", "/gone")
        found = {"results": [*({"url": web.url + path} for path in paths), {"url": "file:///etc/passwd"}]}
        pages["/search?q=wikipedia%20Canal%20lock"] = Page(json.dumps(found).encode())
        words = engine(out, web, server.endpoint, "--fields", str(fields), "--allow-host", "127.0.0.1")
        words += ["--search-url", web.url + "/search?q={query}", "--min-side", "100"]
        assert call(monkeypatch, *words, "--dry-run", "--limit", "5") == 0
        assert "12 questions to ask, 0 answered already" in capsys.readouterr().out
        assert (web.asked, server.bodies) == ([], [])
        assert call(monkeypatch, *words) == 0
        asked, fetched = len(server.bodies), list(web.asked)
        assert call(monkeypatch, *words) == 0
        # Answers, pages, images and links are kept, and why a page or an image could not be had.
        assert len(server.bodies) == asked
        assert web.asked == fetched
    report = GenerationReport.model_validate_json((out / "generated-engine" / "generation.json").read_bytes())
    assert (report.records, report.refused) == (1, 15)
    assert report.refusals == {
        "page": 7,
        "image": 4,
        "small image": 1,
        "figure question 1": 1,
        "unsupported": 1,
        "topics 1": 1,
    }
    assert report.looked_at == {
        "subfields": 2,
        "topics": 1,
        "links": 10,
        "links to a page that was read already": 1,
        "pages": 2,
        "figures": 8,
        "images that another page showed": 1,
    }
    (record,) = RecordReader(open_folder(out).shards("generated-engine-train"))
    assert [turn.text for turn in record.turns] == ["<image>\nWhat does this do?", "It lifts a boat."]
    assert record.images[0].data != pages["/good.jpg"].body
    assert decode_image(record.images[0].data).shape == (120, 160, 3)
    assert json.loads(record.provenance) == {
        "model": "judge-2024-01-01",
        "prompts": {QUESTION.name: QUESTION.digest, CHECK.name: CHECK.digest},
        "source": f"{web.url}/good",
        "image": f"{web.url}/good.jpg",
        "topic": "Canal lock",
        "field": "Engineering: Canals",
        "quote": QUOTE,
    }
    lines = (out / "generated-engine" / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    refused = [RefusedItem.model_validate_json(line) for line in lines]
    texts = {item.text for item in refused if item.text}
    assert texts == {"Well ...", "Question:\nWhat does this do?\n===\nAnswer:\nIt lifts a boat.", "no list"}
    reasons = " | ".join(item.reason for item in refused)
    page_shown = (out / "generated-engine" / "generation.html").read_text(encoding="utf-8")
    for said in ("images that another page showed", "unsupported", "Well ...", "It lifts a boat."):
        assert said in page_shown
    for said in ("169.254.169.254", "localhost is at", "10.0.0.1", "application/pdf", "answers 404", "larger than"):
        assert said in reasons
    assert "one of http or https" in reasons
    assert "160 x 90 pixels" in reasons
    assert "too large" in reasons


def test_pages_from_a_file_are_read_in_its_order_and_loopback_is_closed_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {}
    for name in "ab":
        pages[f"/{name}"] = Page(page(f"<p>{PARAGRAPH}</p>{figure(f'/{name}.png', f'Lock {name}')}"))
        pages[f"/{name}.png"] = Page(picture())
    links, out = tmp_path / "links.txt", tmp_path / "out"
    with web_server(pages) as web, judge_server(answers) as server:
        links.write_text(f"{web.url}/b\n{web.url}/a\n", encoding="utf-8")
        words = engine(out, web, server.endpoint, "--links", str(links))
        assert call(monkeypatch, *words) == 2
        assert "no item gave a record" in capsys.readouterr().err
        assert (web.asked, server.bodies) == ([], [])
        assert call(monkeypatch, *words, "--allow-host", "127.0.0.1") == 0
        assert call(monkeypatch, *words, "--fields", str(links)) == 2
    sources = [
        json.loads(record.provenance)["source"]
        for record in RecordReader(open_folder(out).shards("generated-engine-train"))
    ]
    assert sources == [f"{web.url}/b", f"{web.url}/a"]


def test_a_spent_limit_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {f"/{n}": Page(page(f"<p>{PARAGRAPH}</p>{figure(f'/{n}.png', f'Lock {n}')}")) for n in range(3)}
    pages |= {f"/{n}.png": Page(picture()) for n in range(3)}
    links, out = tmp_path / "links.txt", tmp_path / "out"
    with web_server(pages) as web, judge_server(answers) as server:
        links.write_text("".join(f"{web.url}/{n}\n" for n in range(3)), encoding="utf-8")
        words = engine(out, web, server.endpoint, "--links", str(links), "--allow-host", "127.0.0.1")
        words += ["--price-in", "0", "--price-out", "100", "--concurrency", "1"]
        # A question may take 600 tokens, a check 400, and each takes 10: the second question does not fit.
        assert call(monkeypatch, *words, "--max-cost", "0.0605") == 2
        assert not (out / "generated-engine").exists()
        asked, fetched = len(server.bodies), len(web.asked)
        assert asked == 2
        assert call(monkeypatch, *words, "--max-cost", "1") == 0
        assert len(server.bodies) == 6
        assert not {"/0", "/0.png"} & set(web.asked[fetched:])


def test_a_network_that_is_away_ends_the_run_and_one_bad_page_does_not() -> None:
    class Away:
        def fetch(self, url: str) -> Fetched:
            raise FetchError(url, "a host that answers", "Try later.", retry="gone" not in url)

    found = FigureFinder(Away()).find(Link(f"http://a.example/{n}{'-gone' if n == 5 else ''}") for n in range(99))
    refused = []
    with pytest.raises(FetchError, match="20 pages in a row"):
        refused.extend(found)
    assert len(refused) == 25
