"""Of a hub repository only the one file of weights is fetched that a row names."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from manyeyes.encoders import ENCODERS, build_encoder, load_encoder_weights
from manyeyes.errors import SourceError
from manyeyes.sources import resolve_source

SOURCE = "hub:someone/clip@abc"


class FakeHub:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []

    def __call__(self, repository: str, name: str, *, revision: str) -> str:
        self.asked.append((repository, name, revision))
        if not (self.folder / name).is_file():
            raise LocalEntryNotFoundError(f"{name} is not in the cache")
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return fake


def test_first_file_that_is_there_is_fetched_and_no_other(hub: FakeHub) -> None:
    row = ENCODERS["dfn-clip-l14-224"]
    (hub.folder / row.files[1]).touch()
    assert resolve_source(SOURCE, snapshot_path=None, files=row.files) == hub.folder / row.files[1]
    assert hub.asked == [("someone/clip", name, "abc") for name in row.files[:2]]


def test_repository_with_none_of_them_says_so(hub: FakeHub) -> None:
    with pytest.raises(SourceError, match="is not in the cache") as caught:
        resolve_source(SOURCE, snapshot_path=None, files=("a.safetensors", "b.bin"))
    assert caught.value.retry


def test_weights_of_a_row_load_from_that_file(hub: FakeHub) -> None:
    name = "vit-l16-224-in21k"
    encoder = build_encoder(name, small=True)
    torch.save(encoder.net.state_dict(), hub.folder / "weights.pth")
    path = resolve_source(SOURCE, snapshot_path=None, files=("weights.pth",))
    assert path is not None
    other = build_encoder(name, small=True)
    load_encoder_weights(other, name, path)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(encoder.eval()(pixels), other.eval()(pixels))


def test_each_folder_layout_of_a_row_is_read(tmp_path: Path) -> None:
    """A row's own file names come first, in their order; ``model.safetensors`` is always accepted."""
    name = "clip-l14-336"
    first, second = (build_encoder(name, small=True) for _ in range(2))
    torch.save(first.net.state_dict(), tmp_path / "pytorch_model.bin")
    load_encoder_weights(second, name, tmp_path)
    assert torch.equal(first.net.pos_embed, second.net.pos_embed)


def test_pickle_without_its_entry_says_what_it_holds(tmp_path: Path) -> None:
    name = "eva02-l16-det-1024"
    file = tmp_path / ENCODERS[name].files[0]
    file.parent.mkdir(parents=True)
    torch.save({"optimizer": {"step": 3}, "iteration": 3}, file)
    with pytest.raises(SourceError, match="holds dict"):
        load_encoder_weights(build_encoder(name, small=True), name, tmp_path)


def test_weights_in_several_files_are_fetched_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    row = ENCODERS["stable-diffusion-v21-512"]
    parts = list(row.parts.values())
    assert resolve_source(SOURCE, snapshot_path=None, files=row.files, parts=parts) == tmp_path
    assert asked == [("someone/clip", "abc", parts)]
