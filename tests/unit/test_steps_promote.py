"""The steps behind the pipelines promote and rollback, on a real registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RegistryError
from manyeyes.harness.base import Reporter
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import read_aliases
from manyeyes.steps.promote_version import promote_version
from manyeyes.steps.restore_previous import restore_previous
from tests.evaluation_fakes import make_snapshot
from tests.registry_store import IMAGES, make_candidate, put, store_uri

NAME = "for-people"
REPORTER = Reporter("test")


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    uri = store_uri(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def tag(version: int, name: str) -> str | None:
    found = connect().client.get_model_version(NAME, str(version)).tags.get(name)
    return None if found is None else str(found)


def test_aliases_move_with_a_reason_and_the_page_says_where(snapshot: Snapshot, tmp_path: Path) -> None:
    put(NAME, make_candidate(tmp_path / "good", snapshot))
    put(NAME, make_candidate(tmp_path / "bad", snapshot, floor=101))
    assert read_aliases(NAME) == {"challenger": 1, "champion": 1}

    with pytest.raises(RegistryError, match="gate=failed"):
        promote_version(REPORTER, model=NAME, version="2", reason="try it")
    with pytest.raises(RegistryError, match="reason is empty"):
        promote_version(REPORTER, model=NAME, version="2", reason=" ", force=True)
    with pytest.raises(RegistryError, match="an earlier champion"):
        restore_previous(REPORTER, model=NAME, reason="back")
    assert read_aliases(NAME) == {"challenger": 1, "champion": 1}

    forced = promote_version(REPORTER, model=f" {NAME} ", version="2", reason="a <b>demo</b> on Friday", force=True)
    assert read_aliases(NAME) == {"challenger": 1, "champion": 2, "previous": 1}
    assert forced.values["moves"] == ["champion from version 1 to version 2", "previous from none to version 1"]
    assert (tag(2, "promotion"), tag(2, "promotion_reason")) == ("forced", "a <b>demo</b> on Friday")
    assert "champion from version 1 to version 2" in forced.html
    assert "a &lt;b&gt;demo&lt;/b&gt; on Friday" in forced.html
    assert "| champion | version 1 | version 2 | moved |" in forced.markdown

    back = restore_previous(REPORTER, model=NAME, reason="the demo is over")
    assert read_aliases(NAME) == {"challenger": 1, "champion": 1, "previous": 2}
    assert back.values["moves"] == ["champion from version 2 to version 1", "previous from version 1 to version 2"]
    assert tag(1, "promotion_reason") == "the demo is over"

    again = promote_version(REPORTER, model=NAME, version="challenger", reason="as it was")
    assert again.values["moves"] == []
    assert "no alias moved" in again.headline


def test_unknown_model_or_alias_names_what_there_is(snapshot: Snapshot, tmp_path: Path) -> None:
    put("known", make_candidate(tmp_path / "one", snapshot))
    with pytest.raises(RegistryError, match='Did you mean "known"'):
        promote_version(REPORTER, model="knwon", version="1", reason="why not")
    with pytest.raises(RegistryError, match='Did you mean "challenger"'):
        promote_version(REPORTER, model="known", version="chalenger", reason="why not")
    with pytest.raises(RegistryError, match='Did you mean "known"'):
        restore_previous(REPORTER, model="knwon", reason="why not")
