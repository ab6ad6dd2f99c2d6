from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from manyeyes.encoders import ENCODERS
from manyeyes.errors import SourceError
from manyeyes.sources import resolve_source

PACKAGE = "package:pytest/pytest/__init__.py#sha256="


def test_scratch_needs_no_files() -> None:
    assert resolve_source("scratch:", snapshot_path=None) is None


def test_folder_on_this_machine(tmp_path: Path) -> None:
    assert resolve_source(f"dir:{tmp_path}", snapshot_path=None) == tmp_path


def test_missing_folder_offers_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "clip-large").mkdir()
    with pytest.raises(SourceError, match='Did you mean "clip-large"'):
        resolve_source(f"dir:{tmp_path}/clip-larg", snapshot_path=None)


def test_snapshot_source_is_found_inside_the_snapshot(tmp_path: Path) -> None:
    (tmp_path / "pretrained/tiny-lm").mkdir(parents=True)
    found = resolve_source("snapshot:pretrained/tiny-lm", snapshot_path=tmp_path)
    assert found == (tmp_path / "pretrained/tiny-lm").resolve()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pretrained/tiny-lm", "it starts with hub:, dir:, snapshot:, package:, scratch:"),
        ("snapshots:x", 'Did you mean "snapshot"'),
        ("dir:", "something must follow dir:"),
        ("scratch:weights", "nothing follows scratch:"),
        ("snapshot:pretrained", "no snapshot here"),
        ("hub:openai/clip-vit-large-patch14", "a revision is needed"),
        ("hub:openai/clip-vit-large-patch14@", "a revision is needed"),
        ("package:pytest/pytest/__init__.py", "sha256=<64 hexadecimal digits>"),
        (f"package:no-such-package/x.pth#sha256={'0' * 64}", "pip install no-such-package"),
        (f"package:pytest/pytest/__init_.py#sha256={'0' * 64}", 'Did you mean "pytest/__init__.py"'),
        (PACKAGE + "0" * 64, "the recipe says 0000"),
    ],
)
def test_bad_source_says_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve_source(source, snapshot_path=None)


def test_snapshot_source_cannot_leave_the_snapshot(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "secret").mkdir()
    with pytest.raises(SourceError, match="inside the snapshot"):
        resolve_source("snapshot:../secret", snapshot_path=tmp_path / "snapshot")


def test_package_source_with_the_right_digest_is_found() -> None:
    digest = hashlib.sha256(Path(pytest.__file__).read_bytes()).hexdigest()
    found = resolve_source(PACKAGE + digest, snapshot_path=None)
    assert found is not None
    assert found.samefile(pytest.__file__)


def test_published_efficientnet_weights_are_the_ones_the_table_names() -> None:
    path = resolve_source(ENCODERS["efficientnet-lite0"].source, snapshot_path=None)
    assert path is not None
    assert path.suffix == ".pth"


def test_hub_source_fetches_exactly_the_named_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def fetch(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_source("hub:google/siglip@abc123", snapshot_path=None) == tmp_path
    [(repository, options)] = calls
    assert repository == "google/siglip"
    assert options["revision"] == "abc123"
    assert "*.safetensors" in options["allow_patterns"]


def test_unreachable_hub_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(SourceError, match="google/siglip@abc123") as caught:
        resolve_source("hub:google/siglip@abc123", snapshot_path=None)
    assert caught.value.retry


def test_checking_sources_imports_no_torch() -> None:
    code = "import sys, manyeyes.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
