"""Looks for what must not leave the machine that built an image: credentials, mirrors, private certificates."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import certifi

_CHUNK = 16 * 1024 * 1024
# Where Python packages and Debian come from anywhere.
_PUBLIC_HOSTS = ("pypi.org", "pythonhosted.org", "debian.org")
_MOZILLA = Path("/usr/share/ca-certificates/mozilla")
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
# Too short or too common a value would be found everywhere and prove nothing.
_SHORTEST = 8
_CREDENTIAL = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY)", re.IGNORECASE)
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{200}")
_FORBIDDEN_NAMES = re.compile(
    r"(^|/)(\.netrc|\.pypirc|pip\.conf|\.dockercfg|\.docker/config\.json|\.aws/credentials|\.kube/config|\.git/.+"
    r"|\.env|id_(rsa|dsa|ecdsa|ed25519)|etc/apt/auth\.conf.*)$"
)


@dataclass(frozen=True)
class Leak:
    """One find: where it lies, and what it is; never its value."""

    where: str
    what: str


def machine_needles() -> dict[str, list[bytes]]:
    """What this machine was told and an image must not know, by kind."""
    found: dict[str, list[bytes]] = {"a credential": [], "a mirror's address": [], "a private certificate": []}
    for name, value in os.environ.items():
        if _CREDENTIAL.search(name) and len(value) >= _SHORTEST and not Path(value).exists():
            found["a credential"].append(value.encode())
    found["a mirror's address"] += [address.encode() for address in sorted(_mirrors())]
    for certificate in _private_certificates():
        found["a private certificate"] += forms_of_certificate(certificate)
    return found


def forms_of_certificate(certificate: bytes) -> list[bytes]:
    """How a certificate (DER) is recognised in a file: its middle, in binary and in the lines of a PEM file."""
    lines = [base64.b64encode(certificate[start : start + 48]) for start in range(0, len(certificate), 48)]
    return [certificate[len(certificate) // 2 :][:48], lines[len(lines) // 2]]


def _mirrors() -> set[str]:
    """Hosts and folders from pip's, apt's and the proxies' settings that the public ones are not."""
    settings = [value for name, value in os.environ.items() if name.lower() in ("http_proxy", "https_proxy")]
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.rpartition(".")[2] in ("index-url", "extra-index-url", "find-links", "proxy"):
            settings += value.strip("'\"").replace("\\n", " ").split()
    for file in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if file.is_file():
            lines = [
                line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
            ]
            settings += re.findall(r"\b(?:https?|ftp)://\S+", "\n".join(lines))
    addresses = set()
    for setting in settings:
        parsed = urlparse(setting)
        host = parsed.hostname or ""
        if host and not host.endswith(_PUBLIC_HOSTS) and host not in ("localhost", "127.0.0.1"):
            # A package's manual may name a public host; the whole address is what was set on this machine.
            addresses.add(setting if parsed.scheme else host)
        elif parsed.scheme in ("file", "") and parsed.path.startswith("/"):
            addresses.add(parsed.path)
        if parsed.password:
            addresses.add(parsed.password)
    return {address for address in addresses if len(address) >= _SHORTEST}


def _private_certificates() -> list[bytes]:
    """Certificates (DER) that this machine trusts and Mozilla does not."""
    public = _certificates(Path(certifi.where()))
    for file in _MOZILLA.glob("*.crt") if _MOZILLA.is_dir() else ():
        public |= _certificates(file)
    # Debian's bundle of public authorities is a package of its own: only what was put beside them is private.
    return sorted(set().union(*(_certificates(Path(file)) for file in _BUNDLES if Path(file).is_file())) - public)


def _certificates(bundle: Path) -> set[bytes]:
    text = bundle.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, flags=re.DOTALL)
    return {ssl.PEM_cert_to_DER_cert(certificate) for certificate in found}


def scan_folder(folder: Path, needles: Mapping[str, Sequence[bytes]], *, name: str) -> Iterator[Leak]:
    """Search the names and contents of all files in a folder.

    Args:
        folder: Where to look.
        needles: What to look for, by kind.
        name: What the folder is called in a find.
    """
    for root, _, files in os.walk(folder):
        for file in files:
            path = Path(root) / file
            if path.is_file() and not path.is_symlink():
                relative = path.relative_to(folder).as_posix()
                if _FORBIDDEN_NAMES.search(relative) and path.stat().st_size:
                    yield Leak(f"{name}:{relative}", "a file that holds credentials or settings")
                yield from scan_file(path, needles, name=f"{name}:{relative}")


def scan_file(path: Path, needles: Mapping[str, Sequence[bytes]], *, name: str) -> Iterator[Leak]:
    """Search one file, whatever its size, also where a find lies across two reads."""
    overlap = max((len(needle) for values in needles.values() for needle in values), default=1)
    kinds: set[str] = set()
    with path.open("rb") as file:
        # Libraries carry keys for testing themselves: GnuTLS and onnxruntime do.
        library = file.read(4) == b"\x7fELF"
        file.seek(0)
        tail = b""
        while chunk := file.read(_CHUNK):
            window = tail + chunk
            kinds |= {kind for kind, values in needles.items() if any(needle in window for needle in values)}
            if not library and b"PRIVATE KEY-----" in window and _PRIVATE_KEY.search(window):
                kinds.add("a private key")
            tail = window[-max(overlap, 512) :]
    yield from (Leak(name, kind) for kind in sorted(kinds))


def scan_text(text: str, needles: Mapping[str, Sequence[bytes]], *, name: str) -> Iterator[Leak]:
    """Search a text."""
    data = text.encode()
    for kind, values in needles.items():
        if any(needle in data for needle in values):
            yield Leak(name, kind)


def layers_of(docker: str, image: str) -> list[Path]:
    """What each layer of an image added, lowest first, in the engine's own store (overlay2).

    A file that a later layer deletes is still in the layer that made it, and is pushed with the image.
    """
    data = json.loads(_docker(docker, "image", "inspect", "--format", "{{json .GraphDriver}}", image))
    assert data["Name"] == "overlay2", f"the engine keeps layers with {data['Name']}, which this cannot read"
    lower = data["Data"].get("LowerDir", "")
    return [*(Path(path) for path in reversed(lower.split(":")) if path), Path(data["Data"]["UpperDir"])]


def scan_image(docker: str, image: str, needles: Mapping[str, Sequence[bytes]]) -> Iterator[Leak]:
    """Search an image: configuration, history, and every layer.

    Args:
        docker: The client.
        image: Reference.
        needles: What to look for, by kind.
    """
    yield from scan_text(_docker(docker, "image", "inspect", image), needles, name=f"{image}:configuration")
    history = _docker(docker, "history", "--no-trunc", "--format", "{{json .}}", image)
    yield from scan_text(history, needles, name=f"{image}:history")
    for number, layer in enumerate(layers_of(docker, image), start=1):
        yield from scan_folder(layer, needles, name=f"{image}:layer {number}")


def _docker(docker: str, *arguments: str) -> str:
    return subprocess.run([docker, *arguments], capture_output=True, text=True, check=True).stdout
