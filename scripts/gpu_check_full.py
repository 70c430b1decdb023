"""Full-size random models on a device: memory against the prediction, loading against the disk, rates, offload."""

import copy
import math
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch

from gpu_check_case import HOST, Case, Findings, Setting, SkipCase
from gpu_check_tiny import experts_away, set_streaming, streaming_from
from make_checkpoint import TINY, make_checkpoint
from ossquant.bench.measure import measure
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.decode import decode_rate
from ossquant.errors import DoesNotFitError
from ossquant.hardware import Device, find_device, find_machine
from ossquant.layout import Role
from ossquant.memory import transformers as memory
from ossquant.memory.terms import MemoryEstimate, Workload
from ossquant.place import part_bytes
from ossquant.plan import Plan, make_plan
from ossquant.recipe import built_in
from ossquant.runtime.generate import continue_prompt
from ossquant.runtime.host_trial import NEVER
from ossquant.runtime.load import load_model, placement
from ossquant.runtime.pinned import cuda_page_lock, lock_parameters
from ossquant.runtime.streaming import CopiedAhead
from ossquant.spec import ModelSpec
from ossquant.units import GIB, size

SIZES = ("20b", "120b")
SCHEMES = ("hybrid", "nf4")
PROMPTS = (512, 8192)
DECODE = 32  # tokens after a prompt
OFFLOAD_CONTEXT = 8192 + DECODE
SMALL_CARD = 24 * GIB
RUNS = 3
LOADED_SLACK = 0.01
SWEEP = (1, 8, 32, 128, 512, 2048)  # tokens at once
CHOICE_SLACK = 1.5  # how much slower than the other way the chosen one may be
OUTPUT_SLACK = 0.02  # how far bf16 on two devices may lie apart, by norm
DISK_SLACK = 2 * GIB
SHARD = 5 * 10**9
_DRY_PROMPTS, _DRY_SWEEP = (16, 96), (1, 32)


@dataclass(frozen=True)
class Loaded:
    """A model with its plan, the checkpoint it came from, the seconds of loading and of `cat`, and what was said."""

    model: Any
    plan: Plan
    source: Path
    seconds: float
    cat_seconds: float
    said: list[str]


def cases() -> Iterator[Case]:
    """Every check of the parts 20b and 120b, making the checkpoint first."""
    for of in SIZES:
        yield Case(f"{of}/make", f"{of}/{SCHEMES[0]}", 900, partial(check_make, of=of))
        for scheme in SCHEMES:
            worker = f"{of}/{scheme}"
            yield Case(f"{worker}/load", worker, 300, partial(check_load, of=of, scheme=scheme))
            for index, tokens in enumerate(PROMPTS):
                run = partial(check_prompt, of=of, scheme=scheme, index=index)
                yield Case(f"{worker}/prompt-{tokens}", worker, 120, run)
            yield Case(f"{worker}/rates", worker, 180, partial(check_rates, of=of, scheme=scheme))
        worker = f"{of}/offload"
        yield Case(f"{worker}/load", worker, 300, partial(check_offload, of=of))
        yield Case(f"{worker}/prompt", worker, 240, partial(check_offload_prompt, of=of))
        yield Case(f"{worker}/rates", worker, 240, partial(check_offload_rates, of=of))
        yield Case(f"{worker}/copies", worker, 180, partial(check_copies, of=of))
        yield Case(f"{worker}/streaming", worker, 240, partial(check_streaming, of=of))


def check_make(setting: Setting, of: str) -> Findings:
    """The random checkpoint, of the published bytes; what is there already stays."""
    findings, spec, folder = Findings(), _spec(setting, of), _folder(setting, of)
    plan = make_plan(spec, built_in("mxfp4"))
    free = psutil.disk_usage(str(setting.scratch)).free + sum(file.stat().st_size for file in folder.glob("*"))
    if free < plan.nbytes + DISK_SLACK:
        raise SkipCase(f"{size(plan.nbytes + DISK_SLACK)} of disk are needed, {size(free)} are free: see --scratch")
    started = time.monotonic()
    if not (folder / "config.json").exists():
        make_checkpoint(folder, spec, max_shard_size=SHARD)
    findings.note("seconds", time.monotonic() - started)
    with open_checkpoint(folder) as checkpoint:
        findings.between("bytes", checkpoint.plan.nbytes, plan.nbytes, plan.nbytes)
    return findings


def check_load(setting: Setting, of: str, scheme: str) -> Findings:
    """Every 4-bit parameter is in 4 bits, the bytes on the device are the plan's, and what loading took."""
    findings = Findings()
    loaded = _loaded(setting, of, scheme)
    predicted = _estimate(setting, loaded.plan, Workload(max_model_len=PROMPTS[0] + DECODE))
    used = device_bytes(setting, loaded.model)
    weights = predicted.weights
    findings.between("allocated_bytes", used["allocated"], *_around(weights.low, weights.high))
    findings.note("device_bytes", used)
    placed = placement(loaded.model)
    findings.holds("parameters_in_4_bits", placed.parameters_4bit == loaded.plan.parameters_4bit)
    _note_loading(findings, loaded)
    return findings


def check_prompt(setting: Setting, of: str, scheme: str, index: int) -> Findings:
    """A prompt in chunks and some tokens after it: peak memory within what fit predicts."""
    loaded = _loaded(setting, of, scheme)
    return _prompt_within(setting, loaded, _prompts(setting)[index], on_host=0)


def check_rates(setting: Setting, of: str, scheme: str) -> Findings:
    """Prefill and decode rates, none above what the memory's bandwidth allows."""
    loaded = _loaded(setting, of, scheme)
    return _rates(setting, loaded, Workload(max_model_len=PROMPTS[0] + DECODE))


def check_offload(setting: Setting, of: str) -> Findings:
    """max_memory is kept, with as many experts on the host as the plan must put there."""
    findings = Findings()
    loaded = _offloaded(setting, of)
    layers, away = loaded.plan.spec.num_hidden_layers, len(experts_away(loaded.model))
    findings.between("layers_with_experts_on_host", away, 1, layers)
    on_device = placement(loaded.model).bytes_by_device[setting.beside_host]
    findings.at_most("bytes_on_device", on_device, _cap(loaded.plan))
    findings.note("streaming_from_tokens", streaming_from(loaded.model))
    findings.note("device_bytes", device_bytes(setting, loaded.model))
    _note_loading(findings, loaded)
    return findings


def check_offload_prompt(setting: Setting, of: str) -> Findings:
    """A long prompt with experts on the host: peak memory within what fit predicts, and within max_memory."""
    _need_cache(setting)
    loaded = _offloaded(setting, of)
    findings = _prompt_within(setting, loaded, _prompts(setting)[-1], on_host=len(experts_away(loaded.model)))
    findings.at_most("peak_allocated_bytes", findings.figures["device_bytes"]["peak_allocated"],
                     _cap(loaded.plan))  # fmt: skip
    return findings


def check_offload_rates(setting: Setting, of: str) -> Findings:
    """Prefill and decode rates with experts on the host."""
    _need_cache(setting)
    loaded = _offloaded(setting, of)
    away = len(experts_away(loaded.model))
    return _rates(setting, loaded, Workload(max_model_len=PROMPTS[0] + DECODE, n_cpu_moe=away))


def check_streaming(setting: Setting, of: str) -> Findings:
    """The threshold measured at load picks the faster way, or nearly so, for few tokens and for many."""
    findings = Findings()
    model = _offloaded(setting, of).model
    threshold = streaming_from(model)
    findings.note("streaming_from_tokens", threshold)
    sweep = _DRY_SWEEP if setting.dry else SWEEP
    seconds = {}
    for way, below in (("streamed", 0), ("on_host", NEVER)):
        set_streaming(model, below)
        seconds[way] = {tokens: _pass_seconds(model, tokens) for tokens in sweep}
    set_streaming(model, threshold)
    findings.note("seconds", seconds)
    for tokens in (sweep[0], sweep[-1]):
        chosen, other = ("streamed", "on_host") if tokens >= threshold else ("on_host", "streamed")
        ratio = seconds[chosen][tokens] / seconds[other][tokens]
        _judge(setting, findings, f"chosen_by_other_{tokens}_tokens", ratio, 0, CHOICE_SLACK)
    return findings


def check_copies(setting: Setting, of: str) -> Findings:
    """A layer's experts copied ahead: faster from page-locked memory, and what they compute there and on the host."""
    findings = Findings()
    experts = experts_away(_offloaded(setting, of).model)[0]
    findings.note("page_locked_at_load", all(parameter.is_pinned() for parameter in experts.parameters()))
    rates = {"pageable": _copy_rate(setting, pageable := copy.deepcopy(experts))}
    lock = cuda_page_lock(setting.beside_host)
    if lock is not None:
        unlock = lock_parameters(pageable, lock)
        rates["page_locked"] = _copy_rate(setting, pageable)
        unlock()
        findings.between("page_locked_by_pageable", rates["page_locked"] / rates["pageable"], 1, math.inf)
    findings.note("bytes_per_second", rates)
    here, there = (_output(experts, device) for device in (HOST, setting.beside_host))
    findings.at_most("error_beside_host", float((there - here).norm() / here.norm()), OUTPUT_SLACK)
    experts.copied_ahead, before = False, experts.copied_ahead
    findings.at_most("difference_in_turn", float((_output(experts, setting.beside_host) - there).abs().max()), 0)
    experts.copied_ahead = before
    findings.note("copied_ahead", before)
    return findings


def device_bytes(setting: Setting, model: Any) -> dict[str, int]:
    """What the device holds; used counts the driver's context, and whoever else is on the device.

    In a dry run the weights' bytes and those of this process, to have something to write.
    """
    if setting.dry:
        held, used = sum(placement(model).bytes_by_device.values()), psutil.Process().memory_info().rss
        return {"allocated": held, "peak_allocated": held, "reserved": held, "used": used, "peak_used": used}
    free, total = torch.cuda.mem_get_info(0)
    reserved, peak_reserved = torch.cuda.memory_reserved(0), torch.cuda.max_memory_reserved(0)
    return {
        "allocated": torch.cuda.memory_allocated(0),
        "peak_allocated": torch.cuda.max_memory_allocated(0),
        "reserved": reserved,
        "used": total - free,
        "peak_used": total - free - reserved + peak_reserved,
    }


def _prompt_within(setting: Setting, loaded: Loaded, tokens: int, on_host: int) -> Findings:
    findings = Findings()
    predicted = _estimate(setting, loaded.plan, Workload(max_model_len=tokens + DECODE, n_cpu_moe=on_host))
    prompt = torch.randint(0, loaded.plan.spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    if not setting.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(0)
    started = time.monotonic()
    said = continue_prompt(
        loaded.model, prompt.to(loaded.model.device), cache="dynamic", do_sample=False,
        max_new_tokens=DECODE, min_new_tokens=DECODE,
    )  # fmt: skip
    findings.between("new_tokens", said.shape[1] - tokens, DECODE, DECODE)
    findings.note("seconds", time.monotonic() - started)
    used = device_bytes(setting, loaded.model)
    findings.note("device_bytes", used)
    findings.note("predicted", {name: asdict(getattr(predicted, name)) for name in
                                ("weights", "kv_cache", "compute", "overhead", "total")})  # fmt: skip
    findings.note("peak_by_expected", used["peak_used"] / predicted.total.expected)
    _judge(setting, findings, "peak_used_bytes", used["peak_used"], predicted.total.low, predicted.total.high)
    return findings


def _rates(setting: Setting, loaded: Loaded, workload: Workload) -> Findings:
    """Rates by ossquant's own bench; the roof is that of reading what a token needs once."""
    findings = Findings()
    device, plan = _device(setting), loaded.plan
    prompt = _prompts(setting)[0]
    measured = measure(loaded.model, prompt_tokens=prompt, new_tokens=DECODE, runs=RUNS)
    roof = (device.bandwidth_gbps or 10**9) * 1e9 / _bytes_per_token(plan)
    _judge(setting, findings, "decode_tokens_per_second", measured.decode_tokens_per_second, 1e-3, roof)
    plainly = measure(loaded.model, prompt_tokens=prompt, new_tokens=DECODE, runs=RUNS, cache="dynamic")
    findings.note("decode_tokens_per_second_without_graphs", plainly.decode_tokens_per_second)
    findings.note("prompt_tokens", prompt)
    findings.note("prefill_tokens_per_second", measured.prefill_tokens_per_second)
    findings.note("ttft_seconds", measured.ttft)
    findings.note("runs", [asdict(run) for run in measured.runs])
    expected = decode_rate(plan, "transformers", workload, device, 1)
    findings.note("expected_decode", asdict(expected) if expected else None)
    return findings


def _judge(setting: Setting, findings: Findings, name: str, value: float, low: float, high: float) -> None:
    """Hold a figure of the GPU against its bounds; one of a dry run means nothing, and is only kept."""
    if setting.dry:
        findings.note(name, value)
    else:
        findings.between(name, value, low, high)


def _note_loading(findings: Findings, loaded: Loaded) -> None:
    findings.note("said", loaded.said)  # the attention and the kernels among it
    findings.note("load_seconds", loaded.seconds)
    findings.note("cat_seconds", loaded.cat_seconds)
    findings.note("file_bytes", sum(file.stat().st_size for file in loaded.source.glob("*.safetensors")))
    findings.note("peak_host_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@cache
def _loaded(setting: Setting, of: str, scheme: str) -> Loaded:
    """A model wholly on the device."""
    plan = make_plan(_spec(setting, of), built_in(scheme))
    if not setting.dry:
        needed = _estimate(setting, plan, Workload(max_model_len=PROMPTS[-1] + DECODE)).total.expected
        free, _ = torch.cuda.mem_get_info(0)
        if free < needed:
            raise SkipCase(f"{size(needed)} of device memory are needed, {size(free)} are free")
    return _load(setting, of, plan, scheme=scheme, device_map=setting.main_device)


@cache
def _offloaded(setting: Setting, of: str) -> Loaded:
    """A model with some of its experts on the host; in a dry run beside torch's lazy backend."""
    if setting.dry:
        plan = make_plan(_spec(setting, of), built_in("mxfp4"))
        here = {"": setting.beside_host, "model.layers.0.mlp.experts": "cpu"}
        return _load(setting, of, plan, scheme="mxfp4", device_map=here)
    plan = make_plan(_spec(setting, of), built_in("hybrid"))
    caps = {0: _cap(plan), "cpu": psutil.virtual_memory().available}
    try:
        return _load(setting, of, plan, scheme="hybrid", max_memory=caps, max_model_len=OFFLOAD_CONTEXT)
    except DoesNotFitError as error:
        raise SkipCase(str(error)) from error


def _load(setting: Setting, of: str, plan: Plan, **arguments: Any) -> Loaded:
    folder = _folder(setting, of)
    if not (folder / "config.json").exists():
        raise SkipCase(f"the {of} checkpoint is not there")
    cat_seconds = _cat_seconds(folder)
    _forget(folder)
    started = time.monotonic()
    said: list[str] = []
    model, _ = load_model(folder, announce=said.append, **arguments)
    if not setting.dry:
        torch.cuda.synchronize()
    return Loaded(model, plan, folder, time.monotonic() - started, cat_seconds, said)


def _cat_seconds(folder: Path) -> float:
    """What reading the same files takes with nothing else to do."""
    _forget(folder)
    started = time.monotonic()
    subprocess.run(["/bin/cat", *sorted(folder.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def _forget(folder: Path) -> None:
    """Ask the kernel to drop its copies of the files, so that they are read from the disk; not on a tmpfs."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cap(plan: Plan) -> int:
    """Device memory to allow: a 24 GB card's, or with room for half of the experts where that would hold them all."""
    workload = Workload(max_model_len=OFFLOAD_CONTEXT)
    half = memory.layer_expert_bytes(plan) * (plan.spec.num_hidden_layers // 2)
    computing = memory.working_bytes(plan, workload) + memory.streaming_bytes(plan)
    whole = sum(part_bytes(plan).values()) + memory.kv_cache_bytes(plan, workload) + computing
    return min(SMALL_CARD, whole - half)


def _estimate(setting: Setting, plan: Plan, workload: Workload) -> MemoryEstimate:
    return memory.estimate(plan, workload, _device(setting))


@cache
def _device(setting: Setting) -> Device:
    return find_device("24GB") if setting.dry else find_machine("auto").device


def _bytes_per_token(plan: Plan) -> float:
    """Bytes of weights that one token needs."""
    share = plan.spec.num_experts_per_tok / plan.spec.num_local_experts
    dense = (Role.ATTENTION, Role.LM_HEAD, Role.ROUTER, Role.NORM, Role.BIAS)
    return sum(plan.role_nbytes[role] for role in dense) + share * plan.role_nbytes[Role.EXPERTS]


@torch.no_grad()
def _pass_seconds(model: Any, tokens: int) -> float:
    """The fastest of some passes, after one that is not counted."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    times = []
    for _ in range(1 + RUNS):
        started = time.perf_counter()
        model(prompt, logits_to_keep=1, use_cache=False).logits.sum().item()  # which waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _copy_rate(setting: Setting, experts: Any) -> float:
    """Bytes a second of all experts of a layer, through the two buffers; the fastest of some times."""
    count, times = experts.down_proj_bias.shape[0], []
    for _ in range(1 + RUNS):
        stored = CopiedAhead(experts.stacks(), torch.device(setting.beside_host))
        started = time.perf_counter()
        stored.expect(range(count))
        for expert in range(count):
            parts = stored.take(expert)
            stored.done(expert)
        parts[-1].cpu()  # which waits for the device
        times.append(time.perf_counter() - started)
    return sum(parameter.nbytes for parameter in experts.parameters()) / min(times[1:])


@torch.no_grad()
def _output(experts: Any, device: str) -> torch.Tensor:
    """What a layer's experts, each with a token or two, compute on a device."""
    bias, generator = experts.down_proj_bias, torch.Generator().manual_seed(0)
    indices = torch.arange(2 * bias.shape[0]).reshape(-1, 2) % bias.shape[0]
    hidden = torch.randn(len(indices), bias.shape[1], generator=generator).to(bias.dtype)
    weights = torch.full(indices.shape, 0.5, dtype=bias.dtype)
    return experts.forward(hidden.to(device), indices.to(device), weights.to(device)).float().cpu()


def _need_cache(setting: Setting) -> None:
    if setting.dry:
        raise SkipCase("torch's lazy backend lacks what a cache needs")


def _prompts(setting: Setting) -> tuple[int, ...]:
    return _DRY_PROMPTS if setting.dry else PROMPTS


def _spec(setting: Setting, of: str) -> ModelSpec:
    return TINY if setting.dry else ModelSpec.published(of)


def _folder(setting: Setting, of: str) -> Path:
    return setting.scratch / of


def _around(low: int, high: int) -> tuple[float, float]:
    return low * (1 - LOADED_SLACK), high * (1 + LOADED_SLACK)
