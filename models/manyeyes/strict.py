"""What every file and every structure that ManyEyes writes and reads back is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Unknown fields are refused, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
