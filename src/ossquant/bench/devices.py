"""What the devices draw and hold beside a load, and the memory of the process that serves."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

SAMPLE = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Drawn:
    """What devices did over a while: mean watts and most bytes in use, None where nothing says so."""

    watts: float | None
    device_bytes: int | None
    host_bytes: int | None
    why: dict[str, str] = field(default_factory=dict)


class DeviceWatch:
    """Samples power and memory in a thread; a context.

    port is where the process listens whose host memory counts, None if that is known otherwise. absent says why there
    is nothing to see on this machine, if so.
    """

    def __init__(self, port: int | None, absent: str | None = None) -> None:
        self._port, self._absent = port, absent
        self._watts: list[float] = []
        self._device: list[int] = []
        self._host: list[int] = []
        self._stop = threading.Event()

    def __enter__(self) -> "DeviceWatch":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self._absent is None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._absent is None:
            self._thread.join()

    def _sample(self) -> None:
        processes = listeners(self._port) if self._port else []
        with nvidia_handles() as handles:
            while True:
                self._look(handles, processes)
                if self._stop.wait(SAMPLE):
                    return

    def _look(self, handles: list[Any], processes: list[Any]) -> None:
        import psutil
        import pynvml

        try:
            if handles:
                self._watts.append(sum(pynvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000)
        except pynvml.NVMLError:
            self._watts.clear()  # a device that does not say, such as a slice
        try:
            if handles:
                self._device.append(sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles))
        except pynvml.NVMLError:
            self._device.clear()
        try:
            if processes:
                self._host.append(sum(process.memory_info().rss for process in processes))
        except psutil.Error:
            processes.clear()  # it has ended

    def result(self) -> Drawn:
        """Tell, after the context's end."""
        nvidia = self._absent or "no NVIDIA device on this machine says"
        host = self._absent or "no process of this user's listens there"
        return Drawn(
            watts=sum(self._watts) / len(self._watts) if self._watts else None,
            device_bytes=max(self._device, default=None),
            host_bytes=max(self._host, default=None),
            why={
                **({} if self._watts else {"power_watts": nvidia}),
                **({} if self._device else {"peak_device_bytes": nvidia}),
                **({} if self._host else {"peak_host_bytes": host}),
            },
        )


@contextmanager
def nvidia_handles() -> Iterator[list[Any]]:
    """The NVIDIA devices that programs started here would see; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield _visible()
    finally:
        pynvml.nvmlShutdown()


def _visible() -> list[Any]:
    import pynvml

    try:
        count = pynvml.nvmlDeviceGetCount()
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        numbers = [int(part) for part in named if part.strip().isdecimal()]
        chosen = [number for number in numbers if number < count] or range(count)
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in chosen]
    except pynvml.NVMLError:
        return []


def listeners(port: int) -> list[Any]:
    """The process that listens on a port of this machine, with its children; none if it is not ours to see."""
    import psutil

    try:
        pids = {
            row.pid for row in psutil.net_connections("tcp")
            if row.status == psutil.CONN_LISTEN and row.laddr and row.laddr.port == port and row.pid
        }  # fmt: skip
        found = [psutil.Process(pid) for pid in sorted(pids)]
        family = {process.pid: process for parent in found for process in (parent, *parent.children(recursive=True))}
    except psutil.Error:
        return []
    return list(family.values())
