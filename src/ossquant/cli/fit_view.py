"""How `ossquant fit` looks in a terminal: answers on stdout, remarks on stderr."""

from typing import TYPE_CHECKING

from ossquant.advice import command, warnings
from ossquant.fit import FitVerdict, best
from ossquant.hardware import Device
from ossquant.memory import Term
from ossquant.units import GIB, MIB, size, size_both

if TYPE_CHECKING:
    from ossquant.fit_log import LogComparison

BAR_WIDTH = 6


def show(verdicts: list[FitVerdict]) -> None:
    """One verdict in full, or several in a table."""
    if len(verdicts) == 1:
        _show_one(verdicts[0])
    else:
        _show_table(verdicts)


def _show_table(verdicts: list[FitVerdict]) -> None:
    from ossquant.cli import render

    rows = [
        [
            _short_model(verdict),
            verdict.candidate.engine.name,
            verdict.candidate.format,
            verdict_name(verdict),
            render.bar(verdict.estimate.total.expected / verdict.usable, BAR_WIDTH),
            f"{verdict.estimate.total.expected / GIB:.1f}",
            f"{verdict.estimate.total.expected / 1e9:.1f}",
            f"{verdict.longest_max_model_len}" if verdict.longest_max_model_len else "-",
            _decode(verdict),
        ]
        for verdict in verdicts
    ]
    columns = ("", "engine", "format", "verdict", "", "GiB", "GB", "longest", "tok/s")
    render.print_table(_title(verdicts[0]), columns, rows, texts=5, dense=True)
    for model in dict.fromkeys(verdict.candidate.model for verdict in verdicts):
        chosen = best([verdict for verdict in verdicts if verdict.candidate.model == model])
        render.print_line(f"{model}: {command(chosen) or what_it_takes(chosen)}")
    for warning in dict.fromkeys(warning for verdict in _worth_a_warning(verdicts) for warning in warnings(verdict)):
        render.note(f"! {warning}")


def _worth_a_warning(verdicts: list[FitVerdict]) -> list[FitVerdict]:
    """Of each model and engine the verdict to act on, if there is something to act on."""
    groups: dict[tuple[str, str], list[FitVerdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.candidate.model, verdict.candidate.engine.name), []).append(verdict)
    chosen = [best(group) for group in groups.values()]
    running = [verdict for verdict in chosen if verdict.verdict != "no" or verdict.obstacle]
    return running or [best(verdicts)]


def _show_one(verdict: FitVerdict) -> None:
    from ossquant.cli import render

    estimate, chosen = verdict.estimate, verdict.candidate
    terms = {
        "weights": estimate.weights,
        "KV cache": estimate.kv_cache,
        "compute buffers": estimate.compute,
        "driver, runtime": estimate.overhead,
        "total": estimate.total,
    }
    render.print_table(
        f"{_title(verdict)}\n{chosen.model} in {chosen.engine.name}, {chosen.format}",
        ("", "low", "expected", "high GiB", "expected GB", ""),
        [[name, *_figures(term), term.basis] for name, term in terms.items()],
    )
    share = estimate.total.expected / verdict.usable
    render.print_line(f"{verdict_name(verdict)}: {render.bar(share, 16)} {share:.0%} of {size_both(verdict.usable)}, "
                      f"{size(verdict.headroom)} left")  # fmt: skip
    if estimate.host_weights or verdict.workload.n_cpu_layers:
        render.print_line(f"host memory: {size_both(estimate.host_total)}, {size(estimate.host_weights)} of it weights")
    render.print_line(f"longest context {verdict.longest_max_model_len:,} tokens; most sequences at "
                      f"{verdict.workload.max_model_len:,}: {verdict.most_num_seqs:,}")  # fmt: skip
    if verdict.decode:
        render.print_line(f"decode: {_decode(verdict)} tokens/s expected")
    if price := verdict.usd_per_million_tokens():
        render.print_line(f"rent: {verdict.usd_per_hour:.2f} USD an hour, {price[0]:.2f}-{price[1]:.2f} USD a million "
                          "tokens")  # fmt: skip
    answer = command(verdict) or what_it_takes(verdict)
    render.print_line(answer)
    for warning in warnings(verdict):
        if warning != answer:
            render.note(f"! {warning}")


def _figures(term: Term) -> list[str]:
    return [
        f"{term.low / GIB:.2f}",
        f"{term.expected / GIB:.2f}",
        f"{term.high / GIB:.2f}",
        f"{term.expected / 1e9:.2f}",
    ]


def _title(verdict: FitVerdict) -> str:
    machine, workload = verdict.machine, verdict.workload
    sequences = f", {workload.sequences} sequences" if workload.sequences > 1 else ""
    return f"{machine_name(verdict)}: {_memory(machine.device)}; {workload.max_model_len:,} tokens{sequences}"


def _short_model(verdict: FitVerdict) -> str:
    """The size, or nothing for a checkpoint, which the table is all about."""
    return verdict.candidate.model if len(verdict.candidate.model) <= 4 else ""


def machine_name(verdict: FitVerdict) -> str:
    """The device, and how many of them."""
    machine = verdict.machine
    return machine.device.name if machine.count == 1 else f"{machine.count} x {machine.device.name}"


def _memory(device: Device) -> str:
    total = f" of {device.nvml_bytes // MIB} MiB" if device.nvml_bytes else ""
    return f"{size_both(device.usable_bytes)} usable{total}"


def verdict_name(verdict: FitVerdict) -> str:
    """The verdict, with how much lies on the host."""
    on_host = verdict.workload.n_cpu_moe or verdict.workload.n_cpu_layers
    return f"{verdict.verdict} {on_host}" if verdict.verdict == "offload" else verdict.verdict


def _decode(verdict: FitVerdict) -> str:
    decode = verdict.decode
    return f"{decode.low:.0f}-{decode.high:.0f}" if decode else "-"


def what_it_takes(verdict: FitVerdict) -> str:
    """Why it is a no."""
    if verdict.obstacle:
        return f"{verdict.obstacle}."
    needed = verdict.estimate.total.high
    return f"no: it takes {size_both(needed)} and {verdict.estimate.host_total / GIB:.0f} GiB of host memory."


def show_comparison(columns: list[list[FitVerdict]]) -> None:
    """Verdict and longest context of every model, a column a machine."""
    from ossquant.cli import render

    letters = [_letter(index) for index in range(len(columns))]
    for letter, column in zip(letters, columns, strict=True):
        price = column[0].usd_per_hour
        rent = f", {price:.2f} USD an hour" if price else ""
        render.print_line(f"{letter}: {machine_name(column[0])}, {_memory(column[0].machine.device)}{rent}")
    workload = columns[0][0].workload
    title = f"verdict and longest context; asked for {workload.max_model_len:,} tokens"
    at_once = max(1, (render.width() - 20) // 12)
    for begin in range(0, len(columns), at_once):
        shown = columns[begin : begin + at_once]
        rows = []
        for model in dict.fromkeys(verdict.candidate.model for verdict in shown[0]):
            rows.append([model if len(model) <= 4 else "", *("" for _ in shown)])
            for row in zip(*shown, strict=True):
                chosen = row[0].candidate
                if chosen.model == model:
                    rows.append([f"{chosen.engine.name} {chosen.format}", *(_cell(verdict) for verdict in row)])
        render.print_table(title, ("", *letters[begin : begin + at_once]), rows, dense=True)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index)


def _cell(verdict: FitVerdict) -> str:
    return f"{verdict.verdict} {_short(verdict.longest_max_model_len)}".strip()


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens else ""


def show_cheapest(verdicts: list[FitVerdict]) -> None:
    """What carries a workload, by rent."""
    from ossquant.cli import render

    if not verdicts:
        render.note("no GPU with a known price carries this workload, up to eight of them")
        return
    rows = []
    for verdict in verdicts:
        price = verdict.usd_per_million_tokens()
        rows.append([
            _short_model(verdict),
            f"{verdict.candidate.engine.name} {verdict.candidate.format}",
            machine_name(verdict),
            f"{verdict.usd_per_hour:.2f}",
            f"{price[0]:.2f}-{price[1]:.2f}" if price else "-",
            _decode(verdict),
        ])  # fmt: skip
    columns = ("", "engine", "GPU", "USD/h", "USD/M tokens", "tok/s")
    title = f"GPUs with a known rent that carry {verdicts[0].workload.max_model_len:,} tokens of context"
    render.print_table(title, columns, rows, texts=3)
    sources = dict.fromkeys(verdict.machine.device.sources["price"] for verdict in verdicts)
    render.note(f"rents: {'; '.join(sources)}. A million tokens are written ones, at the decode rate shown.")


def show_log(comparison: "LogComparison") -> None:
    """A log's terms, predicted and measured."""
    from ossquant.cli import render

    log, workload = comparison.log, comparison.workload
    device = comparison.machine.device.name if comparison.device_known else "a device it does not name"
    rows = [
        [row.term, *_figures(row.predicted)[:3], f"{row.measured / GIB:.2f}",
         f"{row.error:+.1%}" if row.error is not None else "-", row.predicted.basis]
        for row in comparison.rows
    ]  # fmt: skip
    render.print_table(
        f"{' '.join(filter(None, (log.engine, log.version)))} on {comparison.machine.count} x {device}: "
        f"{comparison.model} {comparison.format}, {workload.max_model_len:,} tokens x {workload.sequences}; in GiB",
        ("", "low", "expected", "high", "measured", "off by", ""),
        rows,
    )
    if comparison.assumed:
        render.note(f"! the log does not say {', '.join(comparison.assumed)}: taken from the options or the defaults.")
    if not comparison.device_known and "available_kv_cache" in log.measured:
        render.note("! say --gpu to hold what vLLM left for the cache against the prediction.")
