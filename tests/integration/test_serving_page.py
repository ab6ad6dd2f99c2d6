"""The server's page in a real browser: an image is dropped, a question asked, and the answer appears."""

import base64
import json
import queue
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import HTMLResponse

from manyeyes.recipe import load_recipe
from manyeyes.runtime.bundle import load_bundle
from manyeyes.runtime.engine import Chat, Engine
from manyeyes.serving.app import Limits
from tests.export_toys import make_toy, picture
from tests.integration.test_report_page import CHROMIUM
from tests.serving_toys import LoadedSource, serving

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
]

QUESTION = "what colour is the circle?"
# Does what a person does, from a page around the page.
PERSON = """<!doctype html><iframe id="page" src="/" style="width:800px;height:700px;border:0"></iframe>
<script>document.getElementById("page").onload = async (event) => {
  const page = event.target.contentDocument, own = event.target.contentWindow;
  const bytes = Uint8Array.from(atob("IMAGE"), (letter) => letter.charCodeAt(0));
  const files = new own.DataTransfer();
  files.items.add(new own.File([bytes], "a.png", { type: "image/png" }));
  page.getElementById("drop").dispatchEvent(new own.DragEvent("drop", { dataTransfer: files, bubbles: true }));
  while (!page.querySelector("#images img")) await new Promise((done) => setTimeout(done, 10));
  page.getElementById("question").value = "QUESTION";
  page.getElementById("ask").click();
  while (!page.getElementById("facts").textContent && !page.querySelector("#answer.error"))
    await new Promise((done) => setTimeout(done, 10));
  await fetch("/seen", { method: "POST", body: JSON.stringify([page.getElementById("answer").textContent,
    page.getElementById("facts").textContent, page.documentElement.scrollWidth]) });
};</script>"""


def test_dropped_image_is_answered_in_the_browser(tmp_path: Path) -> None:
    bundle = load_bundle(make_toy(tmp_path, load_recipe("tiny")).bundle, threads=1)
    with Engine(bundle) as engine:
        expected = engine.answer(Chat.ask(QUESTION, images=picture(1), max_new_tokens=256)).text
    page = PERSON.replace("IMAGE", base64.b64encode(picture(1)).decode()).replace("QUESTION", QUESTION)
    seen: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    async def note(request: Request) -> None:
        seen.put(await request.body())

    with serving({"1": bundle}, LoadedSource(), Limits()) as running:
        app: Any = running.server.config.app
        app.add_api_route("/person", lambda: HTMLResponse(page))
        app.add_api_route("/seen", note, methods=["POST"])
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--remote-debugging-port=0", f"{running.url}/person"),
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
            try:
                answer, facts, width = json.loads(seen.get(timeout=120))
            finally:
                browser.terminate()
    assert answer == expected
    assert facts.startswith("toy version 1: ")
    assert width <= 800
