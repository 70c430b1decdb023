"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

CheckpointArgument = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id such as openai/gpt-oss-20b.")]
SchemeOption = Annotated[
    str | None,
    typer.Option(
        "--scheme", help="hybrid, nf4, fp4, mxfp4 or bf16. A checkpoint of ours needs none; else quantized on load."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device-map", help="auto, cpu, cuda:0, …")]
MaxMemoryOption = Annotated[
    str | None, typer.Option(help="Caps by device, such as 0=20GiB,cpu=60GiB; other accelerators are not used.")
]
MaxModelLenOption = Annotated[int, typer.Option(min=1, help="Tokens of context to leave room for on accelerators.")]
DEFAULT_MODEL_LEN = 8192
DtypeOption = Annotated[str, typer.Option(help="What is computed in: auto, bfloat16, float32 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
AttentionOption = Annotated[str, typer.Option(help="auto, eager or flash_attention_4.")]
Kernels = Literal["auto", "own", "never"]
KernelsOption = Annotated[
    Kernels,
    typer.Option(help="On a GPU: what is faster there, the same without the hub's kernels, or none and no graphs."),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")]
Effort = Literal["low", "medium", "high"]
EffortOption = Annotated[Effort, typer.Option(help="How long it thinks.")]
AnalysisOption = Annotated[bool, typer.Option(help="Show the analysis channel, on stderr.")]
SystemOption = Annotated[str | None, typer.Option(help="Instructions that stand before the conversation.")]
WarmupOption = Annotated[bool, typer.Option("--warmup", help="Warm up before answering: no slow first token.")]
GateOption = Annotated[
    Path | None, typer.Option(help="A gate.toml; else throughput and TTFT may be 2 % worse than those of base.")
]
