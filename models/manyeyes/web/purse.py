"""What asking costs, and how it never costs more than it may."""

from __future__ import annotations

import threading

from manyeyes.recipe.service import ServiceSpec


class Purse:
    """Money for requests; used from several threads.

    Args:
        spec: Prices of a million tokens, and the most that may be spent; without prices nothing is counted.
    """

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self._spent = 0.0
        self._earlier = 0.0
        self._reserved = 0.0
        self._under_way = 0
        self._settled = threading.Condition()

    @property
    def spent(self) -> float | None:
        """In this run; ``None`` without prices."""
        return None if self.price(0, 0) is None else self._spent

    @property
    def total(self) -> float | None:
        """In this run, and in earlier ones for answers that were used again."""
        return None if self.price(0, 0) is None else self._spent + self._earlier

    def price(self, prompt_tokens: int, answer_tokens: int) -> float | None:
        """Of a number of tokens; ``None`` without prices."""
        if self._spec.price_in is None or self._spec.price_out is None:
            return None
        return (prompt_tokens * self._spec.price_in + answer_tokens * self._spec.price_out) / 1e6

    def add_earlier(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Count an answer that an earlier run paid for: the limit holds for all of them together."""
        with self._settled:
            self._earlier += self.price(prompt_tokens, answer_tokens) or 0.0

    def reserve(self, prompt_bytes: int, answer_tokens: int) -> float | None:
        """Set aside the most that a request can cost: no tokenizer makes more tokens than bytes.

        Where requests that are under way hold the money, it waits for what they leave.

        Returns:
            What was set aside, 0 without prices; ``None`` where there is not so much left.
        """
        most = self.price(prompt_bytes, answer_tokens) or 0.0
        limit = self._spec.max_cost
        with self._settled:

            def fits() -> bool:
                return limit is None or self._earlier + self._spent + self._reserved + most <= limit

            self._settled.wait_for(lambda: fits() or not self._under_way)
            if not fits():
                return None
            self._reserved += most
            self._under_way += 1
            return most

    def settle(self, reserved: float, cost: float | None) -> None:
        """Give back what was set aside, and spend what the request took."""
        with self._settled:
            self._under_way -= 1
            # Rounding must not leave a rest behind.
            self._reserved = self._reserved - reserved if self._under_way else 0.0
            self._spent += cost or 0.0
            self._settled.notify_all()
