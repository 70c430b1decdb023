import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ossquant import load_model
from ossquant.bench.measure import measure
from ossquant.errors import UsageError


def test_rates_agree_with_the_clock(quantized: dict[str, Path]) -> None:
    """What the runs took together is what the wall clock saw, and the rates follow from them."""
    model, _ = load_model(quantized["hybrid"])
    measure(model, prompt_tokens=32, new_tokens=8, runs=1)  # the first call of a process compiles
    started = time.perf_counter()
    result = measure(model, prompt_tokens=32, new_tokens=8, runs=4)
    elapsed = time.perf_counter() - started
    counted = sum(run.ttft + run.decode for run in result.runs)
    assert len(result.runs) == 4
    assert 0.5 * elapsed < counted < 0.95 * elapsed  # the rest is the run that warms up
    assert result.prefill_tokens_per_second == pytest.approx(32 / result.ttft)
    assert min(7 / run.decode for run in result.runs) <= result.decode_tokens_per_second
    assert result.peak_host_bytes > 10**8  # torch alone is more
    assert result.peak_device_bytes is None


@pytest.mark.parametrize("wrong", [(0, 8, 1), (8, 1, 1), (8, 8, 0), (131072, 8, 1)])
def test_impossible_lengths_are_refused(wrong: tuple[int, int, int], quantized: dict[str, Path]) -> None:
    """Lengths that measure nothing, or pass the model's context, are UsageErrors."""
    model, _ = load_model(quantized["hybrid"])
    prompt_tokens, new_tokens, runs = wrong
    with pytest.raises(UsageError):
        measure(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)


def test_an_interruption_keeps_the_runs_that_are_done(quantized: dict[str, Path]) -> None:
    """Ctrl-C after two of five runs: two are kept and the measurement is partial; before the first nothing is."""
    model, _ = load_model(quantized["hybrid"])

    def interrupt(after: int) -> Callable[[int, int], None]:
        def on_run(done: int, total: int) -> None:
            if done == after:
                raise KeyboardInterrupt

        return on_run

    result = measure(model, prompt_tokens=8, new_tokens=2, runs=5, on_run=interrupt(2))
    assert len(result.runs) == 2
    assert result.partial
    with pytest.raises(KeyboardInterrupt):
        measure(model, prompt_tokens=8, new_tokens=2, runs=5, on_run=interrupt(0))
