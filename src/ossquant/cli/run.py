"""ossquant run: load a checkpoint in 4 bits and ask it something."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossquant.cli.options import (
    DEFAULT_MODEL_LEN,
    AnalysisOption,
    AttentionOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    EffortOption,
    JsonOption,
    KernelsOption,
    MaxMemoryOption,
    MaxModelLenOption,
    MaxNewTokensOption,
    SchemeOption,
    SystemOption,
    WarmupOption,
)
from ossquant.cli.speech import Speech, conversation, summary
from ossquant.errors import UsageError

if TYPE_CHECKING:
    from ossquant.cli.loading import Loaded
    from ossquant.runtime.generate import Reply

INTERRUPTED = 130  # as the shell has it for SIGINT


def run(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    max_model_len: MaxModelLenOption = DEFAULT_MODEL_LEN,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    kernels: KernelsOption = "auto",
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token; gpt-oss is sampled at 1.")] = 0.0,
    reasoning_effort: EffortOption = "medium",
    analysis: AnalysisOption = True,
    warmup: WarmupOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load a checkpoint in 4 bits, say where it sits, and answer a prompt.

    The answer alone is on stdout. Ctrl-C ends it with exit code 130; what was said stays.
    """
    messages = conversation(_asked(prompt), system)
    from ossquant.cli import render
    from ossquant.cli.loading import load
    from ossquant.runtime.generate import Interrupted, generate

    loaded = load(checkpoint, warmup=warmup, max_memory=max_memory, max_model_len=max_model_len, scheme=scheme,
                  device_map=device_map, dtype=dtype, attn_implementation=attn_implementation,
                  kernels=kernels)  # fmt: skip
    speech = None if as_json else Speech(analysis)
    try:
        reply = generate(
            loaded.model,
            loaded.tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            reasoning_effort=reasoning_effort,
            on_text=speech,
        )
    except Interrupted as interrupted:
        reply = interrupted.reply
    if speech is None:
        render.print_json(_json(reply, loaded))
    else:
        speech.end()
        render.note(summary(reply))
    if reply.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _asked(prompt: str) -> str:
    """The prompt, from stdin if it is '-'. Raises UsageError if there is none."""
    text = sys.stdin.buffer.read().decode("utf-8", "replace").strip() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='ossquant run CHECKPOINT "What is the capital of France?"')
    return text


def _json(reply: "Reply", loaded: "Loaded") -> dict[str, Any]:
    return {
        "final": reply.final,
        "analysis": reply.analysis,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": len(reply.token_ids),
        "ttft_seconds": round(reply.ttft, 4),
        "decode_tokens_per_second": round(reply.tokens_per_second, 2),
        "load_seconds": round(loaded.load, 3),
        "warm_up_seconds": None if loaded.warm_up is None else round(loaded.warm_up, 3),
        "parameters": loaded.placed.parameters,
        "parameters_4bit": loaded.placed.parameters_4bit,
        "bytes_by_device": dict(loaded.placed.bytes_by_device),
    }
