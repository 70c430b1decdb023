import asyncio
import time

from ossquant.bench.watch import ClientLoad, ClientWatch


def watched(work: float, pause: float) -> ClientLoad:
    """Watch a loop that works and pauses in turns for a second."""

    async def run() -> ClientLoad:
        async with ClientWatch() as watch:
            until = time.perf_counter() + 1
            while time.perf_counter() < until:
                began = time.thread_time()
                while time.thread_time() - began < work:
                    pass
                await asyncio.sleep(pause)
        return watch.result()

    return asyncio.run(run())


def test_a_client_that_cannot_keep_up_is_found() -> None:
    """A loop that is held for 50 ms at a time, or never rests, is saturated."""
    held = watched(work=0.05, pause=0.001)
    assert held.saturated
    assert held.lag > 0.01


def test_an_idle_client_is_not_saturated() -> None:
    """A loop that waits takes little of a core; a busy machine may make it late, but not always."""
    loads = [watched(work=0.0, pause=0.05) for _ in range(5)]
    assert all(load.cpu_share < 0.5 for load in loads)
    assert any(load.saturated is None for load in loads)
