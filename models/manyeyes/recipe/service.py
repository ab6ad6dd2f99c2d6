"""A language model behind an endpoint: where it is, and how it may be asked."""

from __future__ import annotations

from pydantic import ConfigDict, Field, field_validator, model_validator

from manyeyes.recipe.model import Strict


class ServiceSpec(Strict):
    """An OpenAI-compatible endpoint; the key comes from the environment and is never written."""

    model_config = ConfigDict(hide_input_in_errors=True)

    endpoint: str = Field(description="Address up to the version, for instance https://judge.example/v1.")
    model: str = Field(min_length=1, description="Name of the model there; scores compare only where it is equal.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Of the first try; what the authors of each prompt used when left out."
    )
    key_from: str = Field(min_length=1, description="Environment variable that holds the key.")
    attempts: int = Field(default=4, gt=0, le=20, description="Requests for one answer until the service gives one.")
    readings: int = Field(
        default=3, gt=0, le=10, description="Answers to one question until one can be read; each is asked warmer."
    )
    timeout_s: float = Field(default=60, gt=0, le=86_400, description="Longest time for one request; seconds.")
    concurrency: int = Field(
        default=4, gt=0, le=64, description="Most requests at a time; fewer while the service is busy."
    )
    requests_per_minute: float | None = Field(default=None, gt=0, le=1e9, description="Rate limit; none when left out.")
    price_in: float | None = Field(default=None, ge=0, le=1e9, description="Price of a million prompt tokens.")
    price_out: float | None = Field(default=None, ge=0, le=1e9, description="Price of a million answered tokens.")
    max_cost: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Most that the answers may cost, those of earlier runs that are used again too; needs both prices.",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or "@" in value or "?" in value:
            raise ValueError("an address that begins with https:// or http://, without user, password or query")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _a_limit_needs_prices(self) -> ServiceSpec:
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("max_cost needs price_in and price_out: without prices nothing can be counted")
        return self
