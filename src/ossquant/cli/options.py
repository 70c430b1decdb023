"""Arguments that several commands share."""

from typing import Annotated

import typer

CheckpointArgument = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id such as openai/gpt-oss-20b.")]
SchemeOption = Annotated[
    str | None,
    typer.Option("--scheme", help="hybrid, nf4, fp4 or bf16. A checkpoint of ours needs none; else quantized on load."),
]
DeviceOption = Annotated[str, typer.Option("--device-map", help="auto, cpu, cuda:0, …")]
DtypeOption = Annotated[str, typer.Option(help="What is computed in: auto, bfloat16, float32 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
