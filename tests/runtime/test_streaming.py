"""Experts copied ahead: each once, the right one, never overwritten while it is used, in two buffers."""

from functools import partial

import pytest
import torch
from lazy import lazy_device
from made_experts import EXPERTS, HIDDEN, make_experts
from transformers import GptOssConfig
from two_streams import TwoStreams, stacks

from ossquant.memory.transformers import streaming_bytes
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.streaming import AsStored, CopiedAhead, Parts, experts_for
from ossquant.spec import ModelSpec

CPU = torch.device("cpu")
ORDERS = ([], [4], [0, 8], [8], [0, 1, 2], [1, 3, 4, 7], list(range(EXPERTS)))


def keep(parts: Parts, seen: list[list[torch.Tensor]]) -> None:
    seen.append([part.clone() for part in parts])


@pytest.mark.parametrize("early", (True, False))
@pytest.mark.parametrize("order", ORDERS)
def test_whatever_runs_first(order: list[int], early: bool) -> None:
    """However copies and computing run beside each other, each expert computes on its own parts, copied once."""
    stored = stacks(EXPERTS)
    for seed in range(20):
        streams = TwoStreams(early)
        seen: list[list[torch.Tensor]] = []
        ahead = CopiedAhead(stored, CPU, streams)
        ahead.expect(order)
        for expert in order:
            for _ in ("gate_up", "down"):
                parts = ahead.take(expert)
                streams.compute(partial(keep, parts, seen))
            ahead.done(expert)
        assert len(streams.copies) == len(order)
        streams.run(seed)
        wanted = [[stack[expert] for stack in stored] for expert in order for _ in (1, 2)]
        assert len(seen) == len(wanted)
        assert all(torch.equal(*pair) for found, right in zip(seen, wanted, strict=True)
                   for pair in zip(found, right, strict=True))  # fmt: skip


@pytest.mark.parametrize("early", (True, False))
def test_the_next_is_copied_while_one_computes(early: bool) -> None:
    """When an expert is done with, the next one's copy was asked for, and waits for nothing that this one computes."""
    streams = TwoStreams(early)
    ahead = CopiedAhead(stacks(EXPERTS), CPU, streams)
    streams.compute(lambda: None)  # perhaps on memory that a buffer is made of
    ahead.expect([2, 5, 6])
    assert streams.copies[0][0] == 1
    for nth, expert in enumerate([2, 5, 6]):
        ahead.take(expert)
        assert len(streams.copies) == min(3, nth + 1 + early)
        streams.compute(lambda: None)
        ahead.done(expert)
        assert len(streams.copies) == min(3, nth + 2)
        assert streams.copies[-1][0] <= nth + 1


def test_two_buffers_of_the_planned_size() -> None:
    """Whatever the number of experts, the device holds two of them, which is what the plan keeps free."""
    plan = make_plan(ModelSpec.published("20b"), built_in("hybrid"))
    config = GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32)
    with torch.device("meta"):
        stored = NativeMxfp4Experts(config).bfloat16().stacks()
    sources = tuple(torch.empty_like(stack[:1], device=CPU).expand(stack.shape) for stack in stored)
    streams = TwoStreams(early=True)
    ahead = CopiedAhead(sources, CPU, streams)
    ahead.expect(range(32))
    for expert in range(32):
        ahead.take(expert)
        ahead.done(expert)
    assert sum(streams.buffers.values()) == streaming_bytes(plan) == 26_472_960
    alone = TwoStreams(early=True)
    CopiedAhead(sources, CPU, alone).expect([3])
    assert 2 * sum(alone.buffers.values()) == streaming_bytes(plan)


def test_experts_that_lie_there_are_not_copied() -> None:
    """On their own device experts are taken as they are, and on request from elsewhere, too."""
    stored = stacks(EXPERTS)
    assert isinstance(experts_for(CPU, stored), AsStored)
    assert experts_for(CPU, stored).take(3)[0].data_ptr() == stored[0][3].data_ptr()
    assert isinstance(experts_for(torch.device("meta"), stored), CopiedAhead)
    assert isinstance(experts_for(torch.device("meta"), stored, ahead=False), AsStored)


ROUTES = {
    "all": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    "some without tokens": [[1, 3, 7], [3, 7, 8]],
    "one only": [[4]],
    "the last only": [[8], [8]],
    "one token": [[6, 0, 3]],
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_copied_there_equals_computed_here(route: list[list[int]]) -> None:
    """On a device that refuses the host's tensors: the numbers of copying in turn, and of computing on the host."""
    experts = make_experts()
    indices = torch.tensor(route)
    hidden = torch.randn(len(route), HIDDEN, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(0.1, 0.9, indices.numel()).reshape(indices.shape)
    there = [tensor.to(lazy_device()) for tensor in (hidden, indices, weights)]
    here = experts(hidden, indices, weights)
    ahead = experts(*there).cpu()
    experts.copied_ahead = False
    assert torch.equal(ahead, experts(*there).cpu())
    assert (ahead - here).norm() <= 1e-5 * here.norm() > 0
