"""``tokenizer.json``, read or refused, and the errors of the library ``tokenizers``.

The library raises a bare ``Exception`` for what it does not understand and a panic (which is no ``Exception``) for what
its authors did not foresee, and for some files it ends the process. So a file is tried in a process of its own first.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from manyeyes.errors import ManyEyesError, RecordError
from manyeyes.runtime.sessions import memory_limit
from manyeyes.storage import hash_file, read_json_file

_TRIAL_S = 120
# Arguments: the file, and the most memory to take, in bytes.
_TRIAL = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
except (ImportError, OSError, ValueError):
    pass
try:
    from tokenizers import Tokenizer
except ImportError:
    sys.exit(2)
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in ("a", "USER: what colour is it?\\n\\nASSISTANT: red</s>", "\\u00e9\\U0001f642\\u4f60"):
        tokenizer.encode(text)
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
except BaseException as problem:
    sys.stdout.buffer.write(str(problem).encode("utf-8", "replace")[:500])
    sys.exit(1)
"""


def read_tokenizer(file: Path, *, error: type[ManyEyesError]) -> Tokenizer:
    """Read a ``tokenizer.json``; it neither cuts nor pads, whatever the file says.

    Args:
        file: The file.
        error: What is raised where it cannot be read.

    Raises:
        ManyEyesError: ``error``: missing, no JSON, no tokenizer, or one that the library does not survive.
    """
    values = read_json_file(file, error=error)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise error(f"{file} has no model", "a tokenizer.json of the library tokenizers", "Fetch it again.")
    problem = _try_in_a_process(file, hash_file(file))
    if problem:
        raise error(f"{file} {problem}", "a tokenizer that can be read is needed", "Do not use it; fetch it again.")
    with library_errors(error, found=f"{file} is no tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Encoding:
    """Tokens of a text.

    Raises:
        RecordError: The tokenizer has no token for something in it.
    """
    with library_errors(RecordError, found=f"the tokenizer cannot read {text[-60:]!r}"):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)


@contextmanager
def library_errors(error: type[ManyEyesError], *, found: str) -> Iterator[None]:
    """Say what the library reports as one of our errors.

    Args:
        error: Which.
        found: What was found.
    """
    try:
        yield
    except BaseException as problem:
        # A panic's class cannot be imported.
        if type(problem) is not Exception and type(problem).__name__ != "PanicException":
            raise
        raise error(f"{found} ({problem})", "the tokenizer of the model is needed", "Fetch it again.") from problem


@lru_cache(maxsize=64)
def _try_in_a_process(file: Path, sha256: str) -> str:
    """What goes wrong when a process reads the file; empty where nothing does, or where no process can be started."""
    del sha256  # so that a file is tried again once it has changed
    if not sys.executable:
        return ""
    command = [sys.executable, "-c", _TRIAL, str(file), str(memory_limit())]
    try:
        done = subprocess.run(command, timeout=_TRIAL_S, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return f"is not read within {_TRIAL_S} seconds"
    except OSError:
        return ""
    if done.returncode < 0:
        return f"ends the process that reads it (signal {-done.returncode})"
    return f"is no tokenizer ({done.stdout.decode('utf-8', 'replace')})" if done.returncode == 1 else ""
