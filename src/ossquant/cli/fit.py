"""ossquant fit: whether a model fits, before a byte is downloaded."""

from pathlib import Path
from typing import Annotated

import typer

from ossquant.cli.options import JsonOption
from ossquant.engine import ENGINES
from ossquant.recipe import BUILT_IN, SERVED


def fit(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[GPU]...", help="What --gpu or --compare takes.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="4090, h100-nvl, 'm4 max', 4xA100-80G, 24GB, or auto.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="20b, 120b, a checkpoint folder or a hub id; both sizes if not given.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=f"{', '.join(ENGINES)}; all if not given.")] = None,
    engine_version: Annotated[str | None, typer.Option(help="Such as 0.11.0, or b8164 for llama.cpp.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help=f"{', '.join(BUILT_IN | SERVED)}.")] = None,
    max_model_len: Annotated[int, typer.Option(help="Context of one sequence, in tokens.")] = 8192,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (16 bits), q8_0, q4_0, fp8, …")] = "auto",
    ubatch: Annotated[int | None, typer.Option(help="llama.cpp: tokens computed at once; 512.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="vLLM: tokens of a batch. transformers, mlx: tokens of a prompt at once.")
    ] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="vLLM: its share of the GPU; 0.9.")] = None,
    tp: Annotated[int | None, typer.Option(help="vLLM: GPUs that split each layer; all of them.")] = None,
    n_cpu_moe: Annotated[
        int, typer.Option(help="llama.cpp, ossquant run: layers whose experts stay on the host; planned if not given.")
    ] = 0,
    kv_unified: Annotated[bool, typer.Option("--kv-unified", help="llama.cpp: sequences share the context.")] = False,
    swa_full: Annotated[bool, typer.Option("--swa-full", help="llama.cpp: sliding layers keep all tokens.")] = False,
    host_memory: Annotated[str | None, typer.Option(help="Free host memory, such as 64GB.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="GPUs side by side: --compare 4090 5090 a100.")] = False,
    cheapest_: Annotated[bool, typer.Option("--cheapest", help="Which GPUs carry this workload, by rent.")] = False,
    log: Annotated[Path | None, typer.Option(help="Hold a server's start-up log against the prediction.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether gpt-oss fits a GPU: per engine and format, with the line to type next.

    Weights are exact, other terms have bounds: 'fits' means the high figure fits, 'tight' only the expected
    one. Exits with 4 if nothing shown fits.
    """
    from ossquant.cli.fit_answer import answer  # devices and engines, which no other command waits for

    answer(
        names=names,
        gpu=gpu,
        gpus=gpus,
        model=model,
        engine=engine,
        engine_version=engine_version,
        format_=format_,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        ubatch=ubatch,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        tp=tp,
        n_cpu_moe=n_cpu_moe,
        kv_unified=kv_unified,
        swa_full=swa_full,
        host_memory=host_memory,
        compare=compare,
        cheapest_=cheapest_,
        log=log,
        as_json=as_json,
    )
