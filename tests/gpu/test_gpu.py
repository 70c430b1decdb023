"""The checks of scripts/gpu_check that take no full-size model, under pytest, on a machine with a CUDA GPU."""

from pathlib import Path

import pytest
import torch

import gpu_check_tiny
from gpu_check_case import TRAINED, Case, Setting, SkipCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The first GPU, and a place for what we quantize."""
    return Setting("cuda", Path(TRAINED), tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("case", gpu_check_tiny.cases(), ids=lambda case: case.name)
def test_on_a_gpu(case: Case, setting: Setting) -> None:
    """A mode or a placement gives the reference's logits and tokens."""
    try:
        findings = case.run(setting)
    except SkipCase as reason:
        pytest.skip(str(reason))
    assert not findings.faults, findings.figures
