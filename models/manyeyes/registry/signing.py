"""Signs a bundle with a key, and checks that a bundle carries the signature of one.

The signature is over ``manifest.json``, which has the sha256 of every file that runs, and over the card and the SBOM
beside it. It is OpenSSF's: a Sigstore bundle of a DSSE envelope, which ``model_signing verify key`` reads as well.
No torch and no MLflow here: a server that only checks a folder needs neither.

Source:
    https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from manyeyes.errors import BundleError, RegistryError
from manyeyes.runtime.bundle_contents import MANIFEST, check_files, choose_variant, needed_files, read_manifest
from manyeyes.storage import storage_errors, write_file

CARD, SBOM, SIGNATURE = "README.md", "sbom.cdx.json", "model.sig"
BESIDE = (CARD, SBOM, SIGNATURE)
"""Files of a version that no manifest lists, because they are made after the bundle has its digest."""

SIGNING_KEY, SIGNING_KEY_PASSWORD, VERIFY_KEY = (
    "MANYEYES_SIGNING_KEY",
    "MANYEYES_SIGNING_KEY_PASSWORD",
    "MANYEYES_VERIFY_KEY",
)
_HOW_TO_MAKE_KEYS = (
    "Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem; "
    "openssl ec -in KEY.pem -pubout -out PUBLIC.pem"
)


def signing_key_is_given() -> bool:
    """Whether the environment names a key to sign with."""
    return bool(os.environ.get(SIGNING_KEY))


def wanted_key(given: Path | None = None) -> Path | None:
    """The public key whose signature is asked for: the one that is given, else that of ``MANYEYES_VERIFY_KEY``."""
    return given or (Path(os.environ[VERIFY_KEY]) if os.environ.get(VERIFY_KEY) else None)


def sign_bundle(bundle: Path, *, key_file: Path | None = None) -> None:
    """Write ``model.sig`` into a bundle, over its manifest, card and SBOM.

    Args:
        bundle: Its folder; files are not compared with the manifest here.
        key_file: Private key, elliptic curve, PEM. Left out, ``MANYEYES_SIGNING_KEY`` has its path or the key itself.
            A key with a password needs ``MANYEYES_SIGNING_KEY_PASSWORD``.

    Raises:
        RegistryError: No key is given, or it is none that can sign.
        StorageError: No space, or no permission.
    """
    from model_signing.signing import Config

    given = os.environ.get(SIGNING_KEY, "")
    if key_file is None and not given:
        raise RegistryError("no key to sign with", f"{SIGNING_KEY}: a path, or the key itself", _HOW_TO_MAKE_KEYS)
    with tempfile.TemporaryDirectory(prefix="manyeyes-sign-") as name:
        scratch = Path(name)
        if key_file is None and "-----BEGIN" in given:
            key_file = scratch / "key.pem"
            key_file.touch(mode=0o600)
            key_file.write_text(given, encoding="utf-8")
        password = os.environ.get(SIGNING_KEY_PASSWORD)
        try:
            signer = Config().use_elliptic_key_signer(
                private_key=key_file or Path(given), password=password.encode() if password else None
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            # What is raised may name the path, and never the key.
            why = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
            raise RegistryError(
                f"the key to sign with cannot be used ({why})",
                "a private key on the curve P-256, P-384 or P-521, as PEM",
                f"{_HOW_TO_MAKE_KEYS}. The password of a key goes into {SIGNING_KEY_PASSWORD}.",
            ) from error
        signer.sign(_signed_files(bundle, scratch), scratch / SIGNATURE)
        with storage_errors(bundle):
            write_file(bundle / SIGNATURE, (scratch / SIGNATURE).read_bytes())


def verify_signature(bundle: Path, *, key: Path) -> None:
    """Check that a bundle's manifest, card and SBOM are what the owner of a key signed.

    Files that the manifest lists are compared with it by ``check_files``, and not here.

    Args:
        bundle: Its folder.
        key: Public key, PEM.

    Raises:
        BundleError: It is not signed, by another key, or a file was changed, added or taken away since.
        RegistryError: ``key`` is no public key.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing.verifying import Config

    try:
        verifier = Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise RegistryError(
            f"{key} cannot be used to verify ({why})",
            "a public key on the curve P-256, P-384 or P-521, as PEM",
            f"Check --verify-key or {VERIFY_KEY}. Of a private key: openssl ec -in KEY.pem -pubout -out PUBLIC.pem",
        ) from error
    if not (bundle / SIGNATURE).is_file():
        raise BundleError(
            f"the bundle is not signed: it has no {SIGNATURE}",
            f"a bundle that is signed with the key of {key}",
            "Sign it with manyeyes sign, or take a version that is.",
        )
    with tempfile.TemporaryDirectory(prefix="manyeyes-verify-") as name:
        try:
            verifier.verify(_signed_files(bundle, Path(name)), bundle / SIGNATURE)
        except InvalidSignature as error:
            raise _refused("its signature was not made with this key", key) from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            text = str(error).partition("\n")[0]
            why = "it is signed with another key" if text.startswith("Key mismatch") else text
            raise _refused(why or f"{SIGNATURE} cannot be read", key) from error


def verify_bundle(bundle: Path, *, key: Path) -> None:
    """Check a folder whole: its signature, and every file that is there against the manifest.

    Args:
        bundle: Its folder, with all variants or one.
        key: Public key, PEM.

    Raises:
        BundleError: As ``verify_signature``, or a file is missing or was changed.
        RegistryError: ``key`` is no public key.
    """
    verify_signature(bundle, key=key)
    manifest = read_manifest(bundle)
    whole = all((bundle / name).exists() for name in manifest["files"])
    check_files(bundle, manifest["files"] if whole else needed_files(manifest, choose_variant(bundle, manifest)[1]))


def _refused(why: str, key: Path) -> BundleError:
    return BundleError(
        f"the bundle is not what was signed ({why[:300]})",
        f"a signature by the key of {key}, over manifest, card and SBOM as they are",
        "Do not use this bundle: pull it again, or ask who signs your versions.",
    )


def _signed_files(bundle: Path, scratch: Path) -> Path:
    """A folder with exactly what a signature covers, so that one file more or less is seen."""
    folder = scratch / "signed"
    folder.mkdir()
    for name in (MANIFEST, CARD, SBOM):
        if (bundle / name).is_file():
            shutil.copyfile(bundle / name, folder / name)
    return folder
