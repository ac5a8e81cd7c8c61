"""Speed of the last steps, and the remaining time at that speed."""

import time
from collections import deque


class Throughput:
    """A sliding window over the last steps; evaluation and saving between steps do not count."""

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._started = 0.0

    def start_step(self) -> None:
        self._started = time.monotonic()

    def end_step(self, tokens: int) -> float:
        """Record the step's real tokens (all ranks) and return its seconds."""
        seconds = time.monotonic() - self._started
        self._steps.append((seconds, tokens))
        return seconds

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, all ranks together."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else 0.0

    def seconds_for(self, steps: int) -> float:
        """Return how long `steps` more steps take at this speed."""
        mean = sum(seconds for seconds, _ in self._steps) / max(1, len(self._steps))
        return steps * mean
