"""What an engine answers to many at once is what the bundle answers to each alone."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from manyeyes.errors import BundleError, ManyEyesError, RecordError
from manyeyes.runtime.bundle import Bundle, Group
from manyeyes.runtime.engine import AnswerPiece, Chat, ChatAnswer, Engine, Ticket, place_images
from manyeyes.runtime.sampling import Sampling
from tests.export_toys import picture

QUESTIONS = ("what colour is the circle?", "red?", "is it yes or no, and what colour is it, please?", "é🙂")
SEEDED = Sampling(temperature=0.8, top_p=0.9, seed=11)


@pytest.fixture
def engine(loaded_bundle: Bundle) -> Iterator[Engine]:
    with Engine(loaded_bundle) as engine:
        yield engine


def make_chats(count: int, *, seed: int) -> list[Chat]:
    rng = random.Random(seed)
    chats = []
    for _ in range(count):
        images = [picture(rng.randrange(4)) for _ in range(rng.randrange(3))]
        sampling = Sampling() if rng.random() < 0.6 else Sampling(temperature=0.8, top_p=0.9, seed=rng.randrange(99))
        chat = Chat.ask(
            rng.choice(QUESTIONS), images=images, max_new_tokens=rng.choice([1, 3, 12, 24]), sampling=sampling
        )
        if rng.random() < 0.3:
            turns = [*chat.turns, ("gpt", "red"), ("human", place_images("and this?", 1))]
            chat = Chat(turns, (*chat.images, picture(7)), max_new_tokens=8, sampling=sampling)
        chats.append(chat)
    return chats


def long_chats(engine: Engine, count: int) -> list[Chat]:
    """Conversations whose answers take at least 16 tokens."""
    chats = (
        Chat.ask(QUESTIONS[0], max_new_tokens=20, sampling=Sampling(temperature=0.8, seed=seed)) for seed in range(99)
    )
    return list(itertools.islice((chat for chat in chats if len(engine.answer(chat).token_ids) >= 16), count))


class Heard:
    """All that is delivered of one conversation."""

    def __init__(self) -> None:
        self.pieces: list[AnswerPiece] = []
        self.error: ManyEyesError | None = None
        self.ended = threading.Event()

    def __call__(self, piece: AnswerPiece | ManyEyesError) -> None:
        if isinstance(piece, ManyEyesError):
            self.error = piece
        else:
            self.pieces.append(piece)
        if self.error is not None or self.pieces[-1].finish is not None:
            self.ended.set()

    @property
    def answer(self) -> ChatAnswer:
        return ChatAnswer.join(self.pieces)


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], Any]) -> None:
    """Call ``before`` with the number of rows in front of every step."""
    step = engine.bundle.decoder.go_on

    def stepping(tokens: Any, *rest: Any) -> Any:
        before(len(tokens))
        return step(tokens, *rest)

    monkeypatch.setattr(engine.bundle.decoder, "go_on", stepping)


def test_engine_alone_says_what_the_plain_interface_says(engine: Engine, loaded_bundle: Bundle) -> None:
    for images in ((), (picture(0),), (picture(0, 90, 50), picture(1))):
        for question in QUESTIONS:
            plain = loaded_bundle.answer_groups([Group(images, (question,))], max_new_tokens=16)[0][0]
            found = engine.answer(Chat.ask(question, images=images, max_new_tokens=16))
            assert (found.text, found.token_ids) == (plain.text, plain.token_ids)


def test_concurrent_answers_are_those_of_each_conversation_alone(
    loaded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = make_chats(48, seed=1)
    with Engine(loaded_bundle) as engine:
        alone = [engine.answer(chat) for chat in chats]
    rng, most, rows = random.Random(2), [0], [0]
    with Engine(loaded_bundle, max_tokens=600) as engine:
        slow_down(engine, monkeypatch, rows.append)
        tickets: list[tuple[Ticket, Heard]] = []
        for chat in chats:
            heard = Heard()
            tickets.append((engine.submit(chat, heard), heard))
            most[0] = max(most[0], engine.state().tokens)
            if rng.random() < 0.2:  # one of those so far, whether it waits, runs or has ended
                rng.choice(tickets)[0].cancel()
        for ticket, heard in tickets:
            while not heard.ended.wait(0.01) and not ticket.cancelled:
                most[0] = max(most[0], engine.state().tokens)
        state = engine.state()
    assert max(rows) >= 4, "nothing was batched"
    assert most[0] <= state.max_tokens == 600
    whole = [place for place, (ticket, _) in enumerate(tickets) if not ticket.cancelled]
    assert 24 < len(whole) < 48
    for place in whole:
        assert tickets[place][1].answer == alone[place]
    for place, (ticket, heard) in enumerate(tickets):
        if ticket.cancelled:
            said = "".join(piece.text for piece in heard.pieces)
            assert alone[place].text.startswith(said)


def test_conversations_are_taken_in_as_they_came_and_only_where_they_fit(
    loaded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    with Engine(loaded_bundle, max_tokens=130) as engine:
        long, short = (Chat.ask("red?", max_new_tokens=count, sampling=SEEDED) for count in (60, 2))
        slow_down(engine, monkeypatch, lambda _rows: None)
        heard = []
        for number, chat in enumerate((long, long, short, long)):
            heard.append(Heard())

            def deliver(piece: Any, number: int = number, own: Heard = heard[-1]) -> None:
                started.append(number)
                own(piece)

            engine.submit(chat, deliver)
        assert all(own.ended.wait(60) for own in heard)
    # The short one would have fitted beside the first, and still comes after the second.
    assert list(dict.fromkeys(started)) == [0, 1, 2, 3]


def test_cancelled_answer_is_out_of_the_next_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = long_chats(engine, 3)
    alone = engine.answer(chats[0])
    rows: list[int] = []
    at_step, gate = threading.Semaphore(0), threading.Semaphore(0)

    def before(count: int) -> None:
        rows.append(count)
        at_step.release()
        gate.acquire(timeout=30)

    slow_down(engine, monkeypatch, before)
    kept, *others = heard = [Heard() for _ in chats]
    tickets = [engine.submit(chat, own) for chat, own in zip(chats, heard, strict=True)]
    for _ in chats:  # one is taken in a step
        assert at_step.acquire(timeout=30)
        gate.release()
    assert at_step.acquire(timeout=30)
    assert rows == [1, 2, 3, 3]
    seen = len(rows)
    for ticket in tickets[1:]:
        ticket.cancel()
    said = [len(own.pieces) for own in others]
    gate.release(40)
    assert kept.ended.wait(30)
    assert set(rows[seen:]) == {1}
    assert [len(own.pieces) for own in others] == said
    assert kept.answer == alone
    assert engine.state().running == 0


def test_pieces_come_one_a_token_and_stop_texts_cut_the_answer(engine: Engine) -> None:
    whole = engine.answer(Chat.ask(QUESTIONS[0], images=picture(2), max_new_tokens=16, sampling=SEEDED))
    assert len(whole.text) > 4
    stop = whole.text[3:5]
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=11, stop=("never", stop))
    pieces = list(engine.stream(Chat.ask(QUESTIONS[0], images=picture(2), max_new_tokens=16, sampling=sampling)))
    cut = ChatAnswer.join(pieces)
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)
    assert sum(piece.token_id is not None for piece in pieces) == len(cut.token_ids)


def test_log_probabilities_are_those_of_the_logits(engine: Engine, loaded_bundle: Bundle) -> None:
    group = Group((picture(1),), (QUESTIONS[0],))
    logits = loaded_bundle.answer_groups([group], first_logits=True)[0][0].first_logits
    assert logits is not None
    found = engine.answer(Chat.ask(QUESTIONS[0], images=picture(1), sampling=Sampling(top_logprobs=3)))
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    first = found.chances[0]
    assert first.token_id == found.token_ids[0] == int(logits.argmax())
    assert [value for _, value in first.top] == pytest.approx(sorted(expected, reverse=True)[:3], abs=1e-5)
    assert len(found.chances) == len(found.token_ids)


def test_images_and_prefixes_are_kept_by_content_up_to_the_bound(loaded_bundle: Bundle) -> None:
    chats = [Chat.ask(question, images=picture(seed)) for seed in (0, 1) for question in QUESTIONS[:2]]
    with Engine(loaded_bundle) as engine, Engine(loaded_bundle, cache_bytes=0) as without:
        assert [engine.answer(chat) for chat in chats] == [without.answer(chat) for chat in chats]
        state = engine.state()
        assert (state.hits, state.misses) == ({"image": 2, "prefix": 2}, {"image": 2, "prefix": 2})
        assert set(without.state().hits.values()) == {0}
        assert without.state().cache_bytes == 0
        piece = next(iter(engine.stream(chats[0])))
        assert 0 < piece.cached_tokens < piece.prompt_tokens
    with Engine(loaded_bundle, cache_bytes=state.cache_bytes // 2) as small:
        for chat in (chats[0], chats[2], chats[3], chats[0]):
            small.answer(chat)
            assert small.state().cache_bytes <= state.cache_bytes // 2
        # The one used last was there still, and the first one had gone.
        assert small.state().hits == {"image": 1, "prefix": 1}


def test_what_cannot_be_answered_is_refused_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Heard(), Heard()
    chat = Chat.ask(QUESTIONS[0], max_new_tokens=20, sampling=SEEDED)
    alone = engine.answer(chat)
    engine.submit(chat, good)
    engine.submit(Chat.ask("red?", images=b"no image"), bad)
    assert bad.ended.wait(60)
    assert isinstance(bad.error, RecordError)
    for turns, message in (([("gpt", "a")], "turn 0"), ([("human", "long " * 200)], "tokens long")):
        with pytest.raises(RecordError, match=message):
            engine.answer(Chat(turns))
    with pytest.raises(RecordError, match="<image>"):
        Chat.ask("what is <image>?")
    with pytest.raises(RecordError, match="max_new_tokens"):
        Chat.ask("red?", max_new_tokens=0)
    assert good.ended.wait(60)
    assert good.answer == alone

    def fail(*_: Any) -> Any:
        raise BundleError("decoder fails", "memory", "Ask for less.")

    monkeypatch.setattr(engine.bundle.decoder, "go_on", fail)
    with pytest.raises(BundleError, match="decoder fails"):
        engine.answer(chat)
    monkeypatch.undo()
    assert engine.answer(chat) == alone, "a failed step may not spoil what follows"


def test_conversation_that_can_never_fit_is_refused(loaded_bundle: Bundle) -> None:
    with Engine(loaded_bundle, max_tokens=30) as engine, pytest.raises(RecordError, match="30 together"):
        engine.answer(Chat.ask("red?", images=picture(0), max_new_tokens=32))


def test_defect_in_the_engine_reaches_everybody_who_waits(
    loaded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded_bundle)

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(loaded_bundle.decoder, "go_on", fail)
    heard = [Heard(), Heard()]
    for own in heard:
        engine.submit(Chat.ask("red?", sampling=SEEDED), own)
    assert all(own.ended.wait(60) for own in heard)
    assert all("ZeroDivisionError" in str(own.error) for own in heard)
    assert not engine.alive
    with pytest.raises(BundleError, match="failed"):
        engine.answer(Chat.ask("red?"))


def test_closing_finishes_what_was_taken_and_takes_no_more(
    loaded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, heard = Engine(loaded_bundle), Heard()
    (chat,) = long_chats(engine, 1)
    engine.submit(chat, heard)
    assert engine.close()
    assert heard.answer.text
    with pytest.raises(BundleError, match="closed"):
        engine.answer(chat)

    engine, late, gate = Engine(loaded_bundle), Heard(), threading.Event()
    slow_down(engine, monkeypatch, lambda _rows: gate.wait(0.3))
    engine.submit(chat, late)
    assert not engine.close(timeout_s=0.05)
    assert isinstance(late.error, BundleError)


def test_event_loop_gets_the_same_answers_and_a_cancelled_task_frees_its_row(engine: Engine) -> None:
    chats = make_chats(8, seed=3)
    alone = [engine.answer(chat) for chat in chats]

    async def ask_all() -> list[ChatAnswer]:
        async def leave() -> None:
            async for _ in engine.stream_async(Chat.ask("red?", max_new_tokens=60, sampling=SEEDED)):
                await asyncio.sleep(60)

        leaving = asyncio.create_task(leave())
        answers = await asyncio.gather(*map(engine.answer_async, chats))
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return answers

    assert asyncio.run(ask_all()) == alone
    assert engine.close()
    assert engine.state().running == 0
