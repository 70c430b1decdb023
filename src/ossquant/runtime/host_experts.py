"""Experts that lie on the host while their router does not: how they are kept there, and when they are copied over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.host_trial import NEVER, fault_of_copying_ahead, tokens_worth_streaming
from ossquant.runtime.pinned import PageLock, Refused, cuda_page_lock, lock_parameters

# who locks pages for copies to a device; None where nobody does
FindPageLock = Callable[[str], PageLock | None]


@dataclass(frozen=True)
class HostExperts:
    """A layer's experts, the accelerator that they may be copied to, and whether they stay in the files."""

    experts: NativeMxfp4Experts
    accelerator: str
    in_files: bool


@dataclass(frozen=True)
class Settled:
    """Layers that are kept and used alike: they are copied over from so many tokens on."""

    layers: Sequence[HostExperts]
    where: str
    kept: str  # page-locked, or why not; empty where there is nothing to say
    fault: str  # why they are not copied ahead
    stream_from: int

    def __str__(self) -> str:
        if self.stream_from == NEVER:
            use = "computed there, as copying them over was never faster"
        elif self.stream_from <= 1:
            use = "always copied over"
        else:
            use = f"computed there below {self.stream_from} tokens, copied over from there on"
        fault = f"one after the other, for {self.fault}" if self.fault and self.stream_from != NEVER else ""
        return f"{self.where}: {'; '.join(filter(None, (self.kept, use, fault)))}"


def settle(layers: Sequence[HostExperts], find_page_lock: FindPageLock = cuda_page_lock) -> list[Settled]:
    """Page-lock experts that lie in host memory if copying is then worth it, and measure from when on it is."""
    in_memory = [layer for layer in layers if not layer.in_files]
    in_files = [layer for layer in layers if layer.in_files]
    settled = _in_memory(in_memory, find_page_lock)
    if in_files:
        settled.append(_measured(in_files, "experts in the files", ""))
    return settled


def _in_memory(layers: Sequence[HostExperts], find_page_lock: FindPageLock) -> list[Settled]:
    where = "experts on the host"
    lock = find_page_lock(layers[0].accelerator) if layers else None
    if lock is None:
        return [_measured(layers, where, "")] if layers else []
    try:
        unlock = lock_parameters(layers[0].experts, lock)
    except Refused as refusal:
        return [_measured(layers, where, _refused(refusal))]
    first = _measured(layers[:1], where, "page-locked")
    if first.stream_from == NEVER:
        unlock()
        return [Settled(layers, where, "", first.fault, NEVER)]
    return _lock_others(layers, first, find_page_lock)


def _lock_others(layers: Sequence[HostExperts], first: Settled, find_page_lock: FindPageLock) -> list[Settled]:
    """Page-lock all layers but the first, which is, until that is refused."""
    reason = ""
    locked = 1
    for layer in layers[1:]:
        lock = find_page_lock(layer.accelerator)
        try:
            if lock is not None:
                lock_parameters(layer.experts, lock)
        except Refused as refusal:
            reason = _refused(refusal)
            break
        locked += 1
    _copy_in_turn(layers[:locked], first.fault)
    if not reason:
        return [Settled(layers, first.where, first.kept, first.fault, first.stream_from)]
    where = f"{first.where}, {{}} of {len(layers)} layers"
    return [
        Settled(layers[:locked], where.format(locked), first.kept, first.fault, first.stream_from),
        _measured(layers[locked:], where.format(len(layers) - locked), reason),
    ]


def _measured(layers: Sequence[HostExperts], where: str, kept: str) -> Settled:
    """Try the first of layers that are kept alike, for all of them."""
    first = layers[0]
    fault = fault_of_copying_ahead(first.experts, first.accelerator)
    _copy_in_turn(layers, fault)
    return Settled(layers, where, kept, fault, tokens_worth_streaming(first.experts, first.accelerator))


def _copy_in_turn(layers: Sequence[HostExperts], fault: str) -> None:
    for layer in layers:
        layer.experts.copied_ahead = not fault


def _refused(refusal: Refused) -> str:
    return f"not page-locked ({refusal})"
