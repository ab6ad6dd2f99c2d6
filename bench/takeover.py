"""The champion changes while clients ask: ``python -m bench.takeover [--bundle DIR]``.

``manyeyes serve NAME`` follows an alias in a registry of its own. Four clients ask without a pause; the alias goes to
and fro between two versions whose answers differ. A takeover lasts from ``promote`` until the server says that the
other version answers: it looks, fetches with checksums, loads and asks beside the one that answers, each with one
thread for its graphs. Every answer must be one version's answer to that question alone; what is neither, or lost, is
printed and the exit code is 1. DIR is a bundle of one's own; a toy of 25 M parameters is made where it is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx

from bench.soak import CLIENTS, ask, make_larger_toy, save, server
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import promote
from manyeyes.runtime.bundle import load_bundle
from manyeyes.runtime.bundle_contents import read_manifest
from manyeyes.runtime.engine import Chat, Engine
from tests.export_toys import change_decoder, picture
from tests.invariants.test_runtime_engine import QUESTIONS
from tests.serving_toys import as_options

NAME = "taken-over"
VERSIONS = ("1", "2")


class Load:
    """Clients that ask until the end.

    Attributes:
        done: Beginning and end of each request, by the clock.
        faults: What was not an answer of a version.
    """

    def __init__(self, url: str, chats: list[Chat], expected: list[set[str]]) -> None:
        self.url, self.chats, self.expected = url, chats, expected
        self.done: list[tuple[float, float]] = []
        self.faults: list[str] = []
        self.ended = threading.Event()

    def run(self, number: int) -> None:
        """One client."""
        with httpx.Client(timeout=300) as client:
            while not self.ended.is_set():
                place = number = (number + 7) % len(self.chats)
                started = time.monotonic()
                try:
                    found = ask(client, self.url, {**as_options(self.chats[place]), "model": NAME})
                except httpx.TransportError as error:
                    found = repr(error)
                self.done.append((started, time.monotonic()))
                if found not in self.expected[place]:
                    self.faults.append(f"{found!r} instead of one of {self.expected[place]}")

    def during(self, windows: list[tuple[float, float]]) -> dict[str, float]:
        """Requests that ended in some windows of time, a second, and how long one took at the 95th percentile."""
        took = [end - start for start, end in self.done if any(low <= end < high for low, high in windows)]
        seconds = sum(high - low for low, high in windows)
        p95 = statistics.quantiles(took, n=20)[-1] if len(took) > 1 else 0.0
        return {
            "seconds": round(seconds, 1),
            "requests": len(took),
            "requests_per_s": round(len(took) / seconds, 2),
            "p95_s": round(p95, 2),
        }


def register(folder: Path, bundle: Path | None) -> dict[str, Path]:
    """Two versions in a registry; the bundle of each. The second is the first with another decoder."""
    os.environ.update(MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}", MANYEYES_CACHE=str(folder / "cache"))
    first = folder / "1" / "artifacts" / "bundle"
    if bundle is None:
        make_larger_toy(first.parent)
    else:
        shutil.copytree(bundle, first)
    bundles = {"1": first, "2": change_decoder(first, folder / "2" / "artifacts" / "bundle")}
    client = connect(create=True).client
    client.create_registered_model(NAME)
    for version, bundle in bundles.items():
        tags = {"gate": "passed", "promotion": "done", "bundle_digest": str(read_manifest(bundle)["digest"])}
        client.create_model_version(NAME, source=(folder / version).as_uri(), tags=tags)
    promote(NAME, "1")
    return bundles


def answering(url: str) -> str:
    """The version that answers."""
    model: dict[str, Any] = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]
    return str(model["version"])


def measure(folder: Path, given: Path | None, *, changes: int, quiet_s: float) -> bool:
    """Load, changes and what came of it; whether nothing was lost or wrong."""
    bundles = register(folder, given)
    chats = [Chat.ask(QUESTIONS[seed % 3], images=picture(seed), max_new_tokens=24) for seed in range(16)]
    expected: list[set[str]] = [set() for _ in chats]
    for bundle in bundles.values():
        with Engine(load_bundle(bundle, threads=1)) as engine:
            for texts, chat in zip(expected, chats, strict=True):
                texts.add(engine.answer(chat).text)
    assert any(len(texts) == len(VERSIONS) for texts in expected), "both versions answer alike"
    options = ("--cache-mb", "0", "--follow-seconds", "1")
    with server(Path(NAME), *options) as (_, _, url), ThreadPoolExecutor(CLIENTS) as pool:
        load = Load(url, chats, expected)
        asking = [pool.submit(load.run, number) for number in range(CLIENTS)]
        takeovers: list[tuple[float, float]] = []
        quiet: list[tuple[float, float]] = []
        try:
            time.sleep(quiet_s)  # the first requests warm up
            for number in range(changes):
                began = time.monotonic()
                time.sleep(quiet_s)
                moved = time.monotonic()
                version = VERSIONS[(number + 1) % 2]
                promote(NAME, version)
                while answering(url) != version:
                    time.sleep(0.2)
                quiet.append((began, moved))
                takeovers.append((moved, time.monotonic()))
        finally:
            load.ended.set()
        for client in asking:
            client.result()
    result = {
        "clients": CLIENTS,
        "changes": changes,
        "bundle_mb": round(sum(file.stat().st_size for file in bundles["1"].rglob("*")) / 1e6, 1),
        "faults": len(load.faults),
        "quiet": load.during(quiet),
        "takeover": load.during(takeovers),
        "takeover_s": [round(high - low, 1) for low, high in takeovers],
        "load": round(os.getloadavg()[0], 1),
    }
    save("takeover", result)
    print(result, *load.faults[:20], sep="\n")
    return not load.faults


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=6)
    parser.add_argument("--quiet-seconds", type=float, default=10, help="between two changes")
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manyeyes-takeover-") as name:
        good = measure(Path(name), arguments.bundle, changes=arguments.changes, quiet_s=arguments.quiet_seconds)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
