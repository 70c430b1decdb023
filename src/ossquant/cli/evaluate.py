"""ossquant eval: how far checkpoints are from the one they were made of, in what they say."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ossquant.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    EffortOption,
    JsonOption,
    KernelsOption,
    MaxMemoryOption,
)
from ossquant.errors import UsageError

if TYPE_CHECKING:
    from ossquant.bench.evaluate import Evaluation

INTERRUPTED = 130

PlotX = Literal["bytes", "speed"]


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders, hub ids or .gguf files; one table puts them side by side.")
    ],
    against: Annotated[str, typer.Option(help="The checkpoint they were made of; it runs in its own format.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A .jsonl file of conversations, or plain text; else packaged prompts."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Where the reference's hidden states are kept; else in the user's cache.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="At most so many conversations.")] = 48,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of answers; 0: the likeliest token each time.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of answers; each has its own by its number.")] = 0,
    reasoning_effort: EffortOption = "medium",
    window: Annotated[int, typer.Option(min=8, help="Tokens of context of a piece of plain text.")] = 512,
    answers: Annotated[int, typer.Option(min=0, help="Prompts a candidate answers itself, for lengths; 0: none.")] = 16,
    speed: Annotated[bool, typer.Option(help="Measure the decode rate, one stream.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw KLD against --plot-x into an SVG file.")] = None,
    plot_x: Annotated[PlotX, typer.Option(help="What is drawn to the right.")] = "bytes",
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Hold checkpoints against the one they were made of, token by token.

    The reference answers prompts in harmony format, sampled, and the tokens of its answers are scored, its reasoning
    included; of a conversation that ends with the assistant that message, of plain text the second half of every
    window, as llama-perplexity does. Its last hidden states are kept and used again.

    KLD: sum of P ln(P / Q) over the vocabulary, P the reference's; mean over tokens. PPL ratio: exp of the mean of
    ln P(token) - ln Q(token). Same top: tokens at which both find the same token likeliest. Δp: Q(token) - P(token).
    Length: of a candidate's own answers by the reference's to the same prompts. tok/s: 32 tokens after 128, median of
    3. ± is one standard error with the texts as units, for tokens of one text are alike; --json has the one that
    takes tokens as independent, as llama-perplexity prints it, too.
    """
    _check(plot, plot_x, speed)
    import ossquant.runtime  # noqa: F401  first, for it says in a sentence what is not installed
    from ossquant.bench.evaluate import evaluate as run
    from ossquant.bench.evaluate import open_candidate
    from ossquant.bench.source import Settings, Source
    from ossquant.cli import evaluate_view, render
    from ossquant.cli.loading import caps

    options: dict[str, Any] = {"device_map": device_map, "max_memory": caps(max_memory), "dtype": dtype,
                               "attn_implementation": attn_implementation, "kernels": kernels}  # fmt: skip
    settings = Settings(
        text=text, reference=reference, prompts=prompts, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, reasoning_effort=reasoning_effort, window=window, answers=answers, speed=speed,
    )  # fmt: skip
    found: list[Evaluation] = []
    try:
        source = Source(against, settings, options)
        opened = [open_candidate(name, source, options) for name in checkpoints]
        with render.steps() as watch:
            kept = source.reference(render.note, watch)
            for evaluation in run(opened, source, kept, watch):
                render.note(evaluate_view.line(evaluation))
                found.append(evaluation)
    except KeyboardInterrupt:
        render.note(f"interrupted after {len(found)} of {len(checkpoints)} checkpoints")
        raise typer.Exit(INTERRUPTED) from None
    _draw(plot, lambda: evaluate_view.svg(found, plot_x))
    if as_json:
        render.print_json(evaluate_view.as_json(found, source, kept))
    else:
        evaluate_view.print_tables(found, source, kept)


def _check(plot: Path | None, plot_x: PlotX, speed: bool) -> None:
    if plot is not None and plot_x == "speed" and not speed:
        raise UsageError("--plot-x speed needs the speeds that --no-speed leaves out")
    if plot is not None and not plot.parent.is_dir():
        raise UsageError(f"--plot: no folder {plot.parent}")


def _draw(plot: Path | None, svg: Callable[[], str]) -> None:
    if plot is None:
        return
    try:
        plot.write_text(svg(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{plot}: {error.strerror}", hint="--plot takes a file you may write") from error
