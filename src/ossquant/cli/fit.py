"""ossquant fit: whether a model fits a device, before a byte is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ossquant.cli.options import JsonOption
from ossquant.errors import UsageError
from ossquant.fit import RESERVE, FitVerdict
from ossquant.fit import fit as judge
from ossquant.hardware import Device, find_device
from ossquant.layout import Role
from ossquant.plan import Plan, make_plan
from ossquant.recipe import BUILT_IN, Recipe, built_in
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec
from ossquant.units import GIB, size, size_both

DOES_NOT_FIT = 4
MODELS = {"20b": "20b", "120b": "120b", "openai/gpt-oss-20b": "20b", "openai/gpt-oss-120b": "120b"}
PUBLISHED = Recipe("mxfp4", "as OpenAI publishes it", {Role.EXPERTS: Scheme("mxfp4")})


@dataclass(frozen=True)
class _Row:
    model: str
    scheme: str
    verdict: FitVerdict


def fit(
    gpu: Annotated[str, typer.Option(help="A device such as 4090, h100-nvl or 'm4 max', or a size such as 24GB.")],
    model: Annotated[
        str | None, typer.Option(help="20b, 120b or a checkpoint folder; both models if not given.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help=f"mxfp4 (as published), {', '.join(BUILT_IN)}; all if not given.")
    ] = None,
    max_model_len: Annotated[int, typer.Option(help="Context in tokens.")] = 8192,
    as_json: JsonOption = False,
) -> None:
    """Hold weights and KV cache against a device.

    Counted exactly: the bytes of the weights and of one sequence's bf16 cache. Not counted: compute buffers,
    driver context, fragmentation; 0.8 GiB are kept free for them. Exits with 4 if nothing shown fits.
    """
    device = find_device(gpu)
    rows = [
        _Row(name, kind, judge(plan, device, max_model_len))
        for name in ([model] if model else ["20b", "120b"])
        for kind, plan in _plans(name, scheme)
    ]
    if as_json:
        from ossquant.cli import render

        render.print_json(
            {
                "device": {"name": device.name, "usable": device.usable_bytes},
                "max_model_len": max_model_len,
                "results": [_json(row) for row in rows],
            }
        )
    else:
        _print(rows, device, max_model_len)
    if all(row.verdict.verdict == "no" for row in rows):
        raise typer.Exit(DOES_NOT_FIT)


def _plans(model: str, scheme: str | None) -> list[tuple[str, Plan]]:
    if model in MODELS:
        spec, stored = ModelSpec.published(MODELS[model]), None
    else:
        from ossquant.checkpoint.reader import open_checkpoint

        if not Path(model).is_dir():
            raise UsageError(f"no model '{model}'", hint="20b, 120b or a local checkpoint folder")
        with open_checkpoint(model) as checkpoint:
            spec, stored = checkpoint.spec, checkpoint.plan
    if scheme:
        recipe = PUBLISHED if scheme == PUBLISHED.name else built_in(scheme)
        return [(recipe.name, make_plan(spec, recipe))]
    if stored:
        return [("as stored", stored)]
    return [(recipe.name, make_plan(spec, recipe)) for recipe in (PUBLISHED, *BUILT_IN.values())]


def _print(rows: list[_Row], device: Device, max_model_len: int) -> None:
    from ossquant.cli import render

    estimates = [row.verdict.estimate for row in rows]
    cells = [
        [
            f"{row.model} {row.scheme}",
            row.verdict.verdict,
            f"{needed.weights / GIB:.2f}",
            f"{needed.kv_cache / GIB:.2f}",
            f"{needed.total / GIB:.2f}",
            f"{row.verdict.headroom / GIB:.2f}",
            f"{row.verdict.longest_max_model_len:,}" if row.verdict.longest_max_model_len else "-",
        ]
        for row, needed in zip(rows, estimates, strict=True)
    ]
    columns = ("", "verdict", "weights", "KV cache", "total", "left", "longest context")
    title = f"{device.name}: {size_both(device.usable_bytes)} usable; {max_model_len:,} tokens of context; in GiB"
    render.print_table(title, columns, cells)
    render.note(f"usable: {device.usable_basis}. Not counted: {', '.join(estimates[0].not_counted)}; "
                f"a model is 'tight' where less than {size(RESERVE)} remain for them.")  # fmt: skip
    if any(MODELS.get(row.model) == "120b" and row.verdict.verdict == "no" for row in rows):
        render.note("No 4-bit format squeezes the 120B into 24 GB: its weights take 58 GiB and more. llama.cpp runs it "
                    "on 24 GB with most experts in 39 GiB of host memory (--n-cpu-moe).")  # fmt: skip


def _json(row: _Row) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "model": row.model,
        "scheme": row.scheme,
        "verdict": verdict.verdict,
        "weights": verdict.estimate.weights,
        "kv_cache": verdict.estimate.kv_cache,
        "total": verdict.estimate.total,
        "not_counted": list(verdict.estimate.not_counted),
        "headroom": verdict.headroom,
        "longest_max_model_len": verdict.longest_max_model_len,
    }
