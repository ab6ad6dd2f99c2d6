"""Which Parquet files of a folder are a benchmark's: those of one split and one configuration, all of them.

The hub writes ``data/validation-00000-of-00001.parquet``, ``SUBJECT/test-00000-of-00002.parquet`` and, where it
converts, ``CONFIG/SPLIT/0000.parquet``; people write ``mmmu_val.parquet``. Of several files each has to say its split:
rows of another one have other questions, hidden answers, or both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyeyes.errors import SourceError
from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, position

_SAME = {"val": "validation", "valid": "validation", "training": "train", "testing": "test"}
_KNOWN = {*_SAME, *_SAME.values(), "dev", "testdev", "testmini", "challenge", "submission"}
_HUB_SHARD = re.compile(r"(?P<split>[A-Za-z][\w.]*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
_NAMED = 3


@dataclass(frozen=True)
class SourceFiles:
    """What is read of a source.

    Attributes:
        split: Whose files.
        files: In order.
        left_out: The source's other Parquet files.
    """

    split: str
    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    def describe(self, source: Path) -> str:
        """A sentence on which files were taken."""
        names = _name([file.relative_to(source) if file != source else Path(file.name) for file in self.files])
        total = len(self.files) + len(self.left_out)
        return f"split {self.split}: {len(self.files)} of {total} Parquet files ({names})"


def find_files(row: BenchmarkRow, source: Path, *, split: str, config: str) -> SourceFiles:
    """The files of a split and a configuration.

    Args:
        row: The benchmark.
        source: A Parquet file, which is the user's choice unless its name says another split; or a folder.
        split: Name of the split.
        config: Name of the configuration; it only counts where there are several folders.

    Raises:
        SourceError: There is none, it cannot be told which they are, or one is missing.
    """
    if source.is_file():
        found = split_of(source, source.parent)
        if found not in (None, same_split(split)):
            raise _other_split(row, f"{source} is of the split {found}", [str(found)], split)
        return SourceFiles(split, (source,))
    files = sorted(file for file in source.rglob("*.parquet") if not _is_hidden(file.relative_to(source)))
    if not files:
        kinds = Counter(file.suffix for file in source.rglob("*") if file.is_file() and file.suffix)
        others = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(_NAMED))
        raise SourceError(
            f"{source} has no Parquet files" + (f" (it has {others})" if others else ""),
            "a Parquet file, or a folder of them",
            "Check the path.",
        )
    splits = {file: split_of(file, source) for file in files}
    untold = [file for file, found in splits.items() if found is None]
    if untold == files and len(files) == 1:
        return SourceFiles(split, (files[0],))
    if untold:
        raise SourceError(
            f"{len(untold)} of {len(files)} Parquet files below {source} do not say their split "
            f"({_name([file.relative_to(source) for file in untold])})",
            "the split in the name of each file, or of its folder",
            f"Name them {split}-00000.parquet and so on, or give one file.",
        )
    chosen = [file for file, found in splits.items() if found == same_split(split)]
    if not chosen:
        there = sorted({found for found in splits.values() if found is not None})
        raise _other_split(row, f"{source} has the split{'s' * (len(there) > 1)} {', '.join(there)}", there, split)
    chosen = _of_config(row, chosen, source, split=split, config=config)
    _refuse_missing(chosen)
    return SourceFiles(split, tuple(chosen), tuple(file for file in files if file not in chosen))


def same_split(name: str) -> str:
    """One name for a split that has several: ``val`` is ``validation``; ``dev`` is not."""
    return _SAME.get(name, name)


def split_of(file: Path, source: Path) -> str | None:
    """The split that a file's name says, else the nearest folder's up to ``source`` itself; ``None`` without one."""
    shard = _HUB_SHARD.fullmatch(file.stem)
    if shard is not None:
        said = _said(shard["split"])
        return said.pop() if len(said) == 1 else shard["split"]
    names = [file.stem]
    folder = file.parent
    while folder != source:
        names.append(folder.name)
        folder = folder.parent
    for name in names:
        said = _said(name)
        if said:
            return said.pop() if len(said) == 1 else None
    own = source.resolve().name.lower()
    return same_split(own) if own in _KNOWN else None


def _said(name: str) -> set[str]:
    joined = re.sub(r"test[-_](dev|mini)", r"test\1", name.lower())
    return {same_split(word) for word in re.split(r"[^a-z]+", joined) if word in _KNOWN}


def _of_config(row: BenchmarkRow, files: list[Path], source: Path, *, split: str, config: str) -> list[Path]:
    folders = {file.parent for file in files}
    if len(folders) == 1:
        return files
    own = [file for file in files if config in file.relative_to(source).parts[:-1]]
    if own:
        return own
    # The subjects of MMMU are folders of one set; rows without ids of their own do not show what is there twice.
    if config == "default" and row.item_id is not position:
        return files
    names = _name(sorted(folder.relative_to(source) for folder in folders))
    raise SourceError(
        f"files of the split {split} are in {len(folders)} folders below {source} ({names})",
        f"one configuration of {row.hub_id}" + (f": {config}" if config != "default" else ""),
        "Give its folder: --from FOLDER.",
    )


def _refuse_missing(files: Sequence[Path]) -> None:
    sets: dict[tuple[Path, str], list[re.Match[str]]] = {}
    for file in files:
        shard = _HUB_SHARD.fullmatch(file.stem)
        if shard is not None:
            sets.setdefault((file.parent, shard["split"]), []).append(shard)
    for (folder, split), shards in sets.items():
        count = int(shards[0]["count"])
        numbers = sorted(int(shard["number"]) for shard in shards)
        if any(int(shard["count"]) != count for shard in shards) or numbers != list(range(count)):
            missing = [number for number in range(count) if number not in numbers]
            raise SourceError(
                f"{folder} has {len(shards)} files of the split {split}"
                + (f", and none of number {missing[0]:05d}" if missing else " that do not belong together"),
                f"{split}-00000-of-{count:05d}.parquet to {split}-{count - 1:05d}-of-{count:05d}.parquet, once each",
                "Get the folder again.",
            )


def _other_split(row: BenchmarkRow, found: str, there: Sequence[str], split: str) -> SourceError:
    do = f"Get the files of {split}"
    do += f", or say --split {there[0]}." if split == row.split else "."
    return SourceError(found, f"files of {split}" + (f", which {row.name} is scored on" * (split == row.split)), do)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _name(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(path.as_posix() for path in paths[:_NAMED]) + more
