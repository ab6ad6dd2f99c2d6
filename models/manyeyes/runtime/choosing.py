"""Multiple choice from one prefill: the option whose first token is the likeliest is the answer; nothing is written.

This is another protocol than reading a written answer: a model that would have written something else is held to the
options, and no answer is unreadable. Options that begin with the same token are told apart by the log-probabilities of
all their tokens, the end of the turn included, so that "1" can win against "10".

Greedy decoding that may only write options would start the same way; both back ends (``decoding``, and
``evaluation.torch_choosing``) decide here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from manyeyes.errors import RecordError
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, ChatTemplate, encode_answers, stop_token_ids

OptionIds = tuple[tuple[int, ...], ...]
"""Token ids of each option behind its question, the end of the turn included."""

_KEPT = 4096


class OptionEncoder:
    """Tokenises options behind the question that they belong to; equal questions once.

    Args:
        tokenizer: The language model's.
        template: The text around turns.
        system: Replaces the template's system text; an empty text leaves it out.
        max_length: Tokens that the model can take, question and answer together.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, system: str | None, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        self._max_length = max_length
        self._stop_ids = stop_token_ids(tokenizer, template)
        self._encode = lru_cache(maxsize=_KEPT)(self._encode_options)

    def encode(self, question: str, options: tuple[str, ...], *, num_images: int, prompt_length: int) -> OptionIds:
        """Token ids of each option.

        Args:
            question: Without ``<image>``.
            options: What may be answered.
            num_images: How many images stand in front of the question.
            prompt_length: Tokens of the prompt, images included.

        Raises:
            RecordError: Prompt and option are longer than the model allows.
            RecipeError: The tokenizer joins the end of the prompt with an option.
        """
        encoded = self._encode(question, options, num_images)
        # The end of the turn is looked for and never fed.
        longest = prompt_length + max(len(ids) for ids in encoded) - 1
        if longest > self._max_length:
            raise RecordError(
                f"question {question[:60]!r} with its images and its longest option is {longest} tokens long",
                f"at most {self._max_length} are allowed",
                "Shorten it, or show fewer images.",
            )
        return encoded

    def _encode_options(self, question: str, options: tuple[str, ...], num_images: int) -> OptionIds:
        turns = [("human", f"{IMAGE_PLACEHOLDER}\n" * num_images + question)]
        encoded = encode_answers(
            self._tokenizer, self._template, turns, options, stop_ids=self._stop_ids, system=self._system
        )
        return tuple(tuple(ids) for ids in encoded)


def check_choices(questions: Sequence[str], choices: Sequence[Sequence[str]]) -> None:
    """Check that there are options for every question or for none, and that they can be told apart.

    Raises:
        RecordError: Another number of entries than questions, or a question with an empty option or two equal ones.
    """
    if choices and len(choices) != len(questions):
        raise RecordError(
            f"{len(questions)} questions have {len(choices)} lists of options",
            "one list a question (an empty one where the answer is free), or none at all",
            "Mend choices.",
        )
    for question, options in zip(questions, choices, strict=False):
        stripped = [option.strip() for option in options]
        if "" in stripped or len(set(stripped)) < len(stripped):
            raise RecordError(
                f"question {question[:60]!r} has the options {list(options)}",
                "options that are not empty and that differ",
                "Mend choices.",
            )


def leading_options(scores: Sequence[float], options: Sequence[Sequence[int]]) -> list[int]:
    """Places of the options that share the likeliest first token; of equally likely ones the first option's.

    Args:
        scores: Logit of each option's first token.
        options: Token ids of each option.
    """
    best = max(range(len(options)), key=lambda place: scores[place])
    return [place for place, ids in enumerate(options) if ids[0] == options[best][0]]
