"""What every part of a recipe is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ConfigDict, model_validator

from manyeyes.strict import StrictModel

# Beyond what any data set, batch or image has: a slip of the keyboard.
MAX_COUNT, MAX_BATCH, MAX_PIXELS = 10**12, 2**24, 16_384


class Strict(StrictModel):
    """A part of a recipe: unknown fields are refused, numbers are finite, and nothing changes after it was read."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Refuse ``epochs: yes``, which pydantic would read as 1."""
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(name)
            inside = set(_types_in(field.annotation)) if field else set()
            place = next(_truths(value, name), None) if inside & {int, float} and bool not in inside else None
            if place is not None:
                raise ValueError(f"{place} needs a number, not true or false")
        return data


def _types_in(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _types_in(argument)


def _truths(value: Any, place: str) -> Iterator[str]:
    """Where a field's own value is a truth value; a part of a recipe inside it looks at its fields itself."""
    if isinstance(value, bool):
        yield place
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, entry in entries:
        yield from _truths(entry, f"{place}.{key}")
