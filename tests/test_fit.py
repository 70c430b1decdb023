"""Whether a plan fits a device."""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest

from ossquant.errors import UsageError
from ossquant.fit import RESERVE, fit, longest_max_model_len
from ossquant.hardware import Device, devices, find_device
from ossquant.memory import estimate
from ossquant.plan import Plan, make_plan
from ossquant.recipe import built_in
from ossquant.spec import ModelSpec
from ossquant.units import GIB


@cache
def plan_of(size: str, recipe: str) -> Plan:
    return make_plan(ModelSpec.published(size), built_in(recipe))


def with_bytes(usable_bytes: int) -> Device:
    return replace(find_device("24GB"), usable_bytes=usable_bytes)


@pytest.mark.parametrize(
    ("size", "recipe", "device", "max_model_len", "verdict"),
    [
        ("20b", "hybrid", "4090", 131072, "fits"),
        ("20b", "nf4", "4090", 131072, "fits"),
        ("20b", "bf16", "4090", 1, "no"),
        ("20b", "hybrid", "16GB", 131072, "no"),
        ("20b", "hybrid", "16GB", 98304, "tight"),
        ("20b", "hybrid", "16GB", 8192, "fits"),
        ("120b", "hybrid", "24GB", 1, "no"),
        ("120b", "nf4", "24GB", 1, "no"),
        ("120b", "hybrid", "h100", 131072, "fits"),
        ("120b", "bf16", "h200", 1, "no"),
    ],
)
def test_known_pairs(size: str, recipe: str, device: str, max_model_len: int, verdict: str) -> None:
    """The 20b fits a 4090 in 4 bits with all its context and not in bf16; the 120b fits no 24 GB."""
    assert fit(plan_of(size, recipe), find_device(device), max_model_len).verdict == verdict


@pytest.mark.parametrize(
    ("spare", "verdict"), [(-1, "no"), (0, "tight"), (RESERVE - 1, "tight"), (RESERVE, "fits"), (GIB, "fits")]
)
def test_verdict_agrees_with_sums(spare: int, verdict: str) -> None:
    """To the byte: below the total it is no, below the total and the reserve it is tight."""
    plan = plan_of("20b", "hybrid")
    needed = estimate(plan, 4096)
    answer = fit(plan, with_bytes(needed.total + spare), 4096)
    assert (answer.verdict, answer.headroom, answer.estimate) == (verdict, spare, needed)


def test_reserve() -> None:
    """The reserve is 0.8 GiB: 415 MiB of compute buffers and a driver context of 0.4 GiB, rounded."""
    assert abs(RESERVE / GIB - (415 / 1024 + 0.4)) < 0.01


@pytest.mark.parametrize("size", ["20b", "120b"])
@pytest.mark.parametrize("recipe", ["hybrid", "nf4", "bf16"])
def test_longest_is_the_longest(size: str, recipe: str) -> None:
    """On every device the length given fits, and one token more does not."""
    plan = plan_of(size, recipe)
    limit = plan.spec.max_position_embeddings
    for device in devices():
        longest = fit(plan, device, 1).longest_max_model_len
        assert longest == 0 or fit(plan, device, longest).verdict == "fits"
        assert longest == limit or fit(plan, device, longest + 1).verdict != "fits"


def test_longest_to_the_byte() -> None:
    """One byte less than a length needs makes the longest shorter; too little for one token makes it 0."""
    plan = plan_of("20b", "hybrid")
    for length in (1, 127, 128, 5000, 131072):
        needed = estimate(plan, length).total + RESERVE
        assert longest_max_model_len(plan, with_bytes(needed)) == length
        assert longest_max_model_len(plan, with_bytes(needed - 1)) == length - 1
    assert longest_max_model_len(plan, with_bytes(0)) == 0
    assert longest_max_model_len(plan, with_bytes(10**15)) == 131072


@pytest.mark.parametrize("length", [0, 131073])
def test_length_out_of_range(length: int) -> None:
    """A context the model does not have is a usage error; that nothing fits is an answer."""
    with pytest.raises(UsageError, match=f"max_model_len cannot be {length}"):
        fit(plan_of("20b", "hybrid"), find_device("4090"), length)


def test_cold() -> None:
    """Fit needs neither torch nor anything else that is slow to load."""
    heavy = {"torch", "transformers", "bitsandbytes", "numpy", "numba", "rich"}
    program = "import sys; import ossquant.fit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ossquant.fit" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
