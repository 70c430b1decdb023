import asyncio
import os
import subprocess
import sys
import time

from ossquant.bench.watch import ClientLoad, ClientWatch, DeviceWatch, listeners


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


def test_a_servers_memory_is_found_by_its_port() -> None:
    """The process that listens on a port is found, and its resident memory is sampled."""
    program = "import socket, time; x = bytearray(2 * 10**8); s = socket.create_server(('127.0.0.1', 0)); "
    program += "print(s.getsockname()[1], flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        found = listeners(port)
        with DeviceWatch(port) as watch:
            time.sleep(0.3)
        server.kill()
    drawn = watch.result()
    assert [process.pid for process in found] == [server.pid] != [os.getpid()]
    assert drawn.host_bytes is not None
    assert drawn.host_bytes > 2 * 10**8


def test_where_there_is_nothing_to_see_the_reason_is_told() -> None:
    """Of a server on another machine neither power nor memory is known, and that is said of each."""
    with DeviceWatch(80, "the server is on another machine") as watch:
        pass
    drawn = watch.result()
    assert (drawn.watts, drawn.device_bytes, drawn.host_bytes) == (None, None, None)
    assert set(drawn.why.values()) == {"the server is on another machine"}
    assert set(drawn.why) == {"power_watts", "peak_device_bytes", "peak_host_bytes"}
