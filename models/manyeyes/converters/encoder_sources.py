"""Where the encoders of a published checkpoint come from, and what they say about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyeyes.converters.source import read_json, read_json_value
from manyeyes.encoders import encoder_row
from manyeyes.errors import CheckpointError, SourceError, did_you_mean
from manyeyes.sources import resolve_source

HUB = "hub"
"""Instead of a folder: every encoder from the repository and revision of its row."""

_PATTERNS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True)
class FoundEncoder:
    """What is known of an encoder outside the checkpoint.

    Attributes:
        name: Its name inside our model.
        published: What the checkpoint calls it.
        config: Its own configuration: the vision part of its ``config.json``, and over it the fields of
            ``--encoder-config``; None when there is neither.
        preprocessor: Its ``preprocessor_config.json``; None when there is none.
        path: File or folder with its weights; None when it was not found.
    """

    name: str
    published: str
    config: Mapping[str, Any] | None
    preprocessor: Mapping[str, Any] | None
    path: Path | None

    def weights(self) -> Path:
        """Where its weights are.

        Raises:
            SourceError: It was not found; says what to pass.
        """
        if self.path is None:
            raise SourceError(
                f'encoder "{self.name}" is "{self.published}", which is neither in the checkpoint nor on this machine',
                "its weights",
                f"Pass --encoders DIR, a folder that holds it (or a folder {self.name} with it in there), "
                "--encoders hub:<id>@<revision>, or --encoders hub for the published ones.",
            )
        return self.path


class EncoderSources:
    """Finds encoders.

    Args:
        where: ``--encoders``: a folder, ``dir:<folder>``, ``hub:<id>@<revision>``, or ``hub``; None for what the
            checkpoint's configuration names on this machine. Nothing is fetched unless this says so.
        configs: ``--encoder-config``: one object an encoder, by its name in our model or in the checkpoint, or by its
            number, from 0.
        checkpoint: The checkpoint's folder; relative paths in its configuration start there.
    """

    def __init__(self, where: str | None, configs: Mapping[str, Mapping[str, Any]], checkpoint: Path) -> None:
        self._where = where
        self._configs = dict(configs)
        self._checkpoint = checkpoint
        self._asked: set[str] = set()
        self._count = 0

    @property
    def given(self) -> bool:
        """Whether the user says where encoders are."""
        return self._where is not None

    def find(self, name: str, *, published: str, row: str, alone: bool = True, inside: bool = False) -> FoundEncoder:
        """Look for one encoder.

        Args:
            name: Its name inside our model.
            published: What the checkpoint calls it: a hub's id, or a path of its maker's machine.
            row: Row of ENCODERS that it is.
            alone: Whether it is the model's only encoder; the folder of ``--encoders`` may then be its own.
            inside: Whether the checkpoint holds its weights; only its configuration is then looked for, and not on a
                hub.

        Raises:
            SourceError: ``--encoders`` names something that is not there.
        """
        self._asked |= {name, published}
        path = self._path(name, published, row, alone=alone, inside=inside)
        number = str(self._count)
        self._count += 1
        given = self._configs.get(name, self._configs.get(published, self._configs.get(number)))
        own = preprocessor = None
        if path is not None and path.is_dir():
            if (path / "config.json").is_file():
                own = read_json(path / "config.json")
            if (path / "preprocessor_config.json").is_file():
                preprocessor = read_json(path / "preprocessor_config.json")
        config = None if own is None and given is None else {**_vision_part(own), **_vision_part(given)}
        return FoundEncoder(name=name, published=published, config=config, preprocessor=preprocessor, path=path)

    def check_configs(self) -> None:
        """Refuse an object of ``--encoder-config`` that no encoder asked for.

        Raises:
            CheckpointError: Names it, and the encoders that there are.
        """
        for name in self._configs:
            if name not in self._asked and name not in map(str, range(self._count)):
                raise CheckpointError(
                    f'--encoder-config has "{name}"',
                    f"the encoders of this checkpoint are {', '.join(sorted(self._asked))}",
                    did_you_mean(name, self._asked) or "Name one of them.",
                )

    def _path(self, name: str, published: str, row: str, *, alone: bool, inside: bool) -> Path | None:
        where = self._where
        if inside and where is not None and where.startswith(HUB):
            return None
        if where is None:
            named = [Path(published), self._checkpoint / published] if published else []
            return next((path for path in named if path.is_dir()), None)
        if where == HUB:
            known = encoder_row(row)
            return resolve_source(known.source, snapshot_path=None, files=known.files, parts=list(known.parts.values()))
        if where.startswith("hub:"):
            if not alone:
                raise SourceError(
                    f'--encoders is "{where}"',
                    "this checkpoint has several encoders",
                    "Pass --encoders hub for all of them, or a folder with one folder an encoder.",
                )
            return resolve_source(where, snapshot_path=None, parts=_PATTERNS)
        root = Path(where.removeprefix("dir:"))
        if not root.is_dir():
            raise SourceError(f'--encoders is "{where}"', "a folder, hub:<id>@<revision>, or hub", "Check the path.")
        folders = [root / name, root / Path(published).name, root / published, *([root] if alone else [])]
        found = next((folder for folder in folders if folder.is_dir() and any(folder.iterdir())), None)
        if found is None and not inside:
            raise SourceError(
                f'{root} has no folder "{name}" or "{Path(published).name}"',
                f'the encoder "{published}"',
                "Put it there, one folder an encoder.",
            )
        return found


def read_encoder_configs(file: Path) -> dict[str, Mapping[str, Any]]:
    """``--encoder-config``: an object with one object an encoder, or a list of them in the checkpoint's order.

    Raises:
        CheckpointError: Missing, no JSON, or something else.
    """
    values = read_json_value(file)
    if isinstance(values, list):
        values = {str(number): value for number, value in enumerate(values)}
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(
            f"{file} holds something else than objects",
            'one object an encoder, such as {"clip": {"num_attention_heads": 16}}, or a list of them',
            "Put each encoder's fields into an object of its own.",
        )
    return values


def _vision_part(config: Mapping[str, Any] | None) -> dict[str, Any]:
    config = config or {}
    # A model of images and text keeps it under vision_config; timm what its network was built with under model_args.
    part = config.get("vision_config", config.get("model_args"))
    return {**config, **part} if isinstance(part, dict) else dict(config)
