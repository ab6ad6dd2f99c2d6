"""Items in, a data set of a snapshot out: what the model wrote, what was refused and why, and what it took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pydantic import Field

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.generation.interview import Asking, Interview, RefusedError, Rehearsal
from manyeyes.data.generation.page import SHOWN_REFUSALS, draw_records, render_generation
from manyeyes.data.records import ImageFile, Record, Turn, check_record
from manyeyes.data.shards import ShardWriter
from manyeyes.errors import DataError, RecordError
from manyeyes.storage import new_folder, storage_errors, write_file
from manyeyes.strict import StrictModel
from manyeyes.web.chat_client import ChatClient, ServiceUse, ask_each

REFUSED_FILE, REPORT_FILE, PAGE_FILE = "refused.jsonl", "generation.json", "generation.html"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class RefusedItem(StrictModel):
    """One line of ``refused.jsonl``."""

    id: str = Field(description="Of the item.")
    reason: str = Field(description="What was found, and what was needed.")
    text: str = Field(description="The answer as it came; empty where nothing was asked.")
    source: str = Field(description="File or address that the item is from.")


class GenerationReport(StrictModel):
    """``generation.json`` beside a generated data set."""

    kind: str = Field(description="What was generated.")
    records: int = Field(ge=0, description="Written.")
    refused: int = Field(ge=0, description="Items that gave none; each is in refused.jsonl with its reason.")
    looked_at: dict[str, int] = Field(
        default_factory=dict, description="What items were looked for in, and what was no item, in order."
    )
    refusals: dict[str, int] = Field(default_factory=dict, description="Refused items, by what they did not pass.")
    prompts: dict[str, str] = Field(description="sha256 of each prompt that was used, by its name.")
    service: ServiceUse = Field(description="Who wrote, and what this run took.")
    cost: float | None = Field(
        description="Of all answers, those that earlier runs paid for too, in the currency of the prices; null without."
    )


class Identified(Protocol):
    """Anything that an item can be."""

    @property
    def id(self) -> str:
        """Unique among the items."""

    @property
    def source(self) -> str:
        """File or address that it is from."""


@dataclass(frozen=True)
class UnusableItem:
    """A line of a source that is no item.

    Attributes:
        id: As far as it can be told.
        source: File or address that it is from.
        reason: What was found, and what was needed.
        text: An answer as it came, where one is the reason.
        step: What it did not pass.
    """

    id: str
    source: str
    reason: str
    text: str = ""
    step: str = "item"


Item = TypeVar("Item", bound=Identified)
Made = TypeVar("Made")


@dataclass(frozen=True)
class GeneratedSample:
    """What becomes a record.

    Attributes:
        images: Of the record.
        turns: Of the record.
    """

    images: tuple[ImageFile, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class ItemOutcome(Generic[Made]):
    """What came of one item.

    Attributes:
        id: Of the item.
        source: Of the item.
        made: What was made of it; ``None`` where it was refused.
        provenance: JSON.
        prompts: Digests by name.
        refusal: Why nothing was made of it.
    """

    id: str
    source: str
    made: Made | None
    provenance: str = ""
    prompts: tuple[tuple[str, str], ...] = ()
    refusal: RefusedError | None = None


def work_through(
    items: Iterable[Item | UnusableItem], make: Callable[[Item, Asking], Made], client: ChatClient
) -> Iterator[ItemOutcome[Made]]:
    """Make something of each item, several at a time.

    Args:
        items: In order; there may be any number.
        make: Asks about one item; raises ``RefusedError`` where nothing comes of it.
        client: Is asked.

    Yields:
        One outcome an item, in order; a second item of one id is refused.

    Raises:
        ServiceError: The service cannot be asked, or it would cost more than it may; what was answered is kept.
    """
    seen: set[str] = set()

    def unique() -> Iterator[Item | UnusableItem]:
        for item in items:
            repeated = item.id in seen
            seen.add(item.id)
            yield UnusableItem(item.id, item.source, "another item has this id; ids are unique") if repeated else item

    def work(item: Item | UnusableItem) -> ItemOutcome[Made]:
        if isinstance(item, UnusableItem):
            refusal = RefusedError(item.reason, item.text, step=item.step)
            return ItemOutcome(item.id, item.source, None, refusal=refusal)
        interview = Interview(client)
        try:
            made = make(item, interview)
        except RefusedError as refusal:
            return ItemOutcome(item.id, item.source, None, refusal=refusal)
        prompts = tuple(interview.prompts.items())
        return ItemOutcome(item.id, item.source, made, interview.provenance(item.source), prompts)

    return ask_each(work, unique(), client)


def rehearse(
    items: Iterable[Item | UnusableItem], make: Callable[[Item, Asking], Made], client: ChatClient
) -> Rehearsal:
    """Count what ``work_through`` would ask, without asking."""
    rehearsal = Rehearsal(client)
    for item in items:
        if not isinstance(item, UnusableItem):
            try:
                make(item, rehearsal)
            except RefusedError:
                continue
    return rehearsal


class RefusedFile:
    """Writes ``refused.jsonl`` line by line.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.steps: Counter[str] = Counter()
        self.first: list[RefusedItem] = []
        self._path = folder / REFUSED_FILE
        self._path.touch()

    def add(self, item_id: str, source: str, refusal: RefusedError) -> None:
        """Note one item."""
        facts = {"id": item_id, "reason": refusal.reason, "text": refusal.text, "source": source}
        line = RefusedItem(**{name: fact.encode(errors="backslashreplace").decode() for name, fact in facts.items()})
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
        self.steps[refusal.step] += 1
        if len(self.first) < SHOWN_REFUSALS:
            self.first.append(line)

    @property
    def count(self) -> int:
        """Items that were noted."""
        return self.steps.total()


def generate_dataset(
    items: Iterable[Item | UnusableItem],
    make: Callable[[Item, Asking], GeneratedSample],
    client: ChatClient,
    *,
    kind: str,
    out: Path,
    name: str,
    licence: str,
    looked_at: Mapping[str, int] | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _refused: None,
) -> GenerationReport:
    """Write the data set ``<name>-train`` into a snapshot folder.

    Answers are kept by the client, so that a second call, after a kill or an error, asks only what is new.

    Args:
        items: What to ask about.
        make: What becomes of one.
        client: Is asked.
        kind: What is generated, for the report.
        out: The snapshot's folder; made when missing. ``out/<name>`` is replaced, the rest stays.
        name: Small letters, digits and -.
        licence: SPDX name.
        looked_at: Counts for the report that grow while items are taken.
        on_progress: Called with the numbers of items that are done and that were refused.

    Raises:
        DataError: The name is none.
        ServiceError: As ``work_through``.
        StorageError: No space or no permission.
    """
    check_name(name)
    prompts: dict[str, str] = {}
    records = 0
    with new_folder(out / name) as folder, ShardWriter(folder, "train", provenance=True) as writer:
        refused = RefusedFile(folder)
        for outcome in work_through(items, make, client):
            prompts.update(outcome.prompts)
            try:
                writer.write(_as_record(outcome, name))
                records += 1
            except RefusedError as refusal:
                refused.add(outcome.id, outcome.source, refusal)
            on_progress(records + refused.count, refused.count)
        writer.close()
        report = GenerationReport(
            kind=kind,
            records=records,
            refused=refused.count,
            looked_at=dict(looked_at or {}),
            refusals=dict(refused.steps.most_common()),
            prompts=dict(sorted(prompts.items())),
            service=client.use,
            cost=client.spent,
        )
        write_file(folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")
        page = render_generation(report, dataset=name, samples=draw_records(folder), refused=refused.first)
        write_file(folder / PAGE_FILE, page)
    served = ", ".join(report.service.served) or report.service.model
    how = f"{kind} written by {served}; each record's provenance has its prompt and source"
    write_snapshot_manifest(out, provenance={f"{name}-train": Provenance(licence, how)})
    return report


def check_name(name: str) -> None:
    """That a data set may be called so.

    Raises:
        DataError: It may not.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f'the name is "{name}"', "small letters, digits and -", "For instance my-conversations.")


def _as_record(outcome: ItemOutcome[GeneratedSample], name: str) -> Record:
    if outcome.made is None:
        assert outcome.refusal is not None
        raise outcome.refusal
    sample = outcome.made
    record = Record(f"{name}/{outcome.id}", name, sample.images, sample.turns, outcome.provenance)
    try:
        check_record(record)
    except RecordError as error:
        said = "\n\n".join(turn.text for turn in sample.turns)
        raise RefusedError(f"{error.found}; {error.needed}", said, step="record") from error
    return record
