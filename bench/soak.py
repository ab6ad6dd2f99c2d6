"""A server for many minutes: ``python -m bench.soak [--minutes 30]``; and how fast it is: ``--figures``.

Four clients ask, stream, leave, read slowly, and send broken images and bodies that are too large. In the middle the
server is told to stop, and is started anew. Each answer must be the one of the same question asked alone, none may be
lost that was begun, and memory of the second half may grow by 5% at most. What is wrong is printed; the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from transformers import LlamaConfig

from manyeyes.recipe import load_recipe
from manyeyes.runtime.bundle import load_bundle
from manyeyes.runtime.engine import Chat, Engine
from tests import export_toys
from tests.export_toys import Toy, make_toy, picture
from tests.invariants.test_runtime_engine import QUESTIONS, make_chats
from tests.serving_toys import as_options, as_uri

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "soak.json"
CLIENTS = 4
BODY_MB = 1
GROWTH = 0.05


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """``manyeyes serve`` in a process of its own: the process, the model's name, the address."""
    command = [sys.executable, "-c", "from manyeyes.cli.main import main; main()", "serve", str(bundle), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "models")}
    process = subprocess.Popen(
        [*command, "--threads", "1", "--max-body-mb", str(BODY_MB), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition(" answers at ")
        yield process, name, url
    finally:
        process.kill()
        process.communicate()


def ask(client: httpx.Client, url: str, body: dict[str, Any], *, pause_s: float = 0.0, leave: bool = False) -> Any:
    """The text of a streamed answer; None where the client leaves; a status where the server refuses."""
    text, ended = "", False
    with client.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code
        try:
            for line in answer.iter_lines():
                if leave and text:
                    return None
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    text += "".join(choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"])
                time.sleep(pause_s)
        except httpx.TransportError as error:
            return f"LOST after {text!r}: {error!r}"
    return text if ended else f"LOST after {text!r}"


class Soak:
    """Four clients and what they saw."""

    def __init__(self, chats: list[Chat], expected: list[str], *, seed: int) -> None:
        self.chats, self.expected, self.seed = chats, expected, seed
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stopping = threading.Event()
        self.ended = threading.Event()

    def run(self, url: str, name: str, number: int) -> None:
        """One client, until the end."""
        rng = random.Random(1000 * self.seed + number)
        with httpx.Client(timeout=120) as client:
            while not self.ended.is_set():
                place = rng.randrange(len(self.chats))
                body = {**as_options(self.chats[place]), "model": name}
                kind = rng.choices(["ask", "leave", "slow", "image", "large"], [70, 8, 10, 8, 4])[0]
                if kind == "image":
                    broken = picture(place)[: rng.randrange(10, 60)]
                    body["messages"] = [
                        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": as_uri(broken)}}]}
                    ]
                elif kind == "large":
                    body["user"] = "x" * (BODY_MB * 2**20 + rng.randrange(1, 2**20))
                try:
                    found = ask(client, url, body, pause_s=0.02 * (kind == "slow"), leave=kind == "leave")
                except httpx.TransportError as error:
                    if kind != "large" and not self.stopping.is_set():
                        self.faults.append(f"{kind}: {error!r}")
                    self.counts[f"{kind}, connection closed"] += 1
                    if self.stopping.is_set():
                        time.sleep(0.05)
                    continue
                right = {"image": [400], "large": [413], "leave": [None, self.expected[place]]}
                if found not in right.get(kind, [self.expected[place]]) and not (
                    found == 503 and self.stopping.is_set()
                ):
                    self.faults.append(f"{kind}: {found!r} instead of {self.expected[place]!r}")
                self.counts[f"{kind}, {found}" if isinstance(found, int) else kind] += 1


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory that a process has, without mapped files."""
    text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


def soak(minutes: float, folder: Path) -> bool:
    """Both halves; whether nothing was wrong."""
    bundle = make_toy(folder, load_recipe("tiny")).bundle
    chats = make_chats(60, seed=21)
    with Engine(load_bundle(bundle, threads=1)) as engine:
        expected = [engine.answer(chat).text for chat in chats]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    memory: list[int] = []
    for half in (1, 2):
        with server(bundle) as (process, name, url), ThreadPoolExecutor(CLIENTS) as pool:
            run = Soak(chats, expected, seed=half)
            asking = [pool.submit(run.run, url, name, number) for number in range(CLIENTS)]
            memory, end = [], time.monotonic() + 30 * minutes
            try:
                while time.monotonic() < end:
                    time.sleep(1)
                    memory.append(resident(process))
                run.stopping.set()
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            finally:  # clients ask until then
                run.ended.set()
            for client in asking:
                client.result()
            faults += run.faults + ([f"the server ended with {code}"] if code else [])
            counts += run.counts
    # The first half of the time, caches and the arena fill.
    settled = memory[len(memory) // 2 :]
    third = max(len(settled) // 3, 1)
    early, late = statistics.mean(settled[:third]), statistics.mean(settled[-third:])
    growth = late / early - 1
    result = {
        "minutes": minutes,
        "clients": CLIENTS,
        "requests": sum(counts.values()),
        "by_kind": dict(sorted(counts.items())),
        "faults": len(faults),
        "memory_mb": [round(early / 1e6, 1), round(late / 1e6, 1)],
        "growth": round(growth, 4),
    }
    save("soak", result)
    print(json.dumps(result, indent=1))
    print(*faults[:20], sep="\n")
    return not faults and growth <= GROWTH


def make_larger_toy(folder: Path) -> Toy:
    """A toy whose language model has 25 M parameters."""
    export_toys.LlamaConfig = lambda **given: LlamaConfig(  # type: ignore[assignment,misc]
        **{
            **given,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "initializer_range": 0.05,
        }
    )
    return make_toy(folder, load_recipe("tiny"))


def figures(folder: Path, *, rounds: int) -> bool:
    """Requests a second and p95 of the first token, together and one by one, on a language model of 25 M parameters."""
    bundle = make_larger_toy(folder).bundle
    chats = [Chat.ask(QUESTIONS[seed % 3], images=picture(seed), max_new_tokens=24) for seed in range(32)]
    with Engine(load_bundle(bundle, threads=1)) as engine:
        expected = [engine.answer(chat).text for chat in chats]
    found: dict[str, list[tuple[float, float]]] = {}
    equal = True
    # 96 slots hold one conversation: one by one.
    with (
        server(bundle, "--cache-mb", "0") as (_, name, together),
        server(bundle, "--cache-mb", "0", "--max-tokens", "96") as (_, _, alone),
    ):
        for _ in range(rounds + 1):
            for clients in (1, 4, 16):
                for way, url in (("together", together), ("one by one", alone)):
                    texts, rate, first = load(url, name, chats, clients)
                    equal = equal and texts == expected
                    found.setdefault(f"{clients} clients, {way}", []).append((rate, first))
    result = {
        name: {
            "requests_per_s": round(statistics.median(rate for rate, _ in runs[1:]), 2),
            "p95_first_token_ms": round(1000 * statistics.median(first for _, first in runs[1:])),
        }
        for name, runs in found.items()
    }
    save("figures", {"rounds": rounds, "equal": equal, "rows": result})
    for name, row in result.items():
        print(f"| {name} | {row['requests_per_s']} | {row['p95_first_token_ms']} |")
    print("answers are equal" if equal else "answers DIFFER")
    return equal


def load(url: str, name: str, chats: list[Chat], clients: int) -> tuple[list[str], float, float]:
    """Texts, requests a second, and p95 of the first token in seconds."""

    def one(chat: Chat) -> tuple[str, float]:
        started, first, text = time.perf_counter(), 0.0, ""
        body = {**as_options(chat), "model": name, "stream": True}
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - started
                    text += "".join(choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"])
        return text, first

    with httpx.Client(timeout=300) as client, ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(one, chats))
        seconds = time.perf_counter() - started
    first = sorted(first for _, first in answers)
    return [text for text, _ in answers], len(chats) / seconds, first[int(0.95 * (len(first) - 1))]


def save(name: str, result: dict[str, Any]) -> None:
    """Put a result beside the others."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**kept, name: result}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--figures", action="store_true", help="measure speed instead")
    parser.add_argument("--rounds", type=int, default=3, help="for --figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manyeyes-soak-") as name:
        good = figures(Path(name), rounds=options.rounds) if options.figures else soak(options.minutes, Path(name))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
