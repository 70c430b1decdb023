"""ossquant warmup: what the first request costs, and what is left of it after warming up."""

import statistics
from typing import Any

from ossquant.cli.options import (
    DEFAULT_MODEL_LEN,
    AttentionOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    JsonOption,
    KernelsOption,
    MaxMemoryOption,
    MaxModelLenOption,
    SchemeOption,
)
from ossquant.cli.speech import conversation

REQUESTS = 3


def warmup(
    checkpoint: CheckpointArgument,
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    max_model_len: MaxModelLenOption = DEFAULT_MODEL_LEN,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Load a checkpoint, warm it up, and say what that took and what it saved.

    Cold TTFT is that of the very first request after loading, warm TTFT the median of three after warming up. It
    warms its own process: `run` and `chat` have --warmup. On disk stay only the files' pages in the system's cache
    and what numba compiled.
    """
    from ossquant.cli import render
    from ossquant.cli.loading import load
    from ossquant.runtime.warmup import warm_up

    loaded = load(checkpoint, warmup=False, max_memory=max_memory, max_model_len=max_model_len, scheme=scheme,
                  device_map=device_map, dtype=dtype, attn_implementation=attn_implementation,
                  kernels=kernels)  # fmt: skip
    cold = _ttft(loaded.model, loaded.tokenizer)
    warming = warm_up(loaded.model, loaded.tokenizer)
    warm = statistics.median(_ttft(loaded.model, loaded.tokenizer) for _ in range(REQUESTS))
    if as_json:
        render.print_json(
            {
                "load_seconds": round(loaded.load, 3),
                "warm_up_seconds": round(warming, 3),
                "ttft_cold_seconds": round(cold, 4),
                "ttft_warm_seconds": round(warm, 4),
                "device": str(loaded.model.device),
            }
        )
        return
    rows = [
        ("load", f"{loaded.load:.2f} s"),
        ("first request, cold", f"{cold:.3f} s"),
        ("warm-up after it", f"{warming:.3f} s"),
        ("later requests", f"{warm:.3f} s"),
    ]
    render.print_table(f"{checkpoint} on {loaded.model.device}, seconds to the first token", ("", ""), rows)


def _ttft(model: Any, tokenizer: Any) -> float:
    from ossquant.runtime.generate import generate

    return generate(model, tokenizer, conversation("Who are you?"), max_new_tokens=1).ttft
