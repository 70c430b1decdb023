"""The system's mlock, which locks pages as a GPU's driver does, and says how many there are."""

import ctypes
import os
from pathlib import Path

from ossquant.runtime.pinned import Refused

_LIBC = ctypes.CDLL(None, use_errno=True)


class Mlock:
    """Locks pages; held has their bytes by address."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def lock(self, address: int, nbytes: int) -> None:
        if _LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)):
            raise Refused(os.strerror(ctypes.get_errno()))
        self.held[address] = nbytes

    def unlock(self, address: int, nbytes: int) -> None:
        assert self.held.pop(address) == nbytes
        assert not _LIBC.munlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def locked_bytes() -> int:
    """Bytes that this process has locked."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmLck:"))
