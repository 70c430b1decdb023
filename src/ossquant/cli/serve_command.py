"""ossquant serve-command: the exact line that serves a model, sized by fit."""

from typing import Annotated

import typer

from ossquant.cli.options import JsonOption
from ossquant.engine import ENGINES, LOOPBACK


def serve_command(
    source: Annotated[
        str,
        typer.Argument(help="20b, 120b, a hub id, a checkpoint folder, or a folder that holds a GGUF of ossquant's."),
    ],
    engine: Annotated[str | None, typer.Option(help=f"{', '.join(ENGINES)}; what fits best if not given.")] = None,
    gpu: Annotated[str, typer.Option(help="4090, h100-nvl, 'm4 max', 4xA100-80G, 24GB, or auto.")] = "auto",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    max_model_len: Annotated[int, typer.Option(help="Context of one sequence, in tokens.")] = 8192,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (16 bits), q8_0, q4_0, fp8, …")] = "auto",
    host: Annotated[str, typer.Option(help="Where the server listens.")] = LOOPBACK,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The engine's own if not given.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Free host memory, such as 64GB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the line that serves a model on a GPU, and nothing else on stdout: eval "$(ossquant serve-command …)".

    What it takes, the oldest version of the server and what to know beside it go to stderr. Exits with 4 if it
    does not fit.
    """
    from ossquant.cli.serve_answer import answer  # devices and engines, which no other command waits for

    answer(
        source=source,
        engine=engine,
        gpu=gpu,
        gpus=gpus,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        host=host,
        port=port,
        host_memory=host_memory,
        as_json=as_json,
    )
