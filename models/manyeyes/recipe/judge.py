"""The language model that judges free answers."""

from __future__ import annotations

from pydantic import ConfigDict, Field, field_validator

from manyeyes.recipe.strict import Strict

API_KEY = "MANYEYES_JUDGE_KEY"
"""Environment variable that holds the key, unless ``key_from`` names another."""


class JudgeSpec(Strict):
    """A judge behind an OpenAI-compatible endpoint; the key comes from the environment and is never written."""

    model_config = ConfigDict(hide_input_in_errors=True)

    endpoint: str = Field(description="Address up to the version, for instance https://judge.example/v1.")
    model: str = Field(min_length=1, description="Name of the model there; scores compare only where it is equal.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Of the first try; what each benchmark's authors used when left out."
    )
    key_from: str = Field(default=API_KEY, min_length=1, description="Environment variable that holds the key.")
    attempts: int = Field(default=4, gt=0, le=20, description="Requests for one answer until the service gives one.")
    readings: int = Field(
        default=3, gt=0, le=10, description="Answers to one question until one can be read; each is asked warmer."
    )
    timeout_s: float = Field(default=60, gt=0, le=86_400, description="Longest time for one request; seconds.")
    concurrency: int = Field(default=4, gt=0, le=64, description="Requests at a time.")
    requests_per_minute: float | None = Field(default=None, gt=0, le=1e9, description="Rate limit; none when left out.")
    price_in: float | None = Field(default=None, ge=0, le=1e9, description="Price of a million prompt tokens.")
    price_out: float | None = Field(default=None, ge=0, le=1e9, description="Price of a million answered tokens.")
    max_unjudged: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="Share of items without a verdict up to which a score of the others is given; none by default.",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or "@" in value or "?" in value:
            raise ValueError("an address that begins with https:// or http://, without user, password or query")
        return value.rstrip("/")
