"""How many requests are inside."""

import random
from dataclasses import dataclass

from kvweave.serve.errors import Refusal


@dataclass
class Gate:
    """How many requests are inside, from their first byte to their last."""

    most: int
    inside: int = 0

    def enter(self) -> None:
        """Raises:
        Refusal: it is full.
        """
        if self.inside >= self.most:
            raise Refusal(429, "too many requests wait: try again later", code="queue_full", retry_after=self.pause)
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1

    @property
    def pause(self) -> int:
        """Seconds to wait, not the same for all, so that they do not come back at once."""
        return random.randint(1, 3)
