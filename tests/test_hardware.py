"""Devices by the names people type."""

import subprocess
import sys
from collections import defaultdict

import pytest

from ossquant.errors import UsageError
from ossquant.hardware import Device, devices, find_device
from ossquant.units import GIB


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_row(device: Device) -> None:
    """Every device has a name that finds it, a source, and no more usable memory than it is sold with."""
    assert find_device(device.name) is device
    assert device.source and device.usable_basis and device.memory_evidence and device.arch
    # vendors' GB are GiB here: a 4090 is sold as 24 GB and has 24564 MiB
    assert 0 < device.usable_bytes <= device.memory_gb * GIB
    # the driver or the system keeps up to 10 % of a card, up to a third of memory that is shared
    assert device.usable_bytes >= device.memory_gb * GIB * (0.66 if device.unified_memory else 0.9)
    assert device.bandwidth_gbps is not None and device.bandwidth_gbps > 0
    assert (device.usd_per_hour is None) == (device.usd_per_hour_source == "")


def test_aliases() -> None:
    """Every alias finds its own device, or is refused with all that share it."""
    owners = defaultdict(list)
    for device in devices():
        for alias in device.aliases:
            owners[alias].append(device)
    for alias, sharing in owners.items():
        if len(sharing) == 1:
            assert find_device(alias) is sharing[0]
        else:
            with pytest.raises(UsageError) as refused:
                find_device(alias)
            assert all(device.name in refused.value.hint for device in sharing)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "GeForce RTX 4090"),
        ("rtx 4090", "GeForce RTX 4090"),
        ("RTX-4090", "GeForce RTX 4090"),
        ("nvidia_geforce_rtx_4090", "GeForce RTX 4090"),
        ("h100-nvl", "H100 NVL 94GB"),
        ("NVIDIA A100 SXM", "A100 80GB SXM"),
        ("dgx spark", "GB10 (DGX Spark)"),
        ("m4 max", "Apple M4 Max 128GB (40c)"),
        ("apple m4-max 128gb", "Apple M4 Max 128GB (40c)"),
        ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"),
        ("intel arc pro b60", "Arc Pro B60 24GB"),
    ],
)
def test_as_people_type(text: str, name: str) -> None:
    """Case, spaces, dashes and vendors' words do not matter."""
    assert find_device(text).name == name


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("16GiB", 16 * GIB), (" 4.5 gib ", 9 * GIB // 2), ("80g", 80 * 10**9)],
)
def test_plain_size(text: str, nbytes: int) -> None:
    """A size is a device of that much usable memory, which says so, and of which nothing else is known."""
    device = find_device(text)
    assert device.usable_bytes == nbytes
    assert device.name == text.strip()
    assert "as given" in device.usable_basis
    assert device.bandwidth_gbps is None and device.compute_capability is None


def test_ambiguous() -> None:
    """An A100 has 40 or 80 GB: the answer asks which."""
    with pytest.raises(UsageError, match="more than one device") as refused:
        find_device("a100")
    assert refused.value.hint == "say which: 'A100 40GB' or 'A100 80GB PCIe' or 'A100 80GB SXM'"


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("rtx 4091", "GeForce RTX 4090"),
        ("h100-nv", "H100 NVL 94GB"),
        ("mi300", "MI300X"),
        ("rtx 6000", "RTX A6000"),
    ],
)
def test_unknown(text: str, nearest: str) -> None:
    """An unknown name is refused with the nearest, never taken for it."""
    with pytest.raises(UsageError, match=f"unknown device '{text}'") as refused:
        find_device(text)
    assert nearest in refused.value.hint


@pytest.mark.parametrize("text", ["", "nvidia", "24", "4090M", "-24GB", "GB"])
def test_not_a_device(text: str) -> None:
    """A bare vendor or a number without its unit is no device."""
    with pytest.raises(UsageError):
        find_device(text)


def test_facts() -> None:
    """A 4090 has 24081 MiB for CUDA, of its 24564."""
    device = find_device("4090")
    assert device.usable_bytes == 24081 * 2**20
    assert device.compute_capability == (8, 9)
    assert (device.bandwidth_gbps, device.tdp_w, device.vendor) == (1008.0, 450, "nvidia")


def test_cold() -> None:
    """A look-up loads nothing heavy."""
    heavy = {"torch", "transformers", "bitsandbytes", "numpy", "numba", "rich"}
    program = "import sys, ossquant.hardware as h; h.find_device('4090'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
