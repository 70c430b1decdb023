"""Stands in for a CUDA graph where there is no GPU: operations are recorded with their tensors and done again.

As in a graph, what Python decided while recording stays decided, and tensors keep their addresses. What a graph does
not allow, reading a tensor's value on the host, is an error here too.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ossquant.runtime.cuda_graphs import Compute

ASKS_THE_DEVICE = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_unique2", "aten::bincount"}


class Recorder(TorchDispatchMode):
    """Keeps every operation, its arguments and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in ASKS_THE_DEVICE:
            raise RuntimeError(f"{func.name()} asks the device while a graph is captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it all again, with results where they were."""
        for func, args, kwargs, result in self.calls:
            for kept, fresh in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != fresh.data_ptr():
                    kept.copy_(fresh)


def record(compute: Compute) -> Compute:
    """Capture what a computation does."""
    compute()
    recorder = Recorder()
    with recorder:
        result = compute()

    @torch.inference_mode()
    def replay() -> torch.Tensor:
        recorder.replay()
        return result

    return replay
