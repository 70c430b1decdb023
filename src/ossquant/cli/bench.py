"""ossquant bench: how fast a checkpoint runs in this process, or a server answers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ossquant.bench.metrics import METRICS
from ossquant.cli.ab import AbOption, BudgetOption, MaxPairsOption, PairsOption, bench_ab
from ossquant.cli.options import (
    DEFAULT_MODEL_LEN,
    AttentionOption,
    DeviceOption,
    DtypeOption,
    Effort,
    GateOption,
    JsonOption,
    KernelsOption,
    MaxMemoryOption,
    SchemeOption,
)
from ossquant.errors import UsageError
from ossquant.units import nearest

if TYPE_CHECKING:
    from ossquant.bench.asked import Asked, Measured

INVALID, INTERRUPTED = 5, 130
SELFTEST = "selftest"
SLO_METRICS = ("ttft", "ttfa", "tpot", "e2e")
HELP = f"""Measure a checkpoint in this process, or a server by its URL.

TARGET is a checkpoint folder, a hub id, the URL of an OpenAI-compatible server (http://127.0.0.1:8000), or
`{SELFTEST}`, which measures a built-in server of known times: is the meter right on this machine?

Load on a server: one stream; --concurrency 1,16 keeps so many requests in flight; --rate 2,8 sends so many a
second at random times and counts from the intended one; --turns 3 holds dialogues. Each prompt begins in its own way,
so that no prefix cache knows it. A run with failed or cut requests, counts that disagree, a warm cache or a
client that cannot keep up is no result: exit code {INVALID}.

--ab "CMD_A" "CMD_B" runs two commands that print a result, such as `ossquant bench … --json`, in turns (A B, B A, …)
and judges B as `ossquant compare` does: at first after --pairs, then after half as many more each time, up to
--max-pairs; the looks share 5 % of wrong answers. Exit codes: 0 ok, 1 regressed or a limit not kept, {INVALID}
inconclusive or an invalid run, 6 a command that failed.

\b
What is measured; of each metric the median over requests, p99 from 300 requests up:
{"".join(f"  {name}: {kind.definition}.{chr(10)}" for name, kind in METRICS.items())}"""


def bench(
    target: Annotated[str | None, typer.Argument(help=f"A checkpoint, a URL, or {SELFTEST}.")] = None,
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    kernels: KernelsOption = "auto",
    model: Annotated[str | None, typer.Option(help="Which of the server's models.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, such as 1,16,128: a scenario each.")] = "",
    rate: Annotated[str, typer.Option(help="Requests a second, such as 0.5,2: a scenario each.")] = "",
    turns: Annotated[int, typer.Option(min=1, max=100, help="Turns of a dialogue.")] = 1,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", "--runs", min=1, help="Counted requests (or dialogues) of a scenario; 3 in this process."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Send no more after so many seconds of a scenario.")] = 3600.0,
    warm_up: Annotated[int, typer.Option(min=0, help="Uncounted requests of each stream before a scenario.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt, as near as words allow.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer, at most on a server.")] = 64,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Have answers be exactly that long; past harmony's end a server may show none of it."
        ),
    ] = False,
    prompts: Annotated[
        Literal["corpus", "synthetic"], typer.Option(help="The packaged corpus, or dialogues of random words.")
    ] = "corpus",
    dataset: Annotated[
        Path | None, typer.Option(help='JSON lines instead: {"prompt": …} or {"messages": […]}.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, arrivals and sampling.")] = 0,
    reasoning_effort: Annotated[Effort | None, typer.Option(help="How long it thinks.")] = None,
    slo: Annotated[str, typer.Option(help="For goodput, such as ttft=500ms,tpot=50ms; of ttft, ttfa, tpot, e2e.")] = "",
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json to count with: where there is no usage, or beside it.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the server's key.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    gpu: Annotated[
        str | None, typer.Option(help="What it runs on, for rent and roofline; this machine's if not given.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="What the server holds, for the roofline: mxfp4, gguf-q8, …")
    ] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="The rent of all its devices.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for result.json and requests.jsonl, a line a request; of --ab for every result."),
    ] = None,
    save_text: Annotated[bool, typer.Option("--save-text", help="In requests.jsonl, too, what was said.")] = False,
    ab: AbOption = None,
    pairs: PairsOption = 5,
    max_pairs: MaxPairsOption = None,
    budget: BudgetOption = None,
    gate: GateOption = None,
    as_json: JsonOption = False,
) -> None:
    from ossquant.bench.asked import Asked
    from ossquant.bench.endpoint import is_url
    from ossquant.bench.shape import make_shapes
    from ossquant.bench.tokens import load_tokenizer

    if ab is not None and target is None:
        bench_ab(ab, pairs=pairs, max_pairs=max_pairs, budget=budget, gate=gate, output=output, as_json=as_json)
    if target is None or ab is not None:
        raise UsageError("bench takes either a TARGET or --ab", hint="ossquant bench http://127.0.0.1:8000")
    if gate or budget or max_pairs:
        raise UsageError("--gate, --budget and --max-pairs go with --ab", hint="ossquant report RESULT --gate …")
    if target == SELFTEST:
        _selftest(_numbers("--concurrency", concurrency, int), as_json)
        return
    asked = Asked(
        shapes=make_shapes(_numbers("--concurrency", concurrency, int), _numbers("--rate", rate, float), turns),
        requests=requests, prompt_tokens=prompt_tokens, output_tokens=new_tokens, source=prompts, dataset=dataset,
        seed=seed, warm_up=warm_up, timeout=timeout, seconds=seconds, model=model, reasoning_effort=reasoning_effort,
        ignore_eos=ignore_eos, slo=_slo(slo), tokenizer=load_tokenizer(tokenizer) if tokenizer else None, gpu=gpu,
        usd_per_hour=usd_per_hour, format=format_,
    )  # fmt: skip
    if is_url(target):
        measured = _endpoint(target, asked, api_key_env)
    else:
        _refuse_load(asked)
        loading = {"scheme": scheme, "device_map": device_map, "max_memory": max_memory, "dtype": dtype,
                   "attn_implementation": attn_implementation, "kernels": kernels}  # fmt: skip
        measured = _checkpoint(target, asked, loading)
    _tell(measured, output, save_text, as_json)


bench.__doc__ = HELP


def _endpoint(url: str, asked: "Asked", api_key_env: str | None) -> "Measured":
    from ossquant.bench.endpoint import find_endpoint
    from ossquant.bench.run import measure_endpoint
    from ossquant.cli import render

    endpoint = find_endpoint(url, api_key_env)
    with render.load_progress() as on_progress:
        return measure_endpoint(endpoint, asked, announce=render.note, on_progress=on_progress)


def _checkpoint(checkpoint: str, asked: "Asked", loading: dict[str, Any]) -> "Measured":
    from ossquant.bench.process import measure_checkpoint
    from ossquant.cli import render
    from ossquant.cli.loading import load

    context = max(DEFAULT_MODEL_LEN, asked.prompt_tokens + asked.output_tokens)
    loaded = load(checkpoint, max_model_len=context, **loading)
    placed = {"parameters": loaded.placed.parameters, "parameters_4bit": loaded.placed.parameters_4bit,
              "bytes_by_device": dict(loaded.placed.bytes_by_device)}  # fmt: skip
    with render.load_progress() as on_progress:
        return measure_checkpoint(
            checkpoint, loaded.model, placed, asked, lambda done, total: on_progress("single", done, total, 1, 0, 0)
        )


def _tell(measured: "Measured", output: Path | None, save_text: bool, as_json: bool) -> None:
    """Print and write a result; leave with the code that says what it is worth."""
    from ossquant.bench.records import write_output
    from ossquant.cli import render
    from ossquant.cli.bench_view import print_result

    if output is not None:
        write_output(output, measured, text=save_text)
    if as_json:
        render.print_json(measured.result.to_json())
    else:
        print_result(measured.result)
    for scenario in measured.result.scenarios:
        for reason in scenario.invalid:
            render.note(f"no result: {scenario.name}: {reason}")
    if measured.result.partial:
        render.note("interrupted: this is what was measured until then")
        raise typer.Exit(INTERRUPTED)
    if not measured.result.valid:
        raise typer.Exit(INVALID)


def _selftest(streams: list[int], as_json: bool) -> None:
    from ossquant.bench.selftest import STREAMS, selftest
    from ossquant.cli import render
    from ossquant.cli.bench_view import print_checks

    with render.load_progress() as on_progress:
        checks = selftest(streams or STREAMS, on_progress=on_progress)
    wrong = [check for check in checks if not check.right]
    if as_json:
        rows = [{**vars(check), "right": check.right} for check in checks]
        render.print_json({"schema_version": 1, "kind": "selftest", "right": not wrong, "checks": rows})
    else:
        print_checks(checks)
    if wrong:
        render.note(f"{len(wrong)} of {len(checks)} figures are off: this machine is too busy to measure on")
        raise typer.Exit(INVALID)


def _refuse_load(asked: "Asked") -> None:
    """In this process there is one stream, and random tokens."""
    if [shape.kind for shape in asked.shapes] != ["single"]:
        raise UsageError("a checkpoint in this process answers one stream", hint="serve it, and give the URL")
    if asked.dataset or asked.tokenizer:
        raise UsageError("a checkpoint in this process is asked random tokens", hint="serve it, and give the URL")


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{option}: '{text}' are no numbers", hint="write them like 1,16,128") from error


def _slo(text: str) -> dict[str, float]:
    """Read ttft=500ms,tpot=0.05 into seconds."""
    limits = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        number = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s)?", value)
        if name not in SLO_METRICS:
            raise UsageError(f"--slo knows no '{name}'", hint=nearest(name, SLO_METRICS))
        if not number or not float(number[1]):
            raise UsageError(f"--slo: '{part}' is no limit", hint="write it like ttft=500ms,tpot=50ms")
        limits[name] = float(number[1]) / (1000 if number[2] == "ms" else 1)
    return limits
