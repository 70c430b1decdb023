"""Which attention is chosen: one that knows sinks, and the reason."""

import pytest
import torch

from ossquant.errors import UnsupportedError, UsageError
from ossquant.runtime import attention
from ossquant.runtime.attention import EAGER, FLASH_3_KERNEL, FLASH_4, NO_SINKS, choose_attention


def on_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_4: bool = False, kernels: bool = False
) -> None:
    """Have torch and transformers say what they would say on a machine with this GPU and these packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "is_flash_attn_4_available", lambda: flash_4)
    monkeypatch.setattr(attention, "is_kernels_available", lambda: kernels)


@pytest.mark.parametrize("asked", NO_SINKS)
def test_no_sinks(asked: str) -> None:
    """What drops the sinks is refused with the reason and the alternatives."""
    with pytest.raises(UnsupportedError) as caught:
        choose_attention(asked, "cpu", torch.bfloat16)
    assert "sinks" in caught.value.message
    assert all(name in caught.value.hint for name in (EAGER, FLASH_4, FLASH_3_KERNEL))


def test_on_a_cpu() -> None:
    """Without a GPU it is eager attention, and why is said."""
    chosen = choose_attention("auto", "cpu", torch.bfloat16)
    assert chosen.implementation == EAGER
    assert str(chosen) == "eager attention: no CUDA GPU"


@pytest.mark.parametrize(
    ("capability", "flash_4", "kernels", "expected"),
    [
        ((9, 0), True, True, FLASH_4),
        ((10, 0), True, False, FLASH_4),
        ((9, 0), False, True, FLASH_3_KERNEL),
        ((9, 0), False, False, EAGER),
        ((10, 0), False, True, EAGER),
        ((12, 0), True, True, EAGER),
        ((8, 9), True, True, EAGER),
    ],
)
def test_auto(
    capability: tuple[int, int], flash_4: bool, kernels: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto takes what is installed and runs on the card; elsewhere eager, with what is lacking."""
    on_gpu(monkeypatch, capability, flash_4, kernels)
    chosen = choose_attention("auto", "cuda:0", torch.bfloat16)
    assert chosen.implementation == expected
    if expected == EAGER:
        assert FLASH_4 in chosen.reason and FLASH_3_KERNEL in chosen.reason


@pytest.mark.parametrize("asked", [FLASH_4, FLASH_3_KERNEL])
def test_asked_for_but_not_possible(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash kernel where it cannot run is refused, not replaced."""
    with pytest.raises(UnsupportedError, match="CUDA"):
        choose_attention(asked, "cpu", torch.bfloat16)
    on_gpu(monkeypatch, (9, 0), flash_4=True, kernels=True)
    with pytest.raises(UnsupportedError, match="float32"):
        choose_attention(asked, "cuda:0", torch.float32)
    assert choose_attention(asked, "cuda:0", torch.bfloat16).implementation == asked
    on_gpu(monkeypatch, (9, 0))
    with pytest.raises(UnsupportedError, match="install"):
        choose_attention(asked, "cuda:0", torch.bfloat16)


def test_unknown() -> None:
    """A name that is none is a UsageError with the nearest."""
    with pytest.raises(UsageError) as caught:
        choose_attention("eagre", "cpu", torch.bfloat16)
    assert "eager" in caught.value.hint
