"""ClientWatch: whether this client keeps up with the load that it makes."""

import asyncio
import time
from dataclasses import dataclass

from ossquant.bench.spread import quantile

TICK = 0.02  # seconds between two looks at the event loop
MAX_LAG = 0.010  # seconds by which times may be late before they are no result
MAX_CPU_SHARE = 0.90  # of one core: Python's event loop has no more


@dataclass(frozen=True)
class ClientLoad:
    """How late the event loop ran (95th percentile, seconds), and how much of a core the client took."""

    lag: float
    cpu_share: float

    @property
    def saturated(self) -> str | None:
        """Say why the client is not to be believed, if so."""
        if self.cpu_share > MAX_CPU_SHARE:
            return f"the client is saturated: {self.cpu_share:.0%} of a core"
        if self.lag > MAX_LAG:
            return f"the client is saturated, or this machine busy: its clock reads {self.lag * 1000:.0f} ms late"
        return None


class ClientWatch:
    """Measures an event loop from within; an async context."""

    def __init__(self) -> None:
        self._lags: list[float] = []

    async def __aenter__(self) -> "ClientWatch":
        self._started, self._cpu = time.perf_counter(), time.process_time()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *caught: object) -> None:
        self._task.cancel()
        self._cpu = time.process_time() - self._cpu
        self._seconds = time.perf_counter() - self._started

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self._lags.append(time.perf_counter() - due)

    def result(self) -> ClientLoad:
        """Tell, after the context's end."""
        return ClientLoad(quantile(self._lags, 0.95) if self._lags else 0.0, self._cpu / self._seconds)
