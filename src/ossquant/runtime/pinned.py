"""Page-locked host memory, which a GPU reads by itself and at full speed, of the size that is asked for.

torch's own pinned memory comes in powers of two, up to twice what is needed; here plain pages are locked in place.
"""

import contextlib
import mmap
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ossquant.detect import available_host_memory
from ossquant.place import HOST_RESERVE
from ossquant.units import size

Unlock = Callable[[], Any]

_ALIGNMENT = 64  # bytes; a cache line
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU
# the process has taken its own part of the reserve by the time that memory is locked
_SPARE = HOST_RESERVE // 2


class Refused(Exception):
    """Memory that cannot be locked, and the reason in the words of who refused."""


class PageLock(Protocol):
    """Who locks pages and unlocks them."""

    def lock(self, address: int, nbytes: int) -> None:
        """Lock whole pages. Raises Refused."""

    def unlock(self, address: int, nbytes: int) -> None:
        """Unlock what was locked, after all that reads it."""


class CudaPageLock:
    """The CUDA driver, for copies to a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def lock(self, address: int, nbytes: int) -> None:
        try:
            cudart = torch.cuda.cudart()
            status = cudart.cudaHostRegister(address, nbytes, _PORTABLE)
            if int(status):
                self._forget_error()
                raise Refused(f"CUDA: {cudart.cudaGetErrorString(status)}")
        except RuntimeError as error:
            raise Refused(f"CUDA: {error}") from error

    def unlock(self, address: int, nbytes: int) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.cudart().cudaHostUnregister(address)

    def _forget_error(self) -> None:
        # CUDA keeps its last error, and torch would hold it against the next kernel that it starts
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)


def cuda_page_lock(device: str) -> PageLock | None:
    """The driver of a device; None for one that is no CUDA GPU."""
    return CudaPageLock(device) if torch.device(device).type == "cuda" else None


def lock_parameters(module: nn.Module, lock: PageLock) -> Unlock:
    """Move a module's parameters, which lie on the host, into locked memory of their own.

    It is unlocked when the module is freed, or by calling what is returned; the parameters then stay in it.
    Raises Refused, and leaves them where they are.
    """
    parameters = list(module.parameters())
    begins = np.cumsum([0, *(-(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for parameter in parameters)])
    pages = _pages(int(begins[-1]))
    lock.lock(pages.ctypes.data, pages.nbytes)
    unlock = weakref.finalize(module, _unlock, lock, pages)
    unlock.atexit = False  # the driver goes with the process, and unlocks
    for parameter, begin in zip(parameters, begins, strict=False):
        room = torch.from_numpy(pages[begin : begin + parameter.nbytes])
        parameter.data = room.view(parameter.dtype).view(parameter.shape).copy_(parameter.data)
    return unlock


def _pages(nbytes: int) -> Any:
    """Whole pages, as few as hold nbytes, that nothing else has a part of. Raises Refused where there is no room."""
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    free = available_host_memory()
    if whole + _SPARE > free:
        raise Refused(f"host memory: {size(whole)} more beside {size(_SPARE)} are needed, {size(free)} are free")
    memory = np.empty(whole + mmap.PAGESIZE, np.uint8)
    begin = -memory.ctypes.data % mmap.PAGESIZE
    return memory[begin : begin + whole]


def _unlock(lock: PageLock, pages: Any) -> None:
    lock.unlock(pages.ctypes.data, pages.nbytes)
