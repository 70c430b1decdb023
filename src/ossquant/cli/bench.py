"""ossquant bench: how fast a checkpoint runs in this process."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossquant.cli.options import (
    DEFAULT_MODEL_LEN,
    AttentionOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxMemoryOption,
    SchemeOption,
)
from ossquant.units import size

if TYPE_CHECKING:
    from ossquant.bench.measure import Measurement


def bench(
    checkpoint: CheckpointArgument,
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt, random tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    runs: Annotated[int, typer.Option(help="Counted runs, after one that warms up.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint in this process, one stream at a time.

    TTFT: from the call to the first token. Prefill: prompt tokens by TTFT. Decode: tokens after the first by
    the time they took. Medians over the runs.
    """
    from ossquant.bench.measure import measure
    from ossquant.cli import render
    from ossquant.cli.loading import load

    context = max(DEFAULT_MODEL_LEN, prompt_tokens + new_tokens)
    loaded = load(checkpoint, max_memory=max_memory, max_model_len=context, scheme=scheme, device_map=device_map,
                  dtype=dtype, attn_implementation=attn_implementation)  # fmt: skip
    result = measure(loaded.model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs)
    if as_json:
        render.print_json(_json(result))
        return
    peak = result.peak_device_bytes
    rows = [
        ("TTFT", f"{result.ttft * 1000:.1f} ms"),
        ("prefill", f"{result.prefill_tokens_per_second:.1f} tokens/s"),
        ("decode", f"{result.decode_tokens_per_second:.1f} tokens/s"),
        ("peak host memory", size(result.peak_host_bytes)),
        *([("peak device memory", size(peak))] if peak is not None else []),
    ]
    title = f"{result.prompt_tokens} + {result.new_tokens} tokens on {result.device}, median of {runs} runs"
    render.print_table(title, ("", ""), rows)


def _json(result: "Measurement") -> dict[str, Any]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "device": result.device,
        "ttft_seconds": result.ttft,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
        "runs": [{"ttft_seconds": run.ttft, "decode_seconds": run.decode} for run in result.runs],
    }
