"""What the machine says it has."""

from pathlib import Path

import psutil
import pytest

from ossquant.detect import Gpu, _amd, available_host_memory, gpus
from ossquant.errors import UsageError
from ossquant.hardware import find_machine
from ossquant.units import GIB, MIB


def test_auto() -> None:
    """`auto` is the devices of this machine and its free memory, or an error that says what to do."""
    if found := gpus():
        machine = find_machine("auto")
        assert 1 <= machine.count <= len(found)
        assert machine.host_memory is not None and machine.host_memory <= psutil.virtual_memory().total
    else:
        with pytest.raises(UsageError, match="no GPU found on this machine") as refused:
            find_machine(" AUTO ")
        assert "--gpu 24GB" in refused.value.hint


def test_host_memory() -> None:
    """Less is available than there is."""
    assert 0 < available_host_memory() <= psutil.virtual_memory().total


def card(drm: Path, number: int, vendor: str, **files: int | str) -> None:
    folder = drm / f"card{number}" / "device"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_amd_cards(tmp_path: Path) -> None:
    """Cards are listed by product name and own memory; the unit inside the processor is left out beside them."""
    card(tmp_path, 0, "0x1002", mem_info_vram_total=512 * MIB, mem_info_gtt_total=16 * GIB)
    card(tmp_path, 1, "0x1002", mem_info_vram_total=196592 * MIB, product_name="AMD Instinct MI300X")
    card(tmp_path, 2, "0x1002", mem_info_vram_total=24560 * MIB, product_name="")
    card(tmp_path, 3, "0x10de")
    assert _amd(tmp_path) == [
        Gpu("amd", "AMD Instinct MI300X", 196592 * MIB),
        Gpu("amd", "AMD GPU", 24560 * MIB),
    ]


def test_amd_integrated(tmp_path: Path) -> None:
    """Alone, the unit inside the processor has what the kernel shares with it."""
    card(tmp_path, 0, "0x1002", mem_info_vram_total=512 * MIB, mem_info_gtt_total=60 * GIB)
    [gpu] = _amd(tmp_path)
    assert (gpu.vendor, gpu.nbytes) == ("amd", 60 * GIB + 512 * MIB)


def test_amd_none(tmp_path: Path) -> None:
    """A machine without amdgpu has no such folder."""
    assert _amd(tmp_path / "drm") == []
