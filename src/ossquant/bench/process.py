"""A checkpoint measured in this process, as a result of the same form as a server's."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from ossquant.bench.asked import Asked, Measured
from ossquant.bench.devices import DeviceWatch
from ossquant.bench.environment import created, environment
from ossquant.bench.facts import Facts
from ossquant.bench.measure import Measurement, OnRun, Run, measure
from ossquant.bench.result import Result, Target
from ossquant.bench.rig import find_rig
from ossquant.bench.scenario import make_scenario
from ossquant.bench.shape import Shape
from ossquant.bench.trace import Chunk, Trace, Usage
from ossquant.checkpoint.fingerprint import fingerprint
from ossquant.checkpoint.reader import open_checkpoint

ENGINE = "ossquant"
RUNS = 3
NO_CHANNELS = "a prompt of random tokens is answered in no channel"


def measure_checkpoint(checkpoint: str, model: Any, placed: Mapping[str, Any], asked: Asked, on_run: OnRun) -> Measured:
    """Measure a loaded model: one stream, random tokens. placed describes it. Raises UsageError, CheckpointError."""
    began = created()
    absent = None if model.device.type == "cuda" else "the model runs on the host"
    with DeviceWatch(None, absent) as watch:
        measured = measure(
            model, prompt_tokens=asked.prompt_tokens, new_tokens=asked.output_tokens, runs=asked.requests or RUNS,
            warm_up=asked.warm_up, seed=asked.seed, on_run=on_run,
        )  # fmt: skip
    traces = [_trace(index, run, measured) for index, run in enumerate(measured.runs)]
    rig = find_rig(asked.gpu, asked.usd_per_hour, _plan(model), absent=absent, layered=True)
    drawn = replace(watch.result(), device_bytes=measured.peak_device_bytes, host_bytes=measured.peak_host_bytes)
    why = {**rig.why, "ttfa": NO_CHANNELS}
    shape = Shape("single")
    facts = Facts(
        shape=shape.to_json(),
        seconds=traces[-1].ended - traces[0].sent,
        partial=measured.partial,
        slo=asked.slo,
        drawn=drawn,
        usd_per_hour=rig.usd_per_hour,
        roof_tokens_per_second=rig.roof_tokens_per_second,
        why=why,
    )
    scenario = make_scenario(shape.name, traces, facts)
    counts = {**scenario.counts, "prefill_tokens_per_second": measured.prefill_tokens_per_second}
    with open_checkpoint(checkpoint) as opened:
        sha256 = fingerprint(opened)
    result = Result(
        created=began,
        ossquant=version("ossquant"),
        partial=measured.partial,
        target=Target("checkpoint", checkpoint, str(model.config.model_type), ENGINE),
        environment=environment()
        | {
            "checkpoint_sha256": sha256,
            "device": measured.device,
            "model": {**placed, "bytes_by_format": _bytes_by_format(model)},
        },
        settings=_settings(asked, measured) | {"rig": dict(rig.described)},
        scenarios=(replace(scenario, counts=counts),),
    )
    return Measured(result, {shape.name: traces})


def _trace(index: int, run: Run, measured: Measurement) -> Trace:
    """A run in the form of a request: each token a chunk of its own."""
    chunks = tuple(Chunk(at, "other", "", place + 1) for place, at in enumerate(run.tokens_at))
    usage = Usage(prompt=measured.prompt_tokens, completion=measured.new_tokens)
    return Trace(index, run.started, run.started, run.tokens_at[-1], chunks, usage, finish_reason="length")


def _bytes_by_format(model: Any) -> dict[str, int]:
    """Stored bytes by format, such as mxfp4 and bf16; empty if the model was not planned."""
    plan, nbytes = _plan(model), dict[str, int]()
    for role in [] if isinstance(plan, str) else plan.by_role():
        nbytes[role.scheme.format] = nbytes.get(role.scheme.format, 0) + role.nbytes
    return nbytes


def _plan(model: Any) -> Any:
    """What the model holds, or why a token's bytes are not known."""
    plan = getattr(getattr(model, "hf_quantizer", None), "plan", None)
    return plan or "what the model holds is not planned"


def _settings(asked: Asked, measured: Measurement) -> dict[str, Any]:
    return {
        "seed": asked.seed,
        "prompts": "random tokens",
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.new_tokens,
        "requests": asked.requests or RUNS,
        "warm_up": asked.warm_up,
        "slo": dict(asked.slo),
    }
