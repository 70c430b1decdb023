"""Page-locked memory, with the system's own mlock in the driver's place: its size, its contents, its end."""

import gc
import mmap

import pytest
import torch
from made_experts import make_experts
from mlock import Mlock, locked_bytes
from torch import nn

from ossquant.runtime.pinned import CudaPageLock, Refused, cuda_page_lock, lock_parameters


class Refusing(Mlock):
    """A system that locks nothing."""

    def lock(self, address: int, nbytes: int) -> None:
        raise Refused("CUDA: out of memory")


def test_whole_pages_and_no_more() -> None:
    """What is locked begins at a page and is the parameters' size but for one page; the parameters are in it."""
    experts = make_experts()
    before, lock = locked_bytes(), Mlock()
    copies = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    nbytes = sum(parameter.nbytes for parameter in copies.values())
    lock_parameters(experts, lock)
    ((address, locked),) = lock.held.items()
    assert address % mmap.PAGESIZE == 0
    assert nbytes <= locked < nbytes + len(copies) * 64 + mmap.PAGESIZE
    assert locked_bytes() - before == locked
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter, copies[name])
        assert parameter.dtype == copies[name].dtype
        assert address <= parameter.data_ptr() <= parameter.data_ptr() + parameter.nbytes <= address + locked


def test_unlocked_when_freed() -> None:
    """A module that is freed gives its pages back, and only its own."""
    before, lock = locked_bytes(), Mlock()
    first, second = make_experts(), make_experts()
    lock_parameters(first, lock)
    of_first = locked_bytes() - before
    lock_parameters(second, lock)
    blocks = second.gate_up_proj_blocks
    expected = blocks.clone()
    del second
    gc.collect()
    assert locked_bytes() - before == of_first
    assert torch.equal(blocks, expected)
    del first
    gc.collect()
    assert locked_bytes() == before
    assert not lock.held


def test_unlocked_on_request() -> None:
    """Unlocked by hand the parameters stay where they are, and are not unlocked twice."""
    experts = make_experts()
    before, lock = locked_bytes(), Mlock()
    unlock = lock_parameters(experts, lock)
    where = experts.down_proj_bias.data_ptr()
    unlock()
    unlock()
    assert locked_bytes() == before
    assert experts.down_proj_bias.data_ptr() == where


def test_a_refusal_leaves_everything() -> None:
    """What is refused is said, and the parameters stay where they were."""
    experts = make_experts()
    where = [parameter.data_ptr() for parameter in experts.parameters()]
    with pytest.raises(Refused, match="CUDA: out of memory"):
        lock_parameters(experts, Refusing())
    assert [parameter.data_ptr() for parameter in experts.parameters()] == where


def test_no_room_is_a_refusal() -> None:
    """More than host memory has free is refused before it is taken."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8).expand(2**45), requires_grad=False)
    with pytest.raises(Refused, match=r"host memory: .* are needed, .* are free"):
        lock_parameters(module, Mlock())


def test_only_cuda_has_a_driver() -> None:
    """On other devices nobody locks."""
    assert cuda_page_lock("lazy:0") is cuda_page_lock("cpu") is None
    assert cuda_page_lock("cuda:1") is not None


class Runtime:
    """CUDA's runtime as torch gives it, on a machine that has none."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.asked: list[tuple[int, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:
        self.asked.append(arguments)
        if self.status < 0:
            raise RuntimeError("no kernel image")
        return self.status

    def cudaGetErrorString(self, status: int) -> str:
        return f"reason {status}"


@pytest.mark.parametrize(("status", "reason"), [(2, "CUDA: reason 2"), (-1, "CUDA: no kernel image"), (0, None)])
def test_the_driver_is_asked(status: int, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is given the address, the bytes and that they are for every GPU; what it says is the reason."""
    runtime = Runtime(status)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    if reason:
        with pytest.raises(Refused, match=f"^{reason}$"):
            CudaPageLock("cpu").lock(4096, 8192)
    else:
        CudaPageLock("cpu").lock(4096, 8192)
    assert runtime.asked == [(4096, 8192, 1)]
