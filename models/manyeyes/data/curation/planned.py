"""A curation that several machines share: what each step of the pipeline ``curate`` starts from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pydantic
from pydantic import Field

from manyeyes.data.curation.draw import list_shards
from manyeyes.data.curation.gathering import Gathering, Shard, gathering_recipe, hand_over
from manyeyes.data.curation.parts import parse_part
from manyeyes.data.curation.recipe import CurationRecipe, InputSpec
from manyeyes.data.fetching import normalise_md5
from manyeyes.data.snapshot import Snapshot, open_snapshot
from manyeyes.errors import PipelineError, RecipeError, SnapshotError
from manyeyes.storage import cache_dir
from manyeyes.strict import StrictModel


class PlannedCuration(StrictModel):
    """What a step starts from; as text, its parameter ``pinned``."""

    recipe: CurationRecipe = Field(description="All of it, or what gathering depends on.")
    data_md5: str = Field(description="Snapshot that gets the new data set, and of inputs that name none.")
    data_remote: str = Field(description="A folder, s3:// or hub: that holds all snapshots.")
    md5s: tuple[str, ...] = Field(default=(), description="Of each input's snapshot, where one is not data_md5.")
    elsewhere: dict[str, str] = Field(default={}, description="Data sets of other snapshots, with their md5.")
    out_remote: str = Field(default="", description="Where the new snapshot goes; empty where none is written.")
    code_digest: str = Field(description="With it an edited library is not answered from the cache.")

    def text(self) -> str:
        """In one line, without what has its default; ``parse_planned`` reads it back."""
        return self.model_dump_json(exclude_defaults=True)

    def for_gathering(self) -> PlannedCuration:
        """What the files of shards depend on, and nothing else of the recipe."""
        return self.model_copy(update={"recipe": gathering_recipe(self.recipe), "out_remote": ""})

    def with_inputs(self) -> PlannedCuration:
        """The same, with the snapshots of its inputs.

        Raises:
            RecipeError: An input names a folder.
            SnapshotError: Its md5 is none, or the remote lacks it.
            DataError: There is nothing to draw from.
        """
        md5s = tuple(self._read_md5(number, spec) for number, spec in enumerate(self.recipe.inputs))
        planned = self.model_copy(update={"md5s": md5s})
        others = {shard.dataset: md5s[shard.snapshot] for shard in planned.list_shards()}
        elsewhere = {name: md5 for name, md5 in others.items() if md5 != self.data_md5}
        return planned.model_copy(update={"elsewhere": elsewhere}) if elsewhere else self

    def _read_md5(self, number: int, spec: InputSpec) -> str:
        if spec.snapshot is None:
            return self.data_md5
        try:
            return normalise_md5(spec.snapshot)
        except SnapshotError as error:
            raise RecipeError(
                f'inputs.{number}.snapshot is "{spec.snapshot}", a folder of one machine',
                f"the md5 of a snapshot in {self.data_remote}, or none for that of data_md5",
                "Push it (a folder becomes a snapshot with manyeyes data import, dvc add, dvc push), and name its md5.",
            ) from error

    @cached_property
    def snapshot(self) -> Snapshot:
        """That of ``data_md5``, fetched when it is first asked for; errors as for ``open_snapshot``."""
        return self._open(self.data_md5)

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """One for each input, each opened once; errors as for ``open_snapshot``."""
        opened = {md5: self._open(md5) for md5 in dict.fromkeys(self.md5s)}
        return [opened[md5] for md5 in self.md5s] or [self.snapshot] * len(self.recipe.inputs)

    def _open(self, md5: str) -> Snapshot:
        return open_snapshot(md5=md5, remote=self.data_remote, cache_dir=cache_dir())

    def list_shards(self) -> list[Shard]:
        """The shards of all inputs, none of them fetched; errors as for ``draw.list_shards``."""
        return list_shards(self.recipe, self.snapshots)

    def gather(self, shard: Shard, *, out: Path) -> None:
        """Leave what a draw asks of a shard in a folder for ``take_over``; the shard is fetched where it is missing.

        Raises:
            SnapshotError: The shard cannot be had or is damaged, or a benchmark is not there.
            StorageError: No space or no permission.
        """
        hand_over(self._gathering.gather(shard), cache_dir=cache_dir(), out=out)

    @cached_property
    def _gathering(self) -> Gathering:
        return Gathering(self.recipe, self.snapshots, cache_dir=cache_dir())

    def read_part(self, part: str) -> list[Shard]:
        """The shards of a part, as ``parts.cut_into_parts`` gave it.

        Raises:
            PipelineError: Not such a text.
            SnapshotError: The snapshot has no such data set.
        """
        found: list[Shard] = []
        for dataset, first, end in parse_part(part):
            recipe = CurationRecipe(name="part", inputs=(InputSpec(datasets=(dataset,)),))
            owner = self._open(self.elsewhere[dataset]) if dataset in self.elsewhere else self.snapshot
            found += list_shards(recipe, [owner])[first:end]
        return found


def parse_planned(text: str) -> PlannedCuration:
    """Read ``PlannedCuration.text`` back.

    Raises:
        PipelineError: Not such a text.
    """
    try:
        return PlannedCuration.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise PipelineError(
            f"pinned is {text[:60]!r} ({error.errors()[0]['msg']})",
            "curation recipe, data and code as one text",
            "Pass on what plan_curation gave.",
        ) from error
