"""The small trained model on a device: every mode against transformers' own modules, against the CPU, and spread."""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._lazy.ts_backend
from transformers import BitsAndBytesConfig

from gpu_check_case import HOST, ROOT, TRAINED, Case, Findings, Setting, SkipCase
from ossquant.errors import UnsupportedError
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.runtime.attention import IMPLEMENTATIONS
from ossquant.runtime.fixed_cache import CACHE
from ossquant.runtime.generate import generate
from ossquant.runtime.host_trial import NEVER
from ossquant.runtime.hub_experts import KernelExperts
from ossquant.runtime.hub_kernels import CapabilityOf, cuda_capability, obstacle, use_mxfp4_kernels
from ossquant.runtime.load import DTYPES, load_model, placement
from ossquant.runtime.pinned import cuda_page_lock, lock_parameters

sys.path.append(str(ROOT / "tests/runtime"))  # the reference is the tests'
from reference import reference_model
from two_devices import chunk

SCHEMES = ("hybrid", "nf4", "fp4", "mxfp4", "bf16")
BITSANDBYTES = ("nf4", "fp4")
FP32_BOUND = 1e-5
# how far from fp32 bf16 may lie beside transformers' own bf16; on a CPU it is 0.4 to 0.6
BF16_ALLOWANCE = 1.5
DECODED = 4  # tokens computed one by one, on kernels for a single row
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
NEW_TOKENS = 48
LIMIT = 90.0
KERNELS_LIMIT = 300.0  # triton compiles them
LAYERS = 4


def cases() -> Iterator[Case]:
    """Every check of the parts tiny and placement."""
    for scheme in SCHEMES:
        sources = ("published", "ours", *(("config",) if scheme in BITSANDBYTES else ()))
        for dtype in ("float32", "bfloat16"):
            for source in sources:
                run = partial(check_mode, scheme=scheme, dtype=dtype, source=source)
                yield Case(f"tiny/{scheme}/{dtype}/{source}", "tiny", LIMIT, run)
    for name in IMPLEMENTATIONS:
        yield Case(f"tiny/attention/{name}", "tiny", LIMIT, partial(check_attention, implementation=name))
    for scheme in ("mxfp4", "hybrid"):
        yield Case(f"tiny/kernels/{scheme}", "tiny", KERNELS_LIMIT, partial(check_kernels, scheme=scheme))
    for scheme, way in (
        *((scheme, way) for scheme in ("mxfp4", "hybrid") for way in ("host", "streamed", "measured", "disk")),
        ("nf4", "host"),
        *((scheme, "gpus") for scheme in SCHEMES),
    ):
        run = partial(check_placement, scheme=scheme, way=way)
        yield Case(f"placement/{scheme}/{way}", "placement", LIMIT, run)
    for scheme in ("mxfp4", "hybrid"):
        yield Case(f"placement/{scheme}/ahead", "placement", LIMIT, partial(check_ahead, scheme=scheme))


def check_mode(setting: Setting, scheme: str, dtype: str, source: str) -> Findings:
    """Logits of a prompt longer than the sliding window, of tokens one by one, and greedy tokens."""
    findings = Findings()
    model, tokenizer = load_model(device_map=setting.main_device, **_source(setting, scheme, dtype, source))
    other, _ = load_model(device_map=HOST, **_source(setting, scheme, dtype, source))
    bound = _compare(findings, model, scheme, dtype, setting.main_device)
    findings.at_most("error_beside_cpu", _error(_logits(model), _logits(other)), 2 * bound)
    reply = _ask(model, tokenizer)
    findings.holds("greedy_tokens_equal_cpu", reply.token_ids == _ask(other, tokenizer).token_ids)
    findings.holds("answers", reply.final == ANSWER)
    placed = placement(model)
    findings.holds("all_on_device", set(placed.bytes_by_device) == {setting.main_device})
    findings.note("bytes", sum(placed.bytes_by_device.values()))
    return findings


def check_attention(setting: Setting, implementation: str) -> Findings:
    """The same logits with every kind of attention that can be used here."""
    findings = Findings()
    arguments = _source(setting, "hybrid", "bfloat16", "published")
    try:
        model, tokenizer = load_model(device_map=setting.main_device, attn_implementation=implementation, **arguments)
    except UnsupportedError as error:
        raise SkipCase(str(error)) from error
    _compare(findings, model, "hybrid", "bfloat16", setting.main_device)
    findings.holds("answers", _ask(model, tokenizer).final == ANSWER)
    return findings


def check_kernels(setting: Setting, scheme: str, capability_of: CapabilityOf = cuda_capability) -> Findings:
    """Experts on transformers' MXFP4 kernels: every layer, with our own logits, answer and count of bytes."""
    arguments = _source(setting, scheme, "bfloat16", "published")
    model, tokenizer = load_model(device_map=setting.main_device, kernels="own", **arguments)
    plain, before = _logits(model), placement(model)
    capability = capability_of(torch.device(setting.main_device))
    reason = obstacle(capability, model.dtype, model.model.layers[0].mlp, model.config)
    if reason:
        raise SkipCase(reason)
    findings = Findings()
    said: list[str] = []
    use_mxfp4_kernels(model, 0, said.append, capability_of=capability_of)
    findings.note("said", said)
    findings.holds("used", all(isinstance(layer.mlp.experts, KernelExperts) for layer in model.model.layers))
    findings.note("error_beside_ours", _error(_logits(model), plain))
    _compare(findings, model, scheme, "bfloat16", setting.main_device)
    findings.holds("answers", _ask(model, tokenizer).final == ANSWER)
    findings.holds("placement_unchanged", placement(model) == before)
    return findings


def check_placement(setting: Setting, scheme: str, way: str) -> Findings:
    """Experts on the host, computed there or streamed, or in the files, or layers over all GPUs: as on one device."""
    device_map = _device_map(setting, way)
    if setting.dry and scheme != "mxfp4":
        raise SkipCase("bitsandbytes has no kernels for torch's lazy backend")
    findings = Findings()
    arguments = _source(setting, scheme, "float32", "published")
    one, tokenizer = load_model(device_map=setting.main_device, **arguments)
    spread, _ = load_model(device_map=device_map, **arguments)
    if way in ("host", "streamed"):
        set_streaming(spread, NEVER if way == "host" else 1)
    computed_on: set[str] = set()
    for experts in experts_away(spread):
        experts.register_forward_pre_hook(lambda module, args: computed_on.add(args[0].device.type))
    prompt = _prompt()[:1]
    with torch.no_grad():
        expected = one(prompt.to(setting.main_device)).logits.cpu()
        found = spread(prompt.to(spread.device)).logits.cpu()
    findings.at_most("error", _error(found, expected), FP32_BOUND)
    findings.holds("argmax_equal", bool((found.argmax(-1) == expected.argmax(-1)).all()))
    if way in ("host", "streamed"):
        where = HOST if way == "host" else torch.device(setting.beside_host).type
        findings.holds("computed_where_asked", computed_on == {where})
    findings.note("computed_on", sorted(computed_on))
    findings.note("bytes", dict(placement(spread).bytes_by_device))
    if not setting.dry:  # the lazy backend lacks what a cache needs
        same = _ask(spread, tokenizer).token_ids == _ask(one, tokenizer).token_ids
        findings.holds("greedy_tokens_equal", same)
    return findings


def check_ahead(setting: Setting, scheme: str) -> Findings:
    """Experts copied ahead, from page-locked memory and from other memory: the very logits of copying them in turn."""
    if setting.dry and scheme != "mxfp4":
        raise SkipCase("bitsandbytes has no kernels for torch's lazy backend")
    findings = Findings()
    arguments = _source(setting, scheme, "float32", "published")
    model, _ = load_model(device_map=_device_map(setting, "host"), announce=_host_lines(findings), **arguments)
    set_streaming(model, 1)
    logits = {way: _spread_logits(model, ahead=way == "ahead") for way in ("in turn", "ahead")}
    lock = cuda_page_lock(setting.beside_host)
    if lock is not None:
        unlocks = [lock_parameters(experts, lock) for experts in experts_away(model)]
        findings.holds("page_locked", all(_page_locked(experts) for experts in experts_away(model)))
        logits["page-locked"] = _spread_logits(model, ahead=True)
        for unlock in unlocks:
            unlock()
        findings.holds("unlocked", not any(_page_locked(experts) for experts in experts_away(model)))
        logits["unlocked"] = _spread_logits(model, ahead=True)
    expected = logits.pop("in turn")
    for way, found in logits.items():
        findings.at_most(f"difference_{way}", float((found - expected).abs().max()), 0)
    return findings


def prepare(setting: Setting) -> None:
    """Start torch's lazy backend, where it has to stand for a GPU."""
    if setting.dry:
        torch._lazy.ts_backend.init()
        torch.chunk = chunk


def experts_away(model: Any) -> list[torch.nn.Module]:
    """The layers' experts that lie on another device than their router."""
    mlps = [layer.mlp for layer in model.model.layers]
    return [mlp.experts for mlp in mlps if next(mlp.experts.parameters()).device != mlp.router.weight.device]


def set_streaming(model: Any, below: int) -> None:
    """Have experts that lie away computed where they lie for fewer tokens than that, and streamed from there on."""
    for hook in _streaming_hooks(model):
        hook.below = below


def streaming_from(model: Any) -> int:
    """From how many tokens on experts that lie away are streamed; they all share one measured threshold."""
    return int(_streaming_hooks(model)[0].below)


def _host_lines(findings: Findings) -> Callable[[str], None]:
    """Keeps what loading says of experts that lie on the host."""
    lines: list[str] = []

    def say(line: str) -> None:
        if line.startswith("experts "):
            lines.append(line)
            findings.note("said", "; ".join(lines))

    return say


def _page_locked(experts: torch.nn.Module) -> bool:
    return all(parameter.is_pinned() for parameter in experts.parameters())


@torch.no_grad()
def _spread_logits(model: Any, ahead: bool) -> torch.Tensor:
    for experts in experts_away(model):
        experts.copied_ahead = ahead
    return model(_prompt()[:1].to(model.device)).logits.cpu()


def _streaming_hooks(model: Any) -> list[Any]:
    hooks = [hook for experts in experts_away(model) for hook in experts._forward_pre_hooks.values()]
    return [hook for hook in hooks if hasattr(hook, "below")]


def _device_map(setting: Setting, way: str) -> dict[str, str]:
    if way == "gpus":
        count = 1 if setting.dry else torch.cuda.device_count()
        if count < 2:
            raise SkipCase("there is one accelerator")
        layers = {f"model.layers.{layer}": f"cuda:{layer * count // LAYERS}" for layer in range(LAYERS)}
        return {"": f"cuda:{count - 1}", "model.embed_tokens": "cuda:0", **layers}
    where = "disk" if way == "disk" else HOST
    return {"": setting.beside_host, **{f"model.layers.{layer}.mlp.experts": where for layer in (0, 2)}}


def _source(setting: Setting, scheme: str, dtype: str, source: str) -> dict[str, Any]:
    """load_model's arguments for a scheme: quantized on load, as we wrote it, or by a BitsAndBytesConfig."""
    if source == "config":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        return {"path": setting.tiny, "quantization_config": config}
    path = setting.tiny if source == "published" else _quantized(setting, scheme)
    return {"path": path, "scheme": scheme, "dtype": dtype}


@cache
def _quantized(setting: Setting, scheme: str) -> Path:
    output = setting.scratch / f"tiny-{scheme}"
    quantize(setting.tiny, output, built_in(scheme), force=True)
    return output


def _compare(findings: Findings, model: Any, scheme: str, dtype: str, device: str) -> float:
    """Hold logits against the fp32 reference, and return the bound; in bf16 it follows transformers' own error."""
    expected = _expected(scheme, "float32", HOST)
    bound = FP32_BOUND
    if dtype != "float32":
        of_transformers = _error(_expected(scheme, dtype, device), expected)
        findings.note("error_of_transformers", of_transformers)
        bound = BF16_ALLOWANCE * of_transformers
    findings.at_most("error", _error(_logits(model), expected), bound)
    findings.at_most("decode_error", _error(_decoded(model), expected[:1, -DECODED:]), 2 * bound)
    return bound


@cache
def _expected(scheme: str, dtype: str, device: str) -> torch.Tensor:
    """The logits of transformers' own modules, whose MXFP4 experts are expanded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mean that double quantization takes depends on it in its last bit
    try:
        model = reference_model(TRAINED, "bf16" if scheme == "mxfp4" else scheme, DTYPES[dtype])
    finally:
        torch.set_num_threads(threads)
    return _logits(model.to(device))


def _prompt() -> torch.Tensor:
    """Two sequences longer than the sliding window of 128."""
    return torch.randint(0, 600, (2, 300), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    return model(_prompt().to(model.device)).logits.float().cpu()


@torch.inference_mode()
def _decoded(model: Any) -> torch.Tensor:
    """The logits of the last tokens of the first sequence, computed one by one."""
    ids = _prompt()[:1].to(model.device)
    output = model(ids[:, :-DECODED], use_cache=True)
    logits = []
    for position in range(ids.shape[1] - DECODED, ids.shape[1]):
        output = model(ids[:, position : position + 1], use_cache=True, **{CACHE: output[CACHE]})
        logits.append(output.logits.float().cpu())
    return torch.cat(logits, dim=1)


def _ask(model: Any, tokenizer: Any) -> Any:
    return generate(model, tokenizer, [{"role": "user", "content": QUESTION}], max_new_tokens=NEW_TOKENS)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())
