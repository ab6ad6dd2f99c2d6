from __future__ import annotations

import pytest

from manyeyes.evaluation.benchmarks import rules as yes_no


@pytest.mark.parametrize(
    ("response", "pope", "mme", "mme_lmms", "vlmevalkit"),
    [
        ("yes", "yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no", "no"),
        ("No, there is none", "no", "no", "no", "no"),
        ("I think yes", "yes", None, None, "yes"),
        ("now", "yes", "no", "no", None),
        ("not really", "no", "no", "no", None),
        ("nothing", "yes", "no", "no", None),
        ("eyes", "yes", "yes", "yes", None),
        ("Yes, there is no dog", "no", "yes", "yes", None),
        ("There is a dog. No cat.", "yes", None, None, "no"),  # POPE reads the first sentence
        ("NO", "yes", "no", "no", "no"),  # POPE knows No and no
        ("nope", "yes", "no", "no", None),
        ("y", "yes", None, "yes", None),
        ("   no", "no", None, "no", "no"),  # only one space of the four characters is left for the word
        ("y.e.s", "yes", None, "yes", "yes"),
        ("", "yes", None, None, None),
    ],
)
def test_yes_and_no_as_four_evaluators_read_them(
    response: str, pope: str, mme: str | None, mme_lmms: str | None, vlmevalkit: str | None
) -> None:
    assert yes_no.pope_official(response) == pope
    assert yes_no.mme_official(response) == mme
    assert yes_no.mme_lmms(response) == mme_lmms
    assert yes_no.vlmevalkit_yes_no(response) == vlmevalkit
