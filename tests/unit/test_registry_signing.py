"""A signature vouches for a bundle: made with a key, asked for with its public half, refused when anything differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from model_signing._cli import main as model_signing_command

from manyeyes.errors import BundleError, RegistryError
from manyeyes.registry.signing import CARD, SBOM, SIGNATURE, sign_bundle, verify_bundle, verify_signature, wanted_key
from manyeyes.runtime.bundle_contents import DECODER, EMBED, VISION
from tests.cli_calls import call
from tests.registry_store import make_bundle
from tests.signing_keys import Keys, make_keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "release")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle", "toy")
    (folder / CARD).write_text("# a card", encoding="utf-8")
    (folder / SBOM).write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MANYEYES_SIGNING_KEY", "MANYEYES_SIGNING_KEY_PASSWORD", "MANYEYES_VERIFY_KEY"):
        monkeypatch.delenv(name, raising=False)


def change_manifest(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"data_md5": "0" * 32}), encoding="utf-8")


DAMAGE = {
    "manifest": (change_manifest, "manifest.json"),
    "card": (lambda bundle: (bundle / CARD).write_text("# another card", encoding="utf-8"), CARD),
    "no card": (lambda bundle: (bundle / CARD).unlink(), f"Missing files.*{CARD}"),
    "graph": (lambda bundle: (bundle / VISION).write_bytes(VISION.encode() + b" TOY"), f"{VISION} has sha256"),
    "no graph": (lambda bundle: (bundle / EMBED).unlink(), f"{EMBED} is missing"),
    "unsigned": (lambda bundle: (bundle / SIGNATURE).unlink(), "not signed"),
    "empty signature": (lambda bundle: (bundle / SIGNATURE).write_text(""), "not what was signed"),
    "text for a signature": (lambda bundle: (bundle / SIGNATURE).write_text("[]"), "not what was signed"),
    "bytes for a signature": (lambda bundle: (bundle / SIGNATURE).write_bytes(b"\xff\xfe\x00"), "not what was signed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_differs_from_what_was_signed_is_refused(name: str, bundle: Path, keys: Keys) -> None:
    sign_bundle(bundle, key_file=keys.private)
    verify_bundle(bundle, key=keys.public)
    damage, message = DAMAGE[name]
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle, key=keys.public)


def test_every_change_of_the_signature_itself_is_refused(bundle: Path, keys: Keys) -> None:
    sign_bundle(bundle, key_file=keys.private)
    signed = json.loads((bundle / SIGNATURE).read_text(encoding="utf-8"))
    envelope = signed["dsseEnvelope"]
    changed = [
        {},
        signed | {"dsseEnvelope": {}},
        signed | {"dsseEnvelope": None},
        signed | {"dsseEnvelope": envelope | {"signatures": []}},
        signed | {"dsseEnvelope": envelope | {"signatures": [{"sig": "AAAA"}]}},
        signed | {"dsseEnvelope": envelope | {"payload": "e30="}},
        signed | {"dsseEnvelope": envelope | {"payloadType": "text/plain"}},
        signed | {"verificationMaterial": None},
    ]
    for content in changed:
        (bundle / SIGNATURE).write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(BundleError, match="not what was signed"):
            verify_signature(bundle, key=keys.public)


def test_the_signature_of_another_bundle_or_key_is_refused(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    sign_bundle(bundle, key_file=keys.private)
    other = make_bundle(tmp_path / "other", "another")
    shutil.copyfile(bundle / SIGNATURE, other / SIGNATURE)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        verify_signature(other, key=keys.public)
    with pytest.raises(BundleError, match="signed with another key"):
        verify_signature(bundle, key=make_keys(tmp_path, "stranger").public)


def test_a_variant_alone_is_verified_by_the_files_it_has(bundle: Path, keys: Keys) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    graphs = {"vision": [VISION], "embed": [EMBED], "decoder": [DECODER]}
    whole = {"precision": dict.fromkeys(graphs, "fp32"), "graphs": graphs}
    other = {"precision": dict.fromkeys(graphs, "fp32"), "graphs": graphs | {"vision": [EMBED]}}
    content = manifest | {"variants": {"default": whole, "small": other}}
    (bundle / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    sign_bundle(bundle, key_file=keys.private)
    (bundle / VISION).unlink()
    verify_bundle(bundle, key=keys.public)


def test_the_key_comes_from_the_environment_and_goes_nowhere(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    locked = make_keys(tmp_path, "locked", password="open sesame")
    with pytest.raises(RegistryError, match="no key to sign with"):
        sign_bundle(bundle)
    monkeypatch.setenv("MANYEYES_SIGNING_KEY", str(locked.private))
    with pytest.raises(RegistryError, match="cannot be used"):
        sign_bundle(bundle)
    monkeypatch.setenv("MANYEYES_SIGNING_KEY_PASSWORD", "open sesame")
    sign_bundle(bundle)
    verify_bundle(bundle, key=locked.public)
    secret = locked.private.read_text(encoding="utf-8")
    monkeypatch.setenv("MANYEYES_SIGNING_KEY", secret)  # the key itself
    assert call(monkeypatch, "sign", str(bundle)) == 0
    monkeypatch.setenv("MANYEYES_VERIFY_KEY", str(locked.public))
    assert call(monkeypatch, "verify", str(bundle)) == 0
    said = "".join(capfd.readouterr())
    assert "is as the owner of" in said
    kept = [file for file in bundle.rglob("*.*") if secret.splitlines()[1] in file.read_text(encoding="utf-8")]
    assert (kept, secret.splitlines()[1] in said) == ([], False)

    monkeypatch.setenv("MANYEYES_SIGNING_KEY", secret.replace(secret.splitlines()[1], "bm8="))
    with pytest.raises(RegistryError, match="cannot be used") as raised:
        sign_bundle(bundle)
    assert "bm8=" not in str(raised.value)


def test_a_key_of_the_wrong_kind_says_what_is_needed(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    other = tmp_path / "rsa.pem"
    other.write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    sign_bundle(bundle, key_file=keys.private)
    for key in (other, keys.public, tmp_path / "absent.pem", bundle):
        with pytest.raises(RegistryError, match="P-256, P-384 or P-521"):
            sign_bundle(bundle, key_file=key)
    for key in (other, keys.private, tmp_path / "absent.pem", bundle):
        with pytest.raises(RegistryError, match="a public key"):
            verify_signature(bundle, key=key)


def test_the_public_key_is_the_given_one_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_key() is None
    monkeypatch.setenv("MANYEYES_VERIFY_KEY", "a.pem")
    assert (wanted_key(), wanted_key(Path("b.pem"))) == (Path("a.pem"), Path("b.pem"))


def test_the_library_s_own_command_verifies_it_too(bundle: Path, keys: Keys) -> None:
    sign_bundle(bundle, key_file=keys.private)
    verify = ["verify", "key", str(bundle), "--signature", str(bundle / SIGNATURE), "--public_key", str(keys.public)]
    done = CliRunner().invoke(model_signing_command, [*verify, "--ignore_unsigned_files"])
    assert done.exit_code == 0, done.output
    change_manifest(bundle)
    assert CliRunner().invoke(model_signing_command, [*verify, "--ignore_unsigned_files"]).exit_code == 1


def test_verifying_loads_neither_torch_nor_mlflow(bundle: Path, keys: Keys) -> None:
    sign_bundle(bundle, key_file=keys.private)
    script = (
        "import sys\nfrom pathlib import Path\nfrom manyeyes.registry.signing import verify_bundle\n"
        "verify_bundle(Path(sys.argv[1]), key=Path(sys.argv[2]))\n"
        "assert not {'torch', 'mlflow', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(bundle), str(keys.public)], check=True, timeout=200)
