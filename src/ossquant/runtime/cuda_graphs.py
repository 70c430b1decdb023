"""Capture what a computation launches on a CUDA device, and launch it again by one call: a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# a computation on tensors at fixed addresses; captured, one that does it again
Compute = Callable[[], Tensor]
Capture = Callable[[Compute], Compute]

ERROR = 2  # torch's debug mode in which waiting for the device is an error


class CudaGraphs:
    """Captures on a device, on one stream and into one pool of memory; what was captured must be replayed in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Capture. Raises what a capture does not allow, before it begins where torch can tell."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            # the current stream is entered anew: one that fails leaves its own behind
            with torch.cuda.stream(torch.cuda.current_stream()):
                with torch.cuda.stream(self._stream):
                    compute()  # in which libraries choose and load their kernels
                    with _waiting_is_an_error():
                        compute()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    result = compute()
            torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(ERROR)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
