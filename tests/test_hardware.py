"""Devices by the names people type, and machines by what their drivers say."""

import re
import subprocess
import sys
from collections import defaultdict

import pytest

from ossquant.detect import Gpu
from ossquant.errors import UsageError
from ossquant.hardware import ENGINES, Device, devices, find_device, find_machine, machine_of
from ossquant.units import GIB, MIB

DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_row(device: Device) -> None:
    """Every device has a name that finds it, and no more usable memory than it is sold with."""
    assert find_device(device.name) is device
    # vendors' GB are GiB here: a 4090 is sold as 24 GB and has 24564 MiB
    assert 0 < device.usable_bytes <= device.memory_gb * GIB
    # the driver or the system keeps up to 10 % of a card, up to half of memory that is shared
    assert device.usable_bytes >= device.memory_gb * GIB * (0.5 if device.unified_memory else 0.9)
    if device.nvml_bytes:
        assert 0.9 * device.nvml_bytes <= device.usable_bytes <= device.nvml_bytes
        assert 0.9 <= device.nvml_bytes / (device.memory_gb * GIB) <= 1.0
    assert device.bandwidth_gbps is not None and 50 < device.bandwidth_gbps <= 8000
    assert device.tdp_w is None or 10 < device.tdp_w <= 1400
    assert device.usd_per_hour is None or 0.1 < device.usd_per_hour < 20


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_rates(device: Device) -> None:
    """Rates are dense: halving the bits doubles them at most, but for Blackwell's and Gaudi's own ratios."""
    bf16, fp8, fp4 = device.bf16_tflops, device.fp8_tflops, device.fp4_tflops
    assert all(rate is None or 1 < rate <= 15000 for rate in (bf16, fp8, fp4))
    if bf16 and fp8:
        assert 0.99 <= fp8 / bf16 <= 2.05
    if fp8 and fp4:
        assert 1.9 <= fp4 / fp8 <= 4.05  # GeForce: fp8 accumulates in fp32 at half its rate


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_sources(device: Device) -> None:
    """Every figure that is known, and no other, says what it rests on and when."""
    known = {
        "memory": True,
        "nvml": device.nvml_bytes,
        "usable": True,
        "bandwidth": device.bandwidth_gbps,
        "rates": device.bf16_tflops or device.fp8_tflops,
        "fp4": device.fp4_tflops,
        "kernels": True,
        "power": device.tdp_w,
        "price": device.usd_per_hour,
    }
    assert set(device.sources) == {figure for figure, value in known.items() if value}
    for text in device.sources.values():
        assert DATE.search(text), text
    assert device.usable_basis == device.sources["usable"]


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_kernels(device: Device) -> None:
    """Each engine is answered for, and every device has at least one attention kernel that knows sinks."""
    assert tuple(device.mxfp4_kernels) == ENGINES
    assert device.mxfp4_kernels["vllm"] in ("marlin", "triton", "trtllm", "ipex-marlin", False, None)
    assert "eager" in device.sink_attention
    assert ("flash-attention-3" in device.sink_attention) == (device.arch == "9.0 Hopper")
    if device.compute_capability:
        assert device.vendor == "nvidia"
        assert device.arch.startswith("{}.{} ".format(*device.compute_capability))
        assert device.mxfp4_kernels["transformers"] is (device.compute_capability >= (7, 5))


def test_table() -> None:
    """There are 100 and more of them, of four vendors, and no name stands twice."""
    assert len(devices()) >= 100
    assert len({device.name for device in devices()}) == len(devices())
    assert {device.vendor for device in devices()} == {"nvidia", "amd", "intel", "apple"}


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
        ("4090 24gb", "GeForce RTX 4090"),
        ("h100-nvl", "H100 NVL 94GB"),
        ("H100-80G", "H100 SXM 80GB"),
        ("a100-80g", "A100 80GB SXM"),
        ("A100 40 GiB", "A100 40GB"),
        ("4060 ti 8gb", "GeForce RTX 4060 Ti 8GB"),
        ("3080-12g", "GeForce RTX 3080 12GB"),
        ("NVIDIA A100 SXM", "A100 80GB SXM"),
        ("dgx spark", "GB10 (DGX Spark)"),
        ("m4 max", "Apple M4 Max 128GB (40c)"),
        ("apple m4-max 128gb", "Apple M4 Max 128GB (40c)"),
        ("m4 max 36gb", "Apple M4 Max 36GB (32c)"),
        ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"),
        ("AMD Radeon(TM) 890M Graphics", "Radeon 890M 32GB"),
        ("intel arc pro b60", "Arc Pro B60 24GB"),
    ],
)
def test_as_people_type(text: str, name: str) -> None:
    """Case, spaces, dashes, vendors' words and the spelling of a size do not matter."""
    assert find_device(text).name == name


@pytest.mark.parametrize("text", ["a100-80g", "h100-80g", "h200"])
def test_taken_for_sxm(text: str) -> None:
    """Where a usual name leaves the form open, the note says which one was taken."""
    assert "SXM" in find_device(text).name
    assert "taken for SXM" in find_device(text).note


@pytest.mark.parametrize(
    ("text", "name", "gib", "usable"),
    [
        ("m4 max 64gb", "Apple M4 Max 64GB", 64, 48 * GIB),
        ("m3-ultra-256g", "Apple M3 Ultra 256GB", 256, 192 * GIB),
        ("Apple M4 24GB", "Apple M4 24GB", 24, 16 * GIB),
        ("m1 8gb", "Apple M1 8GB", 8, 8 * GIB * 2 // 3),
        ("strix halo 64gb", "Ryzen AI Max+ 395 (Strix Halo) 64GB", 64, 115200 * MIB // 2),
    ],
)
def test_other_memory(text: str, name: str, gib: int, usable: int) -> None:
    """A chip with shared memory comes with any size: its own rule says what is usable of it."""
    device = find_device(text)
    assert (device.name, device.memory_gb, device.usable_bytes) == (name, gib, usable)
    assert device.bandwidth_gbps and "bandwidth and rates of" in device.note


def test_size_of_a_card() -> None:
    """A card has the memory it has: a 4090 of 48 GB is not one we know."""
    with pytest.raises(UsageError, match="unknown device '4090 48GB'") as refused:
        find_device("4090 48GB")
    assert "GeForce RTX 4090" in refused.value.hint


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
    ("text", "count"),
    [
        ("rtx 4060 ti", 2), ("5060ti", 2), ("v100", 2), ("3080", 2), ("2060", 2), ("h100", 3),
        ("h20", 2), ("gh200", 2), ("mi50", 2), ("9060 xt", 2), ("pro 5000", 2),
    ],
)  # fmt: skip
def test_ambiguous_sizes(text: str, count: int) -> None:
    """A name sold with several memories is never taken for one of them."""
    with pytest.raises(UsageError, match="more than one device") as refused:
        find_device(text)
    assert len(refused.value.hint.split(" or ")) == count


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


@pytest.mark.parametrize("text", ["", "nvidia", "24", "4090Q", "-24GB", "GB", "0GB", "m4 max 0gb", "auto"])
def test_not_a_device(text: str) -> None:
    """A bare vendor, a number without its unit or no memory is no device."""
    with pytest.raises(UsageError):
        find_device(text)


def test_facts() -> None:
    """A 4090 has 24081 MiB for CUDA, of its 24564."""
    device = find_device("4090")
    assert (device.usable_bytes, device.nvml_bytes) == (24081 * MIB, 24564 * MIB)
    assert device.compute_capability == (8, 9)
    assert (device.bandwidth_gbps, device.tdp_w, device.vendor) == (1008.0, 450, "nvidia")
    assert (device.bf16_tflops, device.fp4_tflops) == (165.2, None)
    assert device.mxfp4_kernels == {"llama.cpp": True, "vllm": "marlin", "transformers": True}


def test_two_devices_on_a_board() -> None:
    """An MI250 is two devices of 64 GB, and is not sold as one of 128."""
    assert find_device("mi250").memory_gb == find_device("mi250x").memory_gb == 64
    assert "2xmi250" in find_device("mi250").note


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("4090", "GeForce RTX 4090", 1),
        ("4x4090", "GeForce RTX 4090", 4),
        ("4xA100-80G", "A100 80GB SXM", 4),
        ("2 x rtx 3090", "GeForce RTX 3090", 2),
        ("8×h100-sxm", "H100 SXM 80GB", 8),
        ("2*t4", "Tesla T4", 2),
        ("2x24GB", "24GB", 2),
        ("1024x4090", "GeForce RTX 4090", 1024),
    ],
)
def test_machine(text: str, name: str, count: int) -> None:
    """A count goes before the name; what the host has is not known."""
    machine = find_machine(text)
    assert (machine.device, machine.count, machine.host_memory) == (find_device(name), count, None)


@pytest.mark.parametrize("text", ["0x4090", "1025x4090", "999999999x4090", "2x", "x4090", "-2x4090", "2x3x4090"])
def test_not_a_machine(text: str) -> None:
    """A count of none or of more than 1024 is refused, and so is what is no count."""
    with pytest.raises(UsageError):
        find_machine(text)


# names and totals (MiB) as nvidia-smi prints them
NVML = [
    ("NVIDIA GeForce RTX 4090", 24564, "GeForce RTX 4090"),
    ("NVIDIA GeForce RTX 3080", 10240, "GeForce RTX 3080 10GB"),
    ("NVIDIA GeForce RTX 3080", 12288, "GeForce RTX 3080 12GB"),
    ("NVIDIA GeForce RTX 4060 Ti", 8188, "GeForce RTX 4060 Ti 8GB"),
    ("NVIDIA GeForce RTX 4060 Ti", 16380, "GeForce RTX 4060 Ti 16GB"),
    ("NVIDIA GeForce RTX 5090", 32607, "GeForce RTX 5090"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "GeForce RTX 4090 Laptop"),
    ("NVIDIA RTX A6000", 49140, "RTX A6000"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX 6000 Ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "RTX PRO 6000 Blackwell"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "RTX PRO 6000 Blackwell Max-Q"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX PRO 6000 Blackwell Server Edition"),
    ("Tesla T4", 15360, "Tesla T4"),
    ("Tesla V100-SXM2-16GB", 16384, "Tesla V100 16GB"),
    ("Tesla V100-SXM2-32GB", 32768, "Tesla V100 32GB"),
    ("Tesla P100-PCIE-16GB", 16384, "Tesla P100 16GB"),
    ("NVIDIA A10G", 23028, "A10G"),
    ("NVIDIA A100-SXM4-40GB", 40960, "A100 40GB"),
    ("NVIDIA A100-PCIE-40GB", 40960, "A100 40GB"),
    ("NVIDIA A100-SXM4-80GB", 81920, "A100 80GB SXM"),
    ("NVIDIA A100 80GB PCIe", 81920, "A100 80GB PCIe"),
    ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM 80GB"),
    ("NVIDIA H100 PCIe", 81559, "H100 PCIe 80GB"),
    ("NVIDIA H100 NVL", 95830, "H100 NVL 94GB"),
    ("NVIDIA H200", 143771, "H200 SXM 141GB"),
    ("NVIDIA GH200 480GB", 97871, "GH200 96GB"),
    ("NVIDIA B200", 183359, "B200 180GB"),
    ("NVIDIA B300 SXM6 AC", 275040, "B300 288GB"),
    ("NVIDIA L4", 23034, "L4"),
    ("NVIDIA L40S", 46068, "L40S"),
]


@pytest.mark.parametrize(("name", "mib", "row"), NVML)
def test_detected(name: str, mib: int, row: str) -> None:
    """NVML's own names find their rows, by memory where one name has several."""
    machine = machine_of([Gpu("nvidia", name, mib * MIB)] * 4, 10 * GIB)
    known = find_device(row)
    assert (machine.device.name, machine.count, machine.host_memory) == (row, 4, 10 * GIB)
    assert (machine.device.nvml_bytes, machine.device.usable_bytes) == (mib * MIB, known.usable_bytes)
    assert machine.device.usable_basis == known.usable_basis


def test_detected_shares_host_memory() -> None:
    """A GB10's driver counts no memory of its own: the table does."""
    assert machine_of([Gpu("nvidia", "NVIDIA GB10", None)], None).device is find_device("gb10")


def test_detected_with_ecc() -> None:
    """A card whose error correction takes some memory is the same card with less of it."""
    device = machine_of([Gpu("nvidia", "NVIDIA A40", 45 * GIB + 512 * MIB)], None).device
    assert device.name == "A40" and device.nvml_bytes == 45 * GIB + 512 * MIB
    device = machine_of([Gpu("nvidia", "NVIDIA RTX A6000", 46068 * MIB)], None).device
    assert (device.name, device.note) == ("RTX A6000", "")
    assert device.usable_bytes == int(46068 * MIB * 0.981)
    assert "this machine" in device.usable_basis


def test_detected_with_other_memory() -> None:
    """A 4090 that was given 48 GB has the row's bandwidth and the driver's memory, and says so."""
    device = machine_of([Gpu("nvidia", "NVIDIA GeForce RTX 4090", 49140 * MIB)], None).device
    assert (device.name, device.usable_bytes) == ("GeForce RTX 4090 48GB", int(49140 * MIB * 0.981))
    assert (device.memory_gb, device.bandwidth_gbps, device.usd_per_hour) == (48.0, 1008.0, None)
    assert "48 GiB" in device.note and "price" not in device.sources


def test_detected_unknown() -> None:
    """A device that is not in the table is known by its memory alone."""
    device = machine_of([Gpu("nvidia", "NVIDIA RTX 9999", 65536 * MIB)], None).device
    assert (device.name, device.memory_gb, device.bandwidth_gbps) == ("NVIDIA RTX 9999", 64, None)
    assert device.usable_bytes == int(65536 * MIB * 0.981)
    assert "not in the table" in device.note


def test_detected_mixed() -> None:
    """Of different devices the kind with the most memory together counts, and the note names the rest."""
    small, large = Gpu("nvidia", "Tesla T4", 15360 * MIB), Gpu("nvidia", "NVIDIA L40S", 46068 * MIB)
    machine = machine_of([small, large, small], None)
    assert (machine.device.name, machine.count) == ("L40S", 1)
    assert machine.device.note == "not counted: 2 x Tesla T4"


@pytest.mark.parametrize(
    ("gpu", "name", "usable"),
    [
        (Gpu("apple", "Apple M4 Max", 128 * GIB), "Apple M4 Max 128GB (40c)", 96 * GIB),
        (Gpu("apple", "Apple M4 Max", 36 * GIB), "Apple M4 Max 36GB (32c)", 24 * GIB),
        (Gpu("apple", "Apple M2 Pro", 16 * GIB), "Apple M2 Pro 16GB", 16 * GIB * 2 // 3),
        (Gpu("apple", "Apple M99", 64 * GIB), "Apple M99", 48 * GIB),
        (Gpu("amd", "AMD Radeon RX 7900 XTX", 24560 * MIB), "Radeon RX 7900 XTX", 24560 * MIB),
        (Gpu("amd", "AMD GPU", 16368 * MIB), "AMD GPU", 16368 * MIB),
    ],
)
def test_detected_elsewhere(gpu: Gpu, name: str, usable: int) -> None:
    """Apple's chips follow Metal's rule; what amdgpu says can be used."""
    device = machine_of([gpu], None).device
    assert (device.name, device.usable_bytes) == (name, usable)


def test_detected_strix_halo() -> None:
    """What the kernel shares with the chip is what can be used of it."""
    gpu = Gpu("amd", "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 63 * GIB)
    device = machine_of([gpu], None).device
    assert device.arch == "gfx1151 RDNA3.5" and device.usable_bytes == 63 * GIB


def test_detected_none() -> None:
    """A machine without devices says what to do."""
    with pytest.raises(UsageError, match="no GPU found") as refused:
        machine_of([], 10 * GIB)
    assert refused.value.hint == "name one: --gpu 4090, or give a size: --gpu 24GB"


def test_cold() -> None:
    """A look-up loads nothing heavy."""
    heavy = {"torch", "transformers", "bitsandbytes", "numpy", "numba", "rich", "pynvml", "psutil"}
    program = "import sys, ossquant.hardware as h; h.find_device('4090'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("text", ["7900xtx", "7900 XT", "9070xt", "rx 9060xt 16gb", "2x7900xtx"])
def test_a_model_number_is_no_count(text: str) -> None:
    """A 7900xtx is one Radeon, not 7900 of something."""
    machine = find_machine(text)
    assert machine.count == (2 if text.startswith("2x") else 1)
    assert machine.device.vendor == "amd"
