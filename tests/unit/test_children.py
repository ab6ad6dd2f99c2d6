"""Errors of started processes arrive as they are."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from manyeyes.children import describe_end, pickle_error, unpickle_error
from manyeyes.errors import ManyEyesError, PreflightError


def kinds(kind: type[ManyEyesError] = ManyEyesError) -> Iterator[type[ManyEyesError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_error_arrives_with_its_class_and_its_words(kind: type[ManyEyesError]) -> None:
    if issubclass(kind, PreflightError):
        problem = {"subject": "disk", "found": "full", "needed": "space", "do": "Free some."}
        error: ManyEyesError = kind([problem], retry=True)
    else:
        error = kind("found", "needed", "Do it.", retry=True)
    arrived = unpickle_error(*pickle_error(error), where="process 2")
    assert type(arrived) is kind
    assert isinstance(arrived, ManyEyesError)
    assert arrived.as_dict() == error.as_dict()
    assert str(arrived) == str(error)
    assert arrived.__notes__[0].startswith("In process 2:")
    if isinstance(error, PreflightError):
        assert isinstance(arrived, PreflightError)
        assert arrived.problems == error.problems


def test_an_operating_system_s_error_keeps_its_number_and_its_file() -> None:
    arrived = unpickle_error(*pickle_error(OSError(28, "No space left on device", "/a/b")), where="process 2")
    assert isinstance(arrived, OSError)
    assert (arrived.errno, arrived.filename) == (28, "/a/b")


class PeculiarError(Exception):
    def __init__(self, text: str, *, refuse: bool = True) -> None:
        if refuse:
            raise ValueError("made in another way")
        super().__init__(text)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    error = PeculiarError("what happened", refuse=False)
    with pytest.raises(ValueError, match="another way"):
        pickle.loads(pickle.dumps(error))
    arrived = unpickle_error(*pickle_error(error), where="process 2")
    assert isinstance(arrived, RuntimeError)
    assert str(arrived).startswith("process 2 failed: ")
    assert str(arrived).endswith("PeculiarError: what happened")


def test_how_a_process_ended_is_said_in_words() -> None:
    assert describe_end(3) == "ended with exit code 3"
    assert describe_end(-11) == "was ended by SIGSEGV"
    assert describe_end(-9) == "was ended by SIGKILL (which the kernel sends when memory runs out)"
    assert describe_end(-200) == "was ended by signal 200"
