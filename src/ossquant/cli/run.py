"""ossquant run: load a checkpoint in 4 bits and ask it something."""

from typing import TYPE_CHECKING, Annotated

import typer

from ossquant.cli.options import CheckpointArgument, DeviceOption, DtypeOption, JsonOption, SchemeOption

if TYPE_CHECKING:
    from ossquant.runtime.harmony import OnText


def run(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    attn_implementation: Annotated[str, typer.Option(help="auto, eager or flash_attention_4.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; gpt-oss is sampled at 1.")] = 0.0,
    reasoning_effort: Annotated[str, typer.Option(help="low, medium or high.")] = "medium",
    analysis: Annotated[bool, typer.Option(help="Show the analysis channel, on stderr.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Load a checkpoint in 4 bits, say where it sits, and answer a prompt."""
    from ossquant.cli import render
    from ossquant.runtime.generate import generate
    from ossquant.runtime.load import load_model, placement

    model, tokenizer = load_model(
        checkpoint, scheme=scheme, device_map=device_map, dtype=dtype, attn_implementation=attn_implementation
    )
    placed = placement(model)
    render.note(str(placed))

    def on_text(channel: str, text: str) -> None:
        if as_json:
            return
        if channel == "final":
            typer.echo(text, nl=False)
        elif analysis:
            render.err.print(text, end="", style="dim", markup=False, soft_wrap=True)

    reply = generate(
        model,
        tokenizer,
        [{"role": "user", "content": prompt}],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        reasoning_effort=reasoning_effort,
        on_text=_breaking(on_text),
    )
    if as_json:
        render.print_json(
            {
                "final": reply.final,
                "analysis": reply.analysis,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": len(reply.token_ids),
                "ttft_seconds": round(reply.ttft, 4),
                "decode_tokens_per_second": round(reply.tokens_per_second, 2),
                "parameters": placed.parameters,
                "parameters_4bit": placed.parameters_4bit,
                "bytes_by_device": dict(placed.bytes_by_device),
            }
        )
        return
    typer.echo()
    ended = "" if reply.finish_reason == "stop" else f"; cut off after {max_new_tokens} tokens (--max-new-tokens)"
    render.note(f"{len(reply.token_ids)} tokens, {reply.tokens_per_second:.1f} tokens/s, "
                f"first after {reply.ttft:.2f} s{ended}")  # fmt: skip


def _breaking(on_text: "OnText") -> "OnText":
    """Put a line break on stderr where one channel follows another."""
    last = ""

    def spoken(channel: str, text: str) -> None:
        nonlocal last
        if last and channel != last:
            typer.echo(err=True)
        last = channel
        on_text(channel, text)

    return spoken
