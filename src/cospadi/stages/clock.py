"""How long a job has run, and how long it may."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """How much of a run is done: of its time, or of its steps.

    Attributes:
        limit: seconds, or None. steps: or None. before: seconds that earlier runs of the job have taken.
    """

    limit: float | None
    steps: int | None
    before: float = 0.0
    start: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.before + time.monotonic() - self.start

    def left(self, step: int, pace: float) -> float:
        """Seconds that the run still has: of its time, or at so many a step."""
        if self.steps is not None:
            return max(0.0, (self.steps - step) * pace)
        assert self.limit is not None
        return max(0.0, self.limit - self.spent)

    def done(self, step: int, closing: float = 0.0) -> float:
        """Fraction of the run that is behind after so many steps, if its end takes so many seconds."""
        if self.steps is not None:
            return step / self.steps
        assert self.limit is not None
        return self.spent / max(self.limit - closing, 1e-9)
