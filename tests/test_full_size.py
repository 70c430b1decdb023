"""The main job at full size, on random weights in the published layout of the 20b. Takes minutes and 27 GB of disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from ossquant.checkpoint.reader import open_checkpoint

PEAK_RSS = 1.5 * 2**30
MAKER_RSS = 10**9
PUBLISHED_BYTES = 13_761_264_768

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A random 20b checkpoint, removed afterwards."""
    folder = tmp_path_factory.mktemp("full") / "20b"
    peak = _peak_rss([sys.executable, str(ROOT / "scripts/make_checkpoint.py"), str(folder), "20b"])
    yield folder, peak
    shutil.rmtree(folder)


def test_the_20b_is_made_in_little_memory(full_size: tuple[Path, int]) -> None:
    """make_checkpoint streams: the published bytes to the byte, in less than 1 GB of memory."""
    folder, peak = full_size
    assert peak <= MAKER_RSS
    assert (
        json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == PUBLISHED_BYTES
    )


@pytest.mark.parametrize("scheme", ("nf4", "hybrid"))
def test_the_20b_is_quantized_in_little_memory(scheme: str, full_size: tuple[Path, int], tmp_path: Path) -> None:
    """`quantize` of the whole model peaks at 1.5 GiB or less, and writes what its plan says."""
    output = tmp_path / scheme
    command = [str(Path(sys.executable).parent / "ossquant"), "quantize", str(full_size[0]), str(output)]
    try:
        assert _peak_rss([*command, "--scheme", scheme]) <= PEAK_RSS
        with open_checkpoint(output) as checkpoint:
            index = json.loads((output / "model.safetensors.index.json").read_text())
            assert checkpoint.plan.nbytes == index["metadata"]["total_size"]
            assert checkpoint.plan.parameters == 20_914_757_184
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _peak_rss(command: list[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024
