"""One item's questions to a language model: each answer is read, or refused with its reason.

A kind of data is a function from an item and an ``Interview`` to what becomes a record. It asks as often as it needs;
an answer that cannot be read ends it with ``RefusedError``. A ``Rehearsal`` stands in for the model before anything is
spent: it answers each question with its prompt's example, and adds up what the questions would cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

from manyeyes.web.chat_client import ChatClient, Messages

T = TypeVar("T")

_BYTES_PER_TOKEN = 4
"""Of English text, about; only for estimates."""


class RefusedError(Exception):
    """An item that gives no record.

    Args:
        reason: What was found, and what was needed.
        text: The answer as it came; empty where nothing was asked.
        step: What it did not pass, in a word or two; refusals are counted by it.
    """

    def __init__(self, reason: str, text: str = "", *, step: str = "item") -> None:
        super().__init__(reason)
        self.reason = reason
        self.text = text
        self.step = step


@dataclass(frozen=True)
class Prompt:
    """What a language model is told before the context of an item.

    Attributes:
        name: For people; also the name of its digest in a record's provenance.
        system: The task.
        examples: Contexts and the answers to them, of our own writing.
        temperature: As a rule.
        max_tokens: Longest answer.
    """

    name: str
    system: str
    examples: tuple[tuple[str, str], ...]
    temperature: float = 0.7
    max_tokens: int = 1024

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is the same for every item; hexadecimal."""
        facts = [self.system, self.examples, self.temperature, self.max_tokens]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def messages(self, context: str) -> Messages:
        """The conversation that asks about one context."""
        turns = [{"role": "system", "content": self.system}]
        for shown, answered in self.examples:
            turns += [{"role": "user", "content": shown}, {"role": "assistant", "content": answered}]
        return [*turns, {"role": "user", "content": context}]


class Asking(Protocol):
    """Asks a question."""

    def ask(self, prompt: Prompt, context: str, read: Callable[[str], T]) -> T:
        """What was read from the answer; ``read`` raises ``RefusedError`` where it makes no sense."""

    def note(self, **facts: str) -> None:
        """Say more of how the record came about, for its provenance."""


@dataclass
class Interview:
    """Questions about one item.

    Attributes:
        client: Is asked.
        models: What the service called itself, in each answer.
        prompts: Digests by name, of what was asked.
        facts: What else is known of how it came about.
    """

    client: ChatClient
    models: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def ask(self, prompt: Prompt, context: str, read: Callable[[str], T]) -> T:
        """Ask until an answer can be read.

        Raises:
            RefusedError: None could be, or the service does not take this question.
            ServiceError: The service cannot be asked at all, or it would cost too much.
        """
        reasons: list[str] = []

        def read_or_none(text: str) -> tuple[T] | None:
            try:
                return (read(text),)
            except RefusedError as refused:
                reasons.append(refused.reason)
                return None

        verdict = self.client.ask(
            prompt.messages(context),
            read=read_or_none,
            temperature=prompt.temperature,
            max_tokens=prompt.max_tokens,
            whole=True,
        )
        if verdict.value is None:
            # The reader knows better than the client what is wrong, where it saw the last answer at all.
            unread = verdict.reason.startswith(("the answer was cut off", "it answers", "no answer", "stopped"))
            reason = verdict.reason if unread or not reasons else reasons[-1]
            raise RefusedError(f"{prompt.name}: {reason}", verdict.text, step=prompt.name)
        self.models.append(verdict.model or self.client.spec.model)
        self.prompts[prompt.name] = prompt.digest
        return verdict.value[0]

    def note(self, **facts: str) -> None:
        """Say more of how the record came about; what is empty is left out."""
        self.facts |= {name: fact for name, fact in facts.items() if fact}

    def provenance(self, source: str) -> str:
        """How the record came about, as JSON."""
        models = ", ".join(dict.fromkeys(self.models))
        return json.dumps(
            {"model": models, "prompts": self.prompts, "source": source, **self.facts}, ensure_ascii=False
        )


@dataclass
class Rehearsal:
    """Counts what questions would cost, and asks nobody.

    Attributes:
        client: Would be asked; tells which answers are kept already.
        calls: Questions that would be asked.
        kept: Questions whose answers are there.
        prompt_tokens: Of the questions that would be asked; about.
        answer_tokens: Of their answers, if they were as long as the examples; about.
        most_answer_tokens: Of their answers, if each were as long as it may be.
    """

    client: ChatClient
    calls: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    most_answer_tokens: int = 0

    def ask(self, prompt: Prompt, context: str, read: Callable[[str], T]) -> T:
        """Read the answer of the prompt's last example."""
        messages = prompt.messages(context)
        example = prompt.examples[-1][1]
        if self.client.knows(messages, temperature=prompt.temperature, max_tokens=prompt.max_tokens):
            self.kept += 1
        else:
            self.calls += 1
            asked = sum(len(message["content"].encode()) for message in messages)
            self.prompt_tokens += asked // _BYTES_PER_TOKEN + 4 * len(messages)
            self.answer_tokens += len(example.encode()) // _BYTES_PER_TOKEN
            self.most_answer_tokens += prompt.max_tokens
        return read(example)

    def note(self, **facts: str) -> None:
        """Nothing: no record comes of a rehearsal."""
