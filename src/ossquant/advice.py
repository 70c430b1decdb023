"""What to type next for a verdict, and where a user would be caught."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ossquant.engine import LOOPBACK
from ossquant.fit import FitVerdict, falls_back
from ossquant.layout import Role
from ossquant.memory import estimate, vllm
from ossquant.memory.llama_cpp import DEFAULT_UBATCH
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.servers import PORTS
from ossquant.units import GIB, MIB, size_both

_GGUF_REPOS = {("20b", "gguf-q8"): "ggml-org/gpt-oss-20b-GGUF", ("120b", "gguf-q8"): "ggml-org/gpt-oss-120b-GGUF"}
_PUBLISHED = ("20b", "120b")
_VLLM_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_TOOL_PARSER_SINCE = (0, 10, 2)  # of vLLM: vllm-project/recipes, pull request 83
_LOAD_MODE_BUILD = 10875  # llama.cpp's --no-mmap is gone from here on, --load-mode some months older; 2026-09-11


def command(verdict: FitVerdict, host: str = LOOPBACK, port: int | None = None) -> str:
    """The one line to type next; empty where nothing would run. A server listens on host, its own port if not said."""
    if verdict.verdict == "no":
        return ""
    engine = verdict.candidate.engine.name
    return _COMMANDS[engine](verdict, host, PORTS[engine] if port is None else port)


def _llama_server(verdict: FitVerdict, host: str, port: int) -> str:
    chosen, workload = verdict.candidate, verdict.workload
    repo = _GGUF_REPOS.get((chosen.model, chosen.format))
    streams = 1 if workload.kv_unified else workload.sequences
    file = chosen.path or f"gpt-oss-{_short(chosen.model)}-{chosen.format}.gguf"
    words = ["llama-server", *(("-hf", repo) if repo and not chosen.path else ("-m", file))]
    words += ["-c", str(streams * workload.max_model_len), "-np", str(workload.sequences), "-ngl", "99"]
    if workload.kv_unified:
        words.append("-kvu")
    if workload.n_cpu_moe:
        words += ["--n-cpu-moe", str(workload.n_cpu_moe)]
    if verdict.machine.device.vendor == "apple" and workload.n_cpu_moe:
        words += _without_mmap(verdict)
    if workload.ubatch and workload.ubatch != DEFAULT_UBATCH:
        words += ["-ub", str(workload.ubatch), "-b", str(max(2048, workload.ubatch))]
    if workload.kv_cache_dtype != "auto":
        words += ["-ctk", workload.kv_cache_dtype, "-ctv", workload.kv_cache_dtype]
    if workload.swa_full:
        words.append("--swa-full")
    # the default since December 2025; before, tools are refused without it (pull requests 17524, 17911)
    return shlex.join([*words, "--jinja", *_bind(host, port)])


def _without_mmap(verdict: FitVerdict) -> list[str]:
    version = verdict.candidate.engine.version
    return ["--no-mmap"] if version and version[0] < _LOAD_MODE_BUILD else ["--load-mode", "none"]


def _vllm(verdict: FitVerdict, host: str, port: int) -> str:
    workload = verdict.workload
    words = ["vllm", "serve", _source(verdict), "--max-model-len", str(workload.max_model_len)]
    split = workload.tensor_parallel or verdict.machine.count
    if split > 1:
        words += ["--tensor-parallel-size", str(split)]
    if workload.max_num_seqs:
        words += ["--max-num-seqs", str(workload.max_num_seqs)]
    if workload.max_num_batched_tokens:
        words += ["--max-num-batched-tokens", str(workload.max_num_batched_tokens)]
    if workload.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", _VLLM_DTYPES.get(workload.kv_cache_dtype, workload.kv_cache_dtype)]
    # said even where it is the default, which is another in other versions
    words += ["--gpu-memory-utilization", f"{vllm.utilization(workload, verdict.candidate.engine.version):g}"]
    if verdict.candidate.engine.version is None or verdict.candidate.engine.version >= _TOOL_PARSER_SINCE:
        # the reasoning parser vLLM takes by itself: its GptOssForCausalLMConfig, 0.11 and 0.32
        words += ["--enable-auto-tool-choice", "--tool-call-parser", "openai"]
    return shlex.join([*words, *_bind(host, port)])


def _ollama(verdict: FitVerdict, host: str, port: int) -> str:
    workload, chosen = verdict.workload, verdict.candidate
    address = f"OLLAMA_HOST={shlex.quote(f'[{host}]:{port}' if ':' in host else f'{host}:{port}')}"
    settings = [address, f"OLLAMA_CONTEXT_LENGTH={workload.max_model_len}", f"OLLAMA_NUM_PARALLEL={workload.sequences}"]
    if workload.kv_cache_dtype != "auto":
        settings += ["OLLAMA_FLASH_ATTENTION=1", f"OLLAMA_KV_CACHE_TYPE={workload.kv_cache_dtype}"]
    if chosen.path:
        then = ["ollama", "create", _ollama_name(chosen.model), "-f", str(Path(chosen.path).parent / "Modelfile")]
    else:
        repo = _GGUF_REPOS.get((chosen.model, chosen.format))
        then = ["ollama", "run", f"hf.co/{repo}" if repo else f"gpt-oss:{_short(chosen.model)}"]
    # the server listens before anything else, but not yet when the shell goes on
    return f"{' '.join(settings)} ollama serve & sleep 2; {address} {shlex.join(then)}"


def _ollama_name(model: str) -> str:
    """What Ollama takes as a name, of a folder's."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(model).resolve().name.lower()).strip("-._") or "gpt-oss"


def _mlx(verdict: FitVerdict, host: str, port: int) -> str:
    workload = verdict.workload
    words = ["mlx_lm.server", "--model", _source(verdict)]
    for option in ("--decode-concurrency", "--prompt-concurrency", "--prompt-cache-size"):
        words += [option, str(workload.sequences)]
    if workload.max_num_batched_tokens:
        words += ["--prefill-step-size", str(workload.max_num_batched_tokens)]
    return shlex.join([*words, *_bind(host, port)])


def _transformers(verdict: FitVerdict, host: str, port: int) -> str:
    chosen = verdict.candidate
    if chosen.format == "mxfp4" or (chosen.format == "bf16" and chosen.model not in _PUBLISHED):
        return shlex.join(["transformers", "serve", _source(verdict), *_bind(host, port)])
    return shlex.join(["ossquant", "run", _source(verdict), "Hello", "--scheme", chosen.format])


_COMMANDS: dict[str, Callable[[FitVerdict, str, int], str]] = {
    "llama.cpp": _llama_server,
    "vllm": _vllm,
    "ollama": _ollama,
    "mlx": _mlx,
    "transformers": _transformers,
}


def _bind(host: str, port: int) -> list[str]:
    # said even where it is the default: vLLM's is every interface
    return ["--host", host, "--port", str(port)]


def _source(verdict: FitVerdict) -> str:
    model = verdict.candidate.model
    return f"openai/gpt-oss-{model}" if model in _PUBLISHED else model


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].removeprefix("gpt-oss-")


def warnings(verdict: FitVerdict) -> list[str]:
    """Where this verdict would catch a user, a sentence each."""
    found = (
        verdict.obstacle and f"{verdict.obstacle}.",
        _bf16_fallback(verdict),
        _whole_prompts(verdict),
        _skipped_experts(verdict),
        _padding(verdict),
        _fewer_sequences(verdict),
        _int4(verdict),
        _nvml(verdict),
        _host_memory(verdict),
        _metal_mmap(verdict),
        _claim_120b(verdict),
        _unknown_kernels(verdict),
    )
    return [sentence for sentence in found if sentence]


def _bf16_fallback(verdict: FitVerdict) -> str:
    chosen, device = verdict.candidate, verdict.machine.device
    if chosen.engine.name != "transformers" or chosen.format != "mxfp4":
        return ""
    need = f"{2 * chosen.plan.parameters / GIB:.1f} GiB"
    if falls_back(chosen, device):
        return f"transformers has no MXFP4 kernels for {device.arch}: it expands to bf16, {need}, and only warns."
    return (
        f"without the packages kernels and triton (3.4 or newer) transformers expands to bf16, {need}, and only warns."
    )


def _whole_prompts(verdict: FitVerdict) -> str:
    chosen, workload, machine = verdict.candidate, verdict.workload, verdict.machine
    counted = workload.max_num_batched_tokens or PREFILL_CHUNK
    if not command(verdict).startswith("transformers serve") or counted >= workload.max_model_len:
        return ""
    whole = replace(workload, max_num_batched_tokens=workload.max_model_len)
    needed = estimate(chosen.plan, chosen.engine, whole, machine.device, machine.count)
    more = needed.compute.expected - verdict.estimate.compute.expected
    return (
        f"transformers serve computes a prompt at once: one of {workload.max_model_len:,} tokens takes "
        f"{more / GIB:.1f} GiB more than is counted here, with {counted} tokens at a time."
    )


def _skipped_experts(verdict: FitVerdict) -> str:
    plan = verdict.candidate.plan
    if verdict.candidate.engine.name != "transformers" or not plan.scheme(Role.ATTENTION).is_bnb:
        return ""
    # what bitsandbytes finds are attention's linears; experts are 3-D parameters
    nbytes = 2 * (plan.parameters - plan.role_parameters[Role.ATTENTION]) + plan.role_nbytes[Role.ATTENTION]
    return f"stock load_in_4bit leaves the experts in bf16 and takes {nbytes / GIB:.1f} GiB; load with ossquant."


def _padding(verdict: FitVerdict) -> str:
    chosen, plan = verdict.candidate, verdict.candidate.plan
    split = verdict.workload.tensor_parallel or verdict.machine.count
    if chosen.engine.name != "vllm" or chosen.format != "mxfp4" or split < 4:
        return ""
    padding = 1 - plan.nbytes / verdict.estimate.weights.expected
    return (
        f"at tensor parallel {split} padding and copies are {padding:.0%} of vLLM's weights." if padding >= 0.1 else ""
    )


def _int4(verdict: FitVerdict) -> str:
    if verdict.candidate.format != "int4":
        return ""
    # by the source of vLLM 0.32, whose Marlin asks for hidden sizes that 128 divides
    return "vLLM 0.32 refuses its fast INT4 kernels for gpt-oss; others may leave out expert biases: compare logits."


def _fewer_sequences(verdict: FitVerdict) -> str:
    if verdict.candidate.engine.name != "vllm" or verdict.workload.max_num_seqs or verdict.verdict == "fits":
        return ""
    if not verdict.most_num_seqs:
        return ""
    return f"--max-num-seqs {verdict.most_num_seqs} fits: without it vLLM keeps logits for 256 or 1024 sequences."


def _nvml(verdict: FitVerdict) -> str:
    device = verdict.machine.device
    if device.nvml_bytes is None or device.unified_memory:
        return ""
    kept = (device.nvml_bytes - device.usable_bytes) * verdict.machine.count
    if not kept > 0 or not 0 <= verdict.estimate.total.high - verdict.usable <= kept:
        return ""
    return (
        f"nvidia-smi shows {device.nvml_bytes // MIB} MiB, programs get {device.usable_bytes // MIB}: "
        "by the larger figure this would fit."
    )


def _host_memory(verdict: FitVerdict) -> str:
    needed, host = verdict.estimate.host_total, verdict.machine.host_memory
    if host is not None and needed > host:
        return f"the host needs {size_both(needed)} of free memory and has {size_both(host)}."
    on_host = verdict.workload.n_cpu_moe or verdict.workload.n_cpu_layers
    if host is None and on_host and verdict.verdict == "offload":
        return (
            f"{verdict.candidate.engine.name} needs {size_both(needed)} of free host memory; --host-memory checks it."
        )
    return ""


def _metal_mmap(verdict: FitVerdict) -> str:
    if verdict.machine.device.vendor != "apple" or verdict.candidate.engine.name not in ("llama.cpp", "ollama"):
        return ""
    if not verdict.workload.n_cpu_moe:
        return ""
    return (
        "with mmap Metal maps the whole file, experts on the host included: nothing is saved without --load-mode none."
    )


def _claim_120b(verdict: FitVerdict) -> str:
    usable = verdict.machine.device.usable_bytes * verdict.machine.count
    if verdict.candidate.plan.parameters < 100e9 or usable > 33 * GIB:
        return ""
    return (
        "no 4-bit format squeezes the 120B into 24 GB, as is often claimed: its weights take 58 GiB and more. "
        "llama.cpp runs it there with most experts in some 40 GiB of host memory (--n-cpu-moe)."
    )


def _unknown_kernels(verdict: FitVerdict) -> str:
    device, engine = verdict.machine.device, verdict.candidate.engine.name
    if engine in ("vllm", "transformers") and device.arch and device.mxfp4_kernels.get(engine) is None:
        return f"whether {engine} has MXFP4 kernels for {device.arch} is not known."
    return ""
