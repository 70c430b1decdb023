import os
import subprocess
import sys
import time
from itertools import cycle
from types import SimpleNamespace

import pynvml
import pytest

from ossquant.bench.devices import DeviceWatch, listeners


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


def test_power_and_memory_of_nvidia_devices_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watts are the mean over time of all devices together, memory the most in use; NVML's own functions are stood in
    for, as there may be no device here."""
    watts, used = cycle([100_000, 300_000]), cycle([10, 30, 20])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: next(watts))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=next(used)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with DeviceWatch(None) as watch:
        time.sleep(0.65)
    drawn = watch.result()
    assert drawn.watts == pytest.approx(200, abs=35)
    assert drawn.device_bytes == 30
    assert set(drawn.why) == {"peak_host_bytes"}


def test_a_device_that_does_not_tell_its_power_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML refuses to say, as of a slice, power is not measured, and memory still is."""

    def refuse(handle: object) -> int:
        raise pynvml.NVMLError_NotSupported

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refuse)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=5))
    with DeviceWatch(None) as watch:
        time.sleep(0.25)
    drawn = watch.result()
    assert (drawn.watts, drawn.device_bytes) == (None, 5)
    assert "power_watts" in drawn.why
