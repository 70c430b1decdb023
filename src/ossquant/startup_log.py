"""StartupLog: what llama.cpp, vLLM or Ollama said of its memory when it started.

The three print one fact a line, behind whatever prefix a terminal, journald or docker puts there. A server
that starts several times in one log is read as it started last.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ossquant.errors import UsageError
from ossquant.units import GIB, MIB, parse_size

MAX_BYTES = 50 * 10**6
MAX_LINE = 8192  # the longest line of use, vLLM's configuration, says all we read in its first 2000 characters

Engine = Literal["llama.cpp", "vllm", "ollama"]
Model = Literal["20b", "120b"]

_ANSI = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]")
_NAMED = re.compile(r"gpt[-_ ]?oss[-_:. ]{0,2}(20|120)b", re.IGNORECASE)
_SHAPES: dict[tuple[str, str], Model] = {("24", "32"): "20b", ("36", "128"): "120b"}  # layers, experts
_PARAMETERS: dict[str, Model] = {"20.91": "20b", "116.8": "120b"}  # thousand millions
_SIZES: dict[str, Model] = {"20": "20b", "120": "120b"}
_LAYERS: dict[str, Model] = {"25": "20b", "37": "120b"}  # engines count the output as one more
_EXPERT_TENSORS: dict[int, Model] = {24 * 3: "20b", 36 * 3: "120b"}  # gate, up and down of each layer
_BOOLS = {"true": True, "false": False}

# a line without any of these words says nothing that is read here
_WORDS = (
    "buffer size", "llama_context", "llama_new_context", "llama_init_from", "print_info", "print_meta", "KV self",
    "llama_kv_cache", " tensors", "ctx size", "overrid", "build", "version", "device", "Device", "cpu-moe", "cmoe",
    "oss", "Oss", "breakdown", "|   - ", "offloaded", "Model loading", "model weights", "kv cache", "KV cache",
    "compute graph", "total memory", "KvSize", "architecture=", "LLM engine", "max model len", "max_", "max-",
    "gpu_memory", "gpu-memory", "GPU memory", "parallel_size", "parallel-size", "GPU 0",
)  # fmt: skip


@dataclass(frozen=True)
class StartupLog:
    """One start of one server, as its log tells it.

    max_model_len is the context of one sequence; kv_cache_dtype is spelled as the engine spells it. measured holds
    bytes over all devices together under weights, kv_cache, compute, host_weights, available_kv_cache and total,
    each only where the log states it. own_engine: Ollama ran its own engine, not llama.cpp's server. None: the log
    does not say.
    """

    engine: Engine
    version: str | None = None
    model: Model | None = None
    format: str | None = None
    device_name: str | None = None
    n_devices: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    ubatch: int | None = None
    kv_cache_dtype: str | None = None
    n_cpu_moe: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int | None = None
    kv_unified: bool | None = None
    swa_full: bool | None = None
    own_engine: bool = False
    measured: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def read_startup_log(path: Path) -> StartupLog:
    """Read a server's start-up log.

    Raises UsageError if the file cannot be read, is no log of the three engines, or states no memory.
    """
    text = _text(path)
    engine = next((engine for engine, sign in _SIGNS.items() if sign.search(text)), None)
    if engine is None:
        raise UsageError(
            f"{path.name} is no start-up log of llama.cpp, vLLM or Ollama",
            hint="looked for lines like 'load_tensors:', 'Model loading took' and 'msg=\"model weights\"'; "
            "save what the server prints from its first line on",
        )
    log = _READERS[engine](text)
    if not log.measured:
        raise UsageError(f"{path.name} is a log of {engine}, but states no memory", hint=_HINTS[engine])
    return log


def _text(path: Path) -> str:
    """Read the file whole, whatever bytes are in it."""
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a file", hint="name the file that holds the server's output")
        if (nbytes := path.stat().st_size) > MAX_BYTES:
            raise UsageError(
                f"{path.name} has {nbytes / 1e6:.0f} MB, more than a start-up log", hint="cut it to the start"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    # PowerShell redirects in UTF-16
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")


def _lines(text: str) -> Iterator[str]:
    """Yield the lines that may say something, without colours and without the quoting of docker's JSON files."""
    for line in text.splitlines():
        head = line[:MAX_LINE]
        if any(word in head for word in _WORDS):
            yield _ANSI.sub("", head).replace('\\"', '"')


def _first(pattern: re.Pattern[str], line: str) -> str | None:
    """Return the first group that matched."""
    match = pattern.search(line)
    return match and next((group for group in match.groups() if group is not None), None)


def _facts(line: str, **patterns: re.Pattern[str]) -> dict[str, str]:
    """Return what a line says, by the name of the pattern that found it."""
    return {key: value for key, pattern in patterns.items() if (value := _first(pattern, line))}


def _number(facts: Mapping[str, str], key: str) -> int | None:
    value = facts.get(key, "")
    return int(value) if re.fullmatch(r"[0-9]{1,12}", value) else None


# llama.cpp, and Ollama from 0.30 on, which starts llama.cpp's server

_SETTING = re.compile(
    r"(?:llama_context|llama_new_context_with_model|llama_init_from_model|print_info|llm_load_print_meta): "
    r"([a-z]\w{1,20}(?: \w{1,10})?)\s{0,20}= (\S.{0,60})"
)
_BUFFER = re.compile(
    r"([A-Za-z][\w.:\[\]]{0,40})\s{1,20}(model |KV |compute |output |)buffer size = {1,9}(\d{1,9}(?:\.\d{1,6})?) MiB"
)
_OLD_CONTEXT = re.compile(r"llama_(?:new_context_with|init_from)_model: n_ctx ")
_TYPE = re.compile(r"- type\s{1,5}(\w{2,10}): {1,6}(\d{1,6}) tensors")
_KV_DTYPES = re.compile(r"K \((\w{2,10})\): {1,9}[\d.]{1,12} MiB, V \((\w{2,10})\)")
_OVERRIDE = re.compile(r"blk\.(\d{1,3})\.ffn_\w{1,12}exps\b.{0,60}buffer type over\w{4,8} to CPU")
_CPU_MOE = re.compile(r"(?<![\w-])--?(?:(?:n-cpu-moe|ncmoe)[ =,'\"]{1,4}(\d{1,4})|(cpu-moe|cmoe)\b)")
_OFFLOADED = re.compile(r"offloaded \d{1,4}/(\d{1,4}) layers")
_BUILD = re.compile(r"build(?:_info)?(?: =|:)? b?(\d{1,6})[- ]\(?[0-9a-f]{7,12}\b")
_USING = re.compile(r"using device (\S{1,30}) \((.{1,80}?)\) (?:\(\S{1,20}(?: id)?\) )?- \d{1,8} MiB free")
_FOUND = re.compile(r"Device (\d{1,3}): ([^,]{1,80}), (?:compute capability|gfx)|found device:() (.{1,80})")
_ROW = re.compile(
    r"\|   - (\S{1,20}) [^|]{0,60}\|[\s\d=]{0,40}\+ "
    r"\( {0,9}(\d{1,8}) = {1,9}(\d{1,8}) \+ {1,9}(\d{1,8}) \+ {1,9}(\d{1,8})\)"
)
_HOST_ROW = re.compile(r"\|   - Host {1,60}\| {1,60}\d{1,8} = {1,9}(\d{1,8}) \+")
_DENSE = {"q8_0": "gguf-q8", "bf16": "gguf-bf16", "f16": "gguf-f16"}


@dataclass
class _Load:
    """One time llama.cpp loads a model and makes a context for it; MiB by device."""

    facts: dict[str, str] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    host_layers: set[str] = field(default_factory=set)
    model: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kv: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    compute: dict[str, float] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of llama.cpp's own table: self, model, KV, compute
    host_row: int | None = None

    def take(self, line: str) -> None:
        """Note what a line says of this load."""
        if "constructing llama_context" in line or (self.kv and _OLD_CONTEXT.search(line)):
            self._new_context()
        if setting := _SETTING.search(line):
            self.facts[setting[1]] = setting[2].strip()
        elif buffer := _BUFFER.search(line):
            self._take_buffer(buffer[1], buffer[2].strip(), float(buffer[3]))
        elif stored := _TYPE.search(line):
            self.types[stored[1]] = int(stored[2])
        elif override := _OVERRIDE.search(line):
            self.host_layers.add(override[1])
        elif row := _ROW.search(line):
            self.rows[row[1]] = tuple(int(number) for number in row.groups()[1:])
        elif host := _first(_HOST_ROW, line):
            self.host_row = int(host)
        if dtypes := _KV_DTYPES.search(line):  # the layers that see everything come first
            self.facts.setdefault("kv", dtypes[1] if dtypes[1] == dtypes[2] else f"{dtypes[1]}/{dtypes[2]}")
        if "full-size SWA cache" in line:
            self.facts["swa_full"] = "true"
        elif "_iswa:" in line:
            self.facts.setdefault("swa_full", "false")

    def _new_context(self) -> None:
        self.kv.clear()
        self.compute.clear()
        self.facts.pop("kv", None)
        self.facts.pop("swa_full", None)

    def _take_buffer(self, device: str, kind: str, mib: float) -> None:
        if kind == "compute":
            self.compute[device] = mib  # one a device
        elif kind != "output":  # the other kinds may be several a device: one a file, one a kind of layer
            (self.kv if kind == "KV" else self.model)[device] += mib

    def measured(self) -> dict[str, int]:
        """Add up the buffers, or the rows of llama.cpp's table where that is all there is."""
        found: dict[str, int] = {}
        for i, (key, held) in enumerate((("weights", self.model), ("kv_cache", self.kv), ("compute", self.compute)), 1):
            if any(held.values()):  # a dry run allocates nothing, and prints 0.00
                found[key] = round(sum(mib for device, mib in held.items() if not _on_host(device)) * MIB)
            elif self.rows and not any(self.model.values()):
                found[key] = sum(row[i] for row in self.rows.values()) * MIB
        host = [mib for device, mib in self.model.items() if _on_host(device)]
        if any(host) or self.host_row is not None:
            found["host_weights"] = round((sum(host) or self.host_row or 0) * MIB)
        if self.rows:
            found["total"] = sum(row[0] for row in self.rows.values()) * MIB
        return found

    def devices(self) -> set[str]:
        """Name the devices that hold any of it."""
        held = self.model.keys() | self.kv.keys() | self.compute.keys() or self.rows.keys()
        return {re.sub(r"_(Mapped|Split|Private)$", "", device) for device in held if not _on_host(device)}


def _on_host(device: str) -> bool:
    """Say whether a buffer lies in the host's memory, as CPU, CPU_Mapped, CPU_REPACK and CUDA_Host do."""
    return device.startswith(("CPU", "AMX", "BLAS")) or device.endswith("_Host")


def _read_llama_cpp(text: str, engine: Engine = "llama.cpp") -> StartupLog:
    loads = [_Load()]
    once: dict[str, str] = {}  # what is said once for every load
    found: dict[str, str] = {}
    for line in _lines(text):
        loader = "llama_model_loader:" in line
        again = loader or "loading model tensors" in line or "ggml ctx size" in line
        if (again and loads[-1].model) or (loader and loads[-1].rows):
            loads.append(_Load())
        once |= _facts(line, build=_BUILD, cpu_moe=_CPU_MOE, layers=_OFFLOADED, name=_NAMED)
        if device := _USING.search(line):
            found[device[1]] = device[2]
        elif device := _FOUND.search(line):
            found[device[1] or "0"] = (device[2] or device[4]).strip()
        loads[-1].take(line)
    return _llama_cpp_log(engine, _last(loads), once, found)


def _last(loads: list[_Load]) -> _Load:
    """Choose the last load that got memory; of one that only planned, the plan printed before it."""
    if held := [load for load in loads if any(load.model.values())]:
        return held[-1]
    planned = next((load for load in reversed(loads) if load.rows), loads[-1])
    return replace(loads[-1], rows=planned.rows, host_row=planned.host_row)


def _llama_cpp_log(engine: Engine, load: _Load, once: Mapping[str, str], found: Mapping[str, str]) -> StartupLog:
    facts = load.facts
    n_ctx, seqs = _number(facts, "n_ctx"), _number(facts, "n_seq_max")
    context = _number(facts, "n_ctx_seq") or _number(facts, "n_ctx_per_seq")
    return StartupLog(
        engine=engine,
        version=f"b{once['build']}" if "build" in once else None,
        model=_llama_cpp_model(load, once),
        format=_gguf_format(load.types),
        device_name=_names(found, load.devices()),
        n_devices=len(load.devices()),
        max_model_len=context or (n_ctx and n_ctx // (seqs or 1)),
        max_num_seqs=seqs or (1 if n_ctx else None),
        ubatch=_number(facts, "n_ubatch"),
        kv_cache_dtype=facts.get("kv"),
        n_cpu_moe=_n_cpu_moe(load, once.get("cpu_moe")),
        kv_unified=_BOOLS.get(facts.get("kv_unified", "")),
        swa_full=_BOOLS.get(facts.get("swa_full", "")),
        measured=MappingProxyType(load.measured()),
    )


def _llama_cpp_model(load: _Load, once: Mapping[str, str]) -> Model | None:
    """Tell the model by its layers and experts, its parameters, its expert tensors, its name or its layers."""
    facts = load.facts
    if "oss" not in facts.get("arch", "gpt-oss"):
        return None
    if shape := _SHAPES.get((facts.get("n_layer", ""), facts.get("n_expert", ""))):
        return shape
    if model := _PARAMETERS.get(facts.get("model params", "")[:5]) or _EXPERT_TENSORS.get(load.types.get("mxfp4", 0)):
        return model
    return _SIZES.get(once.get("name", "")) or (_LAYERS.get(once.get("layers", "")) if "arch" in facts else None)


def _gguf_format(types: Mapping[str, int]) -> str | None:
    """Name the format by what the tensors that are no experts are stored in."""
    dense = [stored for stored in types if stored not in ("f32", "mxfp4")]
    return _DENSE.get(dense[0]) if len(dense) == 1 and "mxfp4" in types else None


def _n_cpu_moe(load: _Load, said: str | None) -> int | None:
    """Count the layers whose experts stay on the host, by the tensors that were moved or the option."""
    layers = _number(load.facts, "n_layer")
    if load.host_layers:
        return len(load.host_layers)
    if said in ("cpu-moe", "cmoe"):
        return layers
    return min(int(said), layers or int(said)) if said else None


def _names(found: Mapping[str, str], devices: Collection[str]) -> str | None:
    """Name the devices that are used, of all that were found: CUDA1 by that, or as device 1."""
    keys = [device if device in found else re.sub(r"\D", "", device) or "0" for device in sorted(devices)]
    return ", ".join(dict.fromkeys(found[key] for key in keys if key in found)) or None


# Ollama before 0.30, which has an engine of its own

_OLLAMA_SIZE = re.compile(
    r'msg="(model weights|kv cache|compute graph)" (?:device|buffer|backend)=(\S{1,40}) '
    r'(?:buffer_type=\S{1,40} )?size="(\d{1,9}(?:\.\d{1,6})? [KMGT]?i?B)"'
)
_OLLAMA_TOTAL = re.compile(r'msg="total memory" size="(\d{1,9}(?:\.\d{1,6})? [KMGT]?i?B)"')
_OLLAMA_LOAD = re.compile(r"Parallel:(\d{1,5}) BatchSize:(\d{1,6}) .{0,60}?KvSize:(\d{1,9}) KvCacheType:(\w{0,10})")
_OLLAMA_VERSION = re.compile(r"\(version (\d[\w.+-]{0,30})\)|ollama version is (\d[\w.+-]{0,30})")
_OLLAMA_ARCH = re.compile(r"architecture=(\w{1,30})")
_OLLAMA_KEYS = {"model weights": "weights", "kv cache": "kv_cache", "compute graph": "compute"}


def _read_ollama(text: str) -> StartupLog:
    """Read Ollama's own engine, and llama.cpp's lines where Ollama starts that."""
    sizes: dict[str, list[tuple[str, int]]] = {}
    facts: dict[str, str] = {}
    found: dict[str, str] = {}
    for line in _lines(text):
        if size := _OLLAMA_SIZE.search(line):
            if "total" in sizes:  # it plans several layouts, and keeps the last
                sizes = {}
            sizes.setdefault(_OLLAMA_KEYS[size[1]], []).append((size[2], parse_size(size[3])))
        elif total := _first(_OLLAMA_TOTAL, line):
            sizes["total"] = [("", parse_size(total))]
        elif load := _OLLAMA_LOAD.search(line):
            facts |= {"seqs": load[1], "ubatch": load[2], "context": load[3], "kv": load[4] or "f16"}
        elif device := _FOUND.search(line):
            found[device[1] or "0"] = (device[2] or device[4]).strip()
        facts |= _facts(line, version=_OLLAMA_VERSION, layers=_OFFLOADED, arch=_OLLAMA_ARCH, name=_NAMED)
    if not sizes:
        return replace(_read_llama_cpp(text, "ollama"), version=facts.get("version"))
    return _ollama_log(sizes, facts, found)


def _ollama_log(
    sizes: Mapping[str, list[tuple[str, int]]], facts: Mapping[str, str], found: Mapping[str, str]
) -> StartupLog:
    ours = facts.get("arch", "gptoss") == "gptoss"
    seqs, context = _number(facts, "seqs"), _number(facts, "context")
    devices = {device for held in sizes.values() for device, _ in held if device and not _on_host(device)}
    measured = {key: sum(nbytes for device, nbytes in held if not _on_host(device)) for key, held in sizes.items()}
    if host := [nbytes for device, nbytes in sizes.get("weights", []) if _on_host(device)]:
        measured["host_weights"] = sum(host)
    return StartupLog(
        engine="ollama",
        own_engine=True,
        version=facts.get("version"),
        model=(_LAYERS.get(facts.get("layers", "")) or _SIZES.get(facts.get("name", ""))) if ours else None,
        format="gguf-bf16" if facts.get("arch") == "gptoss" else None,  # Ollama's conversion keeps what is no expert
        device_name=_names(found, devices),
        n_devices=len(devices),
        max_model_len=context and context // (seqs or 1),
        max_num_seqs=seqs,
        ubatch=_number(facts, "ubatch"),
        kv_cache_dtype=facts.get("kv"),
        measured=MappingProxyType(measured),
    )


# vLLM

_IS = r"'?[ :=]{1,2}'?"  # 'name': value, name=value and --name value
_VLLM_SETTINGS = {
    "version": re.compile(
        r"vLLM API server version v?(\d\S{0,40})|LLM engine \(v?(\d[^)\s]{0,40})\)|█ {1,3}version (\d\S{0,40})"
    ),
    "model": _NAMED,
    "quantization": re.compile(r"\bquantization=(?!None)(\w{1,20})"),
    "context": re.compile(rf"\bmax_seq_len=(\d{{1,9}})|max model len (\d{{1,9}})|max[-_]model[-_]len{_IS}(\d{{1,9}})"),
    "seqs": re.compile(rf"max[-_]num[-_]seqs{_IS}(\d{{1,9}})"),
    "batched": re.compile(rf"max[-_]num[-_]batched[-_]tokens{_IS}(\d{{1,9}})"),
    "utilization": re.compile(
        rf"gpu[-_]memory[-_]utilization{_IS}([01]?\.\d{{1,6}}|1)\b|GPU memory utilization is \(([01]?\.\d{{1,6}}),"
    ),
    "tp": re.compile(rf"tensor[-_]parallel[-_]size{_IS}(\d{{1,4}})"),
    "pp": re.compile(rf"pipeline[-_]parallel[-_]size{_IS}(\d{{1,4}})"),
    "dp": re.compile(rf"data[-_]parallel[-_]size{_IS}(\d{{1,4}})"),
    "kv": re.compile(rf"kv[-_]cache[-_]dtype{_IS}(\w{{1,20}})"),
    "device": re.compile(r"device_name=([\w-]{1,60})(?:,|\.json)|GPU \d{1,2}: ((?:NVIDIA|AMD) [\w /-]{1,60})"),
}
_VLLM_SIZES = {  # before 2025 it wrote GB and meant GiB
    "weights": re.compile(r"(?:Model loading|model weights) took (\d{1,6}(?:\.\d{1,8})?) Gi?B"),
    "available_kv_cache": re.compile(r"Available KV cache memory: (-?\d{1,6}(?:\.\d{1,8})?) GiB"),
    "compute": re.compile(r"(\d{1,6}(?:\.\d{1,8})?) GiB for peak activation"),
    "kv_cache": re.compile(r"Current kv cache memory in use is (\d{1,6}(?:\.\d{1,8})?) GiB"),
}
_WORKER = re.compile(r"\((\w{1,40} (?:rank=\d{1,5} )?pid=\d{1,9})\b")


def _read_vllm(text: str) -> StartupLog:
    facts: dict[str, str] = {}
    sizes: dict[str, dict[str, float]] = {}  # by what is said, then by who said it
    for line in _lines(text):
        if "vLLM API server version" in line and sizes:
            facts, sizes = {}, {}
        facts |= _facts(line, **_VLLM_SETTINGS)
        for key, gib in _facts(line, **_VLLM_SIZES).items():
            said = sizes.setdefault(key, {})
            worker = (_WORKER.findall(line) or [""])[-1]
            said.pop(worker, None)  # the last to speak stands last
            said[worker] = float(gib)
    return _vllm_log(facts, sizes)


def _vllm_log(facts: Mapping[str, str], sizes: Mapping[str, Mapping[str, float]]) -> StartupLog:
    if "tp" in facts:
        world = (_number(facts, "tp") or 1) * (_number(facts, "pp") or 1) * (_number(facts, "dp") or 1)
    else:
        world = max((len(said) for said in sizes.values()), default=1)
    return StartupLog(
        engine="vllm",
        version=facts.get("version"),
        model=_SIZES.get(facts.get("model", "")),
        format=facts.get("quantization"),
        device_name=facts["device"].replace("_", " ").strip() if "device" in facts else None,
        n_devices=world,
        max_model_len=_number(facts, "context"),
        max_num_seqs=_number(facts, "seqs"),
        kv_cache_dtype=facts.get("kv"),
        gpu_memory_utilization=float(facts["utilization"]) if "utilization" in facts else None,
        max_num_batched_tokens=_number(facts, "batched"),
        tensor_parallel_size=_number(facts, "tp"),
        measured=MappingProxyType({key: _over_ranks(list(said.values()), world) for key, said in sizes.items()}),
    )


def _over_ranks(said: list[float], world: int) -> int:
    """Add up the GiB of all ranks, of which some versions let only the first speak."""
    last = said[-world:]
    return round(sum(last) / len(last) * world * GIB)


_SIGNS: dict[Engine, re.Pattern[str]] = {
    "vllm": re.compile(
        r"vLLM API server version|LLM engine \(v|Model loading took|Available KV cache memory|model_runner\.py"
    ),
    "ollama": re.compile(r"source=\w{1,30}\.go:\d|ollama version is"),
    "llama.cpp": re.compile(
        r"load_tensors:|llama_model_loader:|llama_(?:new_)?context|llama_kv_cache|memory_breakdown"
    ),
}
_READERS: dict[Engine, Callable[[str], StartupLog]] = {
    "vllm": _read_vllm,
    "ollama": _read_ollama,
    "llama.cpp": _read_llama_cpp,
}
_HINTS: dict[Engine, str] = {
    "vllm": "looked for 'Model loading took' and 'Available KV cache memory', which vLLM prints at level INFO "
    "before it serves: set VLLM_LOGGING_LEVEL=INFO",
    "ollama": "looked for 'model weights' and 'model buffer size', which Ollama prints when it loads a model: "
    "run one prompt with OLLAMA_DEBUG=1 and save the server's log",
    "llama.cpp": "looked for 'model buffer size', 'KV buffer size' and 'compute buffer size', which newer versions "
    "print with -v only: save what llama-server -v prints",
}
