"""The registry on an MLflow server, which this starts itself: the same code, another ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes.errors import BundleError, RegistryUnreachableError
from manyeyes.registry.tracking import connect, start_parent_run, step_run
from manyeyes.registry.versions import champion_evidence, pull, rollback
from tests.evaluation_fakes import make_snapshot
from tests.ports import free_port
from tests.registry_store import IMAGES, make_candidate, put

pytestmark = [pytest.mark.integration, pytest.mark.slow]
START_TIMEOUT_S = 180


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *stores], cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
                patch.delenv(name, raising=False)
            _wait(process, folder / "server.log")
            yield f"http://127.0.0.1:{port}", folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while True:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            connect(create=True)
        except RegistryUnreachableError:
            assert time.monotonic() - started < START_TIMEOUT_S, log.read_text(encoding="utf-8")
            time.sleep(1)
        else:
            return


def test_versions_go_through_a_server(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = server
    snapshot = make_snapshot(tmp_path / "snapshot", images=IMAGES)
    monkeypatch.setenv("MANYEYES_PARENT_RUN_ID", start_parent_run("train tiny"))
    with step_run("register") as run:
        first = put("served", make_candidate(tmp_path / "one", snapshot), run_id=run.run_id)
    assert first.aliases == ("challenger", "champion")
    assert put("served", make_candidate(tmp_path / "again" / "one", snapshot)).version == 1
    evidence = champion_evidence("served", work_dir=tmp_path / "work")
    assert evidence is not None
    assert put("served", make_candidate(tmp_path / "two", snapshot, champion=evidence)).version == 2
    assert rollback("served").version == 1
    bundle = pull("served", "champion", tmp_path / "pulled")
    assert (bundle / "chat.json").read_text(encoding="utf-8") == "chat.json one"
    for stored in (folder / "artifacts").rglob("decoder_model_merged.onnx"):
        stored.write_bytes(b"x" * stored.stat().st_size)
    with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx has sha256"):
        pull("served", "champion", tmp_path / "again.bundle")
