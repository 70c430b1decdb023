"""Start-up logs as the three engines printed them; each excerpt names its source in its first line."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ossquant.errors import UsageError
from ossquant.startup_log import MAX_BYTES, StartupLog, read_startup_log
from ossquant.units import GIB, MIB

LOGS = Path(__file__).parent / "data" / "logs"


def mib(*sizes: float) -> int:
    return round(sum(sizes) * MIB)


def gib(*sizes: float) -> int:
    return round(sum(sizes) * GIB)


EXPECTED = {
    "llama_cpp_3070_cpu_moe": StartupLog(
        engine="llama.cpp",
        version="b6699",
        model="20b",
        format="gguf-q8",
        device_name="NVIDIA GeForce RTX 3070",
        n_devices=1,
        max_model_len=131072,
        max_num_seqs=1,
        ubatch=512,
        kv_cache_dtype="f16",
        n_cpu_moe=24,  # 99 were asked for, of 24 layers
        kv_unified=False,
        swa_full=False,
        measured={
            "weights": mib(1242.03),
            "kv_cache": mib(3072, 18),
            "compute": mib(456.98),
            "host_weights": mib(10949.33),
        },
    ),
    "llama_cpp_m5_unified": StartupLog(
        engine="llama.cpp",
        model="20b",
        device_name="Apple M5",
        n_devices=1,
        max_model_len=131072,
        max_num_seqs=4,
        ubatch=512,
        kv_cache_dtype="f16",
        kv_unified=True,
        swa_full=False,
        measured={
            "weights": mib(11073.83),
            "kv_cache": mib(3072, 24),
            "compute": mib(420.83),
            "host_weights": mib(379.71),
            "total": mib(14590),
        },
    ),
    "llama_cpp_m4_max_120b": StartupLog(
        engine="llama.cpp",
        model="120b",
        format="gguf-q8",
        device_name="Apple M4 Max",
        n_devices=1,
        max_model_len=4096,
        max_num_seqs=1,
        ubatch=512,
        kv_cache_dtype="f16",
        kv_unified=False,
        swa_full=True,
        measured={
            "weights": mib(37958.69, 22479.80),
            "kv_cache": mib(144, 144),
            "compute": mib(819.26),
            "host_weights": mib(586.82),
        },
    ),
    "llama_cpp_8_ascend": StartupLog(
        engine="llama.cpp",
        model="20b",
        format="gguf-q8",
        device_name="Ascend910B4",
        n_devices=8,
        max_model_len=131072,
        max_num_seqs=1,
        ubatch=512,
        kv_cache_dtype="f16",
        kv_unified=False,
        swa_full=False,
        measured={
            "weights": mib(109.20, 81.90 * 6, 641.43),
            "kv_cache": mib(3072, 18),
            "compute": mib(396.27, 34.76 * 6, 398.38),
            "host_weights": mib(10949.33),
        },
    ),
    "ik_llama_120b_cpu_moe": StartupLog(
        engine="llama.cpp",
        model="120b",
        format="gguf-f16",
        n_devices=1,
        max_model_len=16896,
        max_num_seqs=1,
        ubatch=512,
        kv_cache_dtype="f16",
        n_cpu_moe=36,
        measured={
            "weights": mib(3131.54),
            "kv_cache": mib(1188),
            "compute": mib(404),
            "host_weights": mib(58244.06, 1104.61),
        },
    ),
    "vllm_h100_120b": StartupLog(
        engine="vllm",
        n_devices=1,
        measured={"weights": gib(65.9651), "available_kv_cache": gib(-2.14)},
    ),
    "vllm_a100_20b": StartupLog(
        engine="vllm",
        version="0.19.0",
        model="20b",
        n_devices=1,
        max_model_len=131072,
        gpu_memory_utilization=0.65,
        measured={"weights": gib(13.72), "available_kv_cache": gib(36.56)},
    ),
    "vllm_kaggle_120b": StartupLog(
        engine="vllm",
        version="0.11.2",
        model="120b",
        n_devices=1,
        max_model_len=98304,
        max_num_seqs=6,
        gpu_memory_utilization=0.96,
        max_num_batched_tokens=2048,
        measured={"weights": gib(65.9651), "available_kv_cache": gib(8.99)},
    ),
    "vllm_r9700_tp2_20b": StartupLog(
        engine="vllm",
        version="0.11.1rc2.dev141+g38f225c2a",
        model="20b",
        format="mxfp4",
        n_devices=2,
        max_model_len=131072,
        kv_cache_dtype="auto",
        max_num_batched_tokens=2048,
        tensor_parallel_size=2,
        measured={"weights": gib(7.2637, 7.2637)},  # one of two ranks speaks
    ),
    "ollama_strix_halo_120b": StartupLog(
        engine="ollama",
        own_engine=True,
        model="120b",
        format="gguf-bf16",
        device_name="AMD Radeon Graphics",
        n_devices=1,
        max_model_len=8192,
        max_num_seqs=1,
        ubatch=512,
        kv_cache_dtype="f16",
        measured={
            "weights": int(59.8 * GIB),
            "host_weights": int(1.1 * GIB),
            "kv_cache": mib(450),
            "compute": int(121.8 * MIB),
            "total": int(61.4 * GIB),
        },
    ),
    "ollama_0_11_20b": StartupLog(
        engine="ollama",
        own_engine=True,
        model="20b",
        n_devices=1,
        measured={"weights": int(11.7 * GIB), "host_weights": int(1.1 * GIB), "compute": int(2.1 * GIB)},
    ),
    "ollama_0_30_120b": StartupLog(
        engine="ollama",
        model="120b",
        format="gguf-bf16",
        device_name="Radeon 8060S Graphics",
        n_devices=1,
        measured={
            "weights": mib(61223),
            "kv_cache": mib(9306),
            "compute": mib(796),
            "host_weights": mib(1104),
            "total": mib(71326),
        },
    ),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in LOGS.glob("*.log")))
def test_published_log(name: str) -> None:
    """Each published log gives the figures that stand in it, and no others."""
    assert read_startup_log(LOGS / f"{name}.log") == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_source(name: str) -> None:
    """Each excerpt says where it was published, and names no user's home."""
    text = (LOGS / f"{name}.log").read_text()
    assert text.startswith("# source: ")
    assert "/home/" not in text and "/Users/" not in text


PREFIXES = {
    "journald": "Sep 26 10:33:42 host ollama[6664]: {}",
    "docker compose": "llama-1  | {}",
    "llama.cpp with colours": "\x1b[34m1.14.608.945\x1b[0m \x1b[32mI \x1b[0m{}",
    "coloured to its end": "\x1b[33m{}\x1b[0m",
    "llama.cpp with levels": "0.01.000.002 I {}",
    "rust": "2025-09-12T10:05:07.590621Z  INFO llama-cpp-2: {}",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    """Time stamps, colours and names before the lines change nothing."""
    name = "llama_cpp_3070_cpu_moe"
    lines = (LOGS / f"{name}.log").read_text().splitlines()
    assert _read(tmp_path, "\r\n".join(prefix.format(line) for line in lines)) == EXPECTED[name]


def test_vllm_colours(tmp_path: Path) -> None:
    """vLLM colours the process's name, and docker may escape quotes."""
    text = (LOGS / "vllm_r9700_tp2_20b.log").read_text()
    coloured = text.replace("(EngineCore_DP0 pid=742)", "\x1b[1;36m(EngineCore_DP0 pid=742)\x1b[0;0m")
    assert _read(tmp_path, coloured) == EXPECTED["vllm_r9700_tp2_20b"]
    escaped = (LOGS / "ollama_strix_halo_120b.log").read_text().replace('"', '\\"')
    assert _read(tmp_path, escaped) == EXPECTED["ollama_strix_halo_120b"]


def test_powershell(tmp_path: Path) -> None:
    """A log that PowerShell wrote in UTF-16 reads as any other."""
    path = tmp_path / "server.log"
    path.write_bytes((LOGS / "vllm_kaggle_120b.log").read_text().encode("utf-16"))
    assert read_startup_log(path) == EXPECTED["vllm_kaggle_120b"]


@pytest.mark.parametrize("name", ["llama_cpp_8_ascend", "ik_llama_120b_cpu_moe", "ollama_strix_halo_120b"])
def test_loaded_twice(tmp_path: Path, name: str) -> None:
    """Of two loads in one log the last counts, not their sum."""
    text = (LOGS / f"{name}.log").read_text()
    other = text.replace("= 1", "= 9").replace('size="1', 'size="9')
    assert _read(tmp_path, other + text) == EXPECTED[name]


def test_dry_run(tmp_path: Path) -> None:
    """What llama.cpp plans before it loads, with -fit on, does not count beside what it then allocates."""
    plan = (
        "common_memory_breakdown_print: |   - CUDA0 (RTX 3070) | 8192 = 7672 + (5000 = 1300 + 3090 + 610) + -5000 |\n"
        "llama_params_fit_impl: projected to use 5000 MiB of device memory vs. 7672 MiB of free device memory\n"
    )
    name = "llama_cpp_3070_cpu_moe"
    text = (LOGS / f"{name}.log").read_text().replace("llama_model_loader: loaded", plan + "llama_model_loader: loaded")
    assert read_measured(tmp_path, text) == dict(EXPECTED[name].measured)


def test_context_made_twice(tmp_path: Path) -> None:
    """A second context for the same weights replaces the first one's cache and buffers."""
    text = (LOGS / "llama_cpp_m5_unified.log").read_text()
    start = text.index("llama_context: constructing")
    again = text[start:].replace("3072.00", "768.00").replace("420.83", "404.00").replace("131072", "32768")
    log = _read(tmp_path, text + again.replace("(f16)", "(q8_0)"))
    assert log.kv_cache_dtype == "q8_0"
    assert (log.max_model_len, log.measured["kv_cache"], log.measured["compute"]) == (32768, mib(768, 24), mib(404))
    assert log.measured["weights"] == mib(11073.83)


def test_old_context_made_twice(tmp_path: Path) -> None:
    """So it does where llama.cpp does not announce it."""
    text = (LOGS / "ik_llama_120b_cpu_moe.log").read_text()
    again = text[text.index("llama_new_context_with_model: n_ctx") :].replace("1188.00", "2376.00")
    assert _read(tmp_path, text + again).measured["kv_cache"] == mib(2376)


def test_empty_dry_run(tmp_path: Path) -> None:
    """A load that allocates nothing, which -v shows before the real one or alone, has no weights."""
    text = (LOGS / "llama_cpp_8_ascend.log").read_text()
    dry = re.sub(r"(model|KV) buffer size = +[\d.]+", r"\1 buffer size = 0.00", text)
    assert _read(tmp_path, dry + text) == EXPECTED["llama_cpp_8_ascend"]
    assert read_measured(tmp_path, dry).keys() == {"compute"}


def test_quantized_cache(tmp_path: Path) -> None:
    """The cache's type is that of the layers that see everything; different types for K and V are both named."""
    text = (LOGS / "llama_cpp_3070_cpu_moe.log").read_text()
    assert _read(tmp_path, text.replace("K (f16): 1536", "K (q8_0): 816")).kv_cache_dtype == "q8_0/f16"
    text = text.replace("K (f16): 1536.00 MiB, V (f16)", "K (q8_0): 816.00 MiB, V (q8_0)")
    assert _read(tmp_path, text).kv_cache_dtype == "q8_0"


def test_shared_context(tmp_path: Path) -> None:
    """Where llama.cpp prints the context of all sequences only, each has its share."""
    text = (LOGS / "llama_cpp_3070_cpu_moe.log").read_text().replace("n_seq_max     = 1", "n_seq_max     = 4")
    log = _read(tmp_path, re.sub(r"llama_context: n_ctx_per_seq.*\n", "", text))
    assert (log.max_model_len, log.max_num_seqs) == (32768, 4)


def test_split_rows(tmp_path: Path) -> None:
    """Rows split over devices lie in a buffer of their own on the same device."""
    text = (
        "load_tensors:   CUDA0_Split model buffer size =  9000.00 MiB\n"
        "load_tensors:        CUDA0 model buffer size =   500.00 MiB\n"
    )
    log = _read(tmp_path, text)
    assert (log.n_devices, log.measured["weights"]) == (1, mib(9500))


def test_host_only(tmp_path: Path) -> None:
    """Without a device nothing is on one, and the weights are the host's."""
    text = (
        "load_tensors: offloaded 0/25 layers to GPU\n"
        "load_tensors:   CPU_Mapped model buffer size = 11536.18 MiB\n"
        "llama_kv_cache:        CPU KV buffer size =    96.00 MiB\n"
        "llama_context:        CPU compute buffer size =   398.38 MiB\n"
    )
    log = _read(tmp_path, text)
    assert log.n_devices == 0
    assert log.measured == {"weights": 0, "kv_cache": 0, "compute": 0, "host_weights": mib(11536.18)}


@pytest.mark.parametrize(
    ("option", "layers"),
    [("--n-cpu-moe 14", 14), ("-ncmoe 4", 4), ("--cpu-moe", 24), ("-cmoe", 24), ("--n-cpu-moe=31", 24), ("-c 0", None)],
)
def test_n_cpu_moe(tmp_path: Path, option: str, layers: int | None) -> None:
    """The layers with experts on the host are read from the command, where it stands in the log."""
    text = (LOGS / "llama_cpp_3070_cpu_moe.log").read_text().replace("--n-cpu-moe 99", option)
    assert _read(tmp_path, text).n_cpu_moe == layers


RANKS = """\
(APIServer pid=1) INFO 05-14 00:00:01 [utils.py:233] non-default args: {{'model': 'openai/gpt-oss-120b'}}
(EngineCore pid=9) INFO 05-14 00:00:09 [core.py:97] Initializing a V1 LLM engine (v0.21.0) with config: \
model='openai/gpt-oss-120b', max_seq_len=131072, tensor_parallel_size=4, pipeline_parallel_size=1, \
data_parallel_size=1, quantization=mxfp4, kv_cache_dtype=fp8
{}
"""


def test_every_rank_speaks(tmp_path: Path) -> None:
    """Ranks that all speak are added up, and the last word of each counts."""
    lines = [
        f"(Worker_TP{rank} pid={147 + rank}) INFO 05-14 00:04:17 [gpu_worker.py:460] {said}"
        for rank in range(4)
        for said in ("Available KV cache memory: 1.00 GiB", f"Available KV cache memory: 15.7{rank} GiB")
    ]
    log = _read(tmp_path, RANKS.format("\n".join(lines)))
    assert log.measured == {"available_kv_cache": gib(15.70, 15.71, 15.72, 15.73)}
    assert (log.n_devices, log.tensor_parallel_size, log.kv_cache_dtype) == (4, 4, "fp8")


def test_first_rank_speaks_for_all(tmp_path: Path) -> None:
    """Where only the first rank speaks, every rank holds as much."""
    used = (
        "(Worker_TP0 pid=147) INFO 08-31 15:25:55 [gpu_worker.py:805] Free memory on device (22.93/23.56 GiB) on "
        "startup. Desired GPU memory utilization is (0.935, 22.03 GiB). Actual usage is 19.47 GiB for consumed memory "
        "(weights + non-torch), 0.6 GiB for peak activation, and 0.1 GiB for CUDAGraph memory. Replace "
        "gpu_memory_utilization config with `--kv-cache-memory=1828800984` (1.7 GiB) to fit into requested memory. "
        "Current kv cache memory in use is 1.95 GiB."
    )
    log = _read(tmp_path, RANKS.format(used))
    assert log.measured == {"compute": gib(0.6 * 4), "kv_cache": gib(1.95 * 4)}
    assert log.gpu_memory_utilization == 0.935


def test_restarted_vllm(tmp_path: Path) -> None:
    """A server that a supervisor starts again is read as it started last."""
    first = (LOGS / "vllm_kaggle_120b.log").read_text()
    log = _read(tmp_path, first + (LOGS / "vllm_r9700_tp2_20b.log").read_text())
    assert log.measured == EXPECTED["vllm_r9700_tp2_20b"].measured
    assert (log.model, log.max_num_seqs, log.gpu_memory_utilization) == ("20b", None, None)


def test_restarted_worker(tmp_path: Path) -> None:
    """Of more workers than the configuration has, the last to speak count."""
    text = RANKS.replace("tensor_parallel_size=4", "tensor_parallel_size=1")
    said = [f"(EngineCore pid={pid}) Model loading took {gibs} GiB" for pid, gibs in ((1, 10), (2, 11), (1, 12))]
    assert read_measured(tmp_path, text.format("\n".join(said[:2]))) == {"weights": gib(11)}
    assert read_measured(tmp_path, text.format("\n".join(said))) == {"weights": gib(12)}


def test_old_vllm(tmp_path: Path) -> None:
    """Before 2025 vLLM wrote GB where it had divided by 2**30."""
    text = (
        "INFO 02-11 07:40:45 model_runner.py:1115] Loading model weights took 13.9476 GB\n"
        "(VllmWorkerProcess pid=1786) INFO 02-11 07:40:45 model_runner.py:1115] Loading model weights took 13.9476 GB\n"
    )  # source: https://github.com/vllm-project/vllm/issues/13061
    assert read_measured(tmp_path, text) == {"weights": gib(13.9476 * 2)}


def test_ollama_tries_layouts(tmp_path: Path) -> None:
    """Of the layouts Ollama plans, the last is the one it keeps; its context is shared out."""
    text = (LOGS / "ollama_strix_halo_120b.log").read_text()
    plan = text.replace("59.8 GiB", "61.0 GiB").replace("61.4 GiB", "99.0 GiB")
    log = _read(tmp_path, plan + text.replace("Parallel:1", "Parallel:4").replace("KvSize:8192", "KvSize:32768"))
    assert log.measured == EXPECTED["ollama_strix_halo_120b"].measured
    assert (log.max_model_len, log.max_num_seqs) == (8192, 4)


def test_another_model(tmp_path: Path) -> None:
    """A model that is not gpt-oss has no name here, whatever its number of layers."""
    text = (LOGS / "llama_cpp_3070_cpu_moe.log").read_text().replace("= gpt-oss", "= qwen3moe")
    assert _read(tmp_path, text).model is None
    text = (LOGS / "ollama_strix_halo_120b.log").read_text().replace("architecture=gptoss", "architecture=qwen3")
    assert (_read(tmp_path, text).model, _read(tmp_path, text).format) == (None, None)


def test_truncated(tmp_path: Path) -> None:
    """A log that breaks off says what it said until then, and nothing it did not."""
    for name, expected in EXPECTED.items():
        data = (LOGS / f"{name}.log").read_bytes()
        for end in range(0, len(data), 97):
            path = tmp_path / "cut.log"
            path.write_bytes(data[:end])
            try:
                log = read_startup_log(path)
            except UsageError:
                continue
            assert log.measured.keys() <= expected.measured.keys()
            assert log.measured.get("weights", 0) <= expected.measured.get("weights", 0)


NO_LOGS = {
    "empty": b"",
    "text": b"It was the best of times.\n" * 50,
    "binary": bytes(range(256)) * 400,
    "half utf-16": b"\xff\xfe" + b"load_tensors: x",
    "nul": b"\x00" * 10_000,
}


@pytest.mark.parametrize("data", NO_LOGS.values(), ids=NO_LOGS.keys())
def test_no_log(tmp_path: Path, data: bytes) -> None:
    """A file that is no log is refused with what was looked for."""
    path = tmp_path / "x.log"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="no start-up log") as refused:
        read_startup_log(path)
    assert "load_tensors:" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("llama_model_loader: loaded meta data with 35 key-value pairs", "-v"),
        ("(APIServer pid=90) INFO 11-28 11:45:51 [api_server.py:1977] vLLM API server version 0.11.2", "INFO"),
        ('time=2025-09-11T00:42:49 level=INFO source=runner.go:1251 msg="starting ollama engine"', "OLLAMA_DEBUG=1"),
    ],
)
def test_no_memory(tmp_path: Path, text: str, hint: str) -> None:
    """A log without a memory line is refused with the way to get one."""
    path = tmp_path / "x.log"
    path.write_text(text)
    with pytest.raises(UsageError, match="states no memory") as refused:
        read_startup_log(path)
    assert hint in refused.value.hint


def test_unreadable(tmp_path: Path) -> None:
    """A missing file, a folder and a file too large are refused before they are read."""
    for path in (tmp_path / "missing.log", tmp_path):
        with pytest.raises(UsageError, match="is not a file"):
            read_startup_log(path)
    large = tmp_path / "large.log"
    with open(large, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UsageError, match="50 MB"):
        read_startup_log(large)


HOSTILE = {
    "one line": "load_tensors: " + "a" * 3_000_000,
    "spaces": "load_tensors: CUDA0" + " " * 3_000_000 + "model buffer size = 1 MiB",
    "almost": "load_tensors: " + "CUDA0 model buffer size = " * 100_000,
    "brackets": "Model loading took " + "(Worker pid=1" * 200_000,
    "rows": "memory_breakdown " + "|   - CUDA0 ( | 1 = 1 + (" * 100_000,
    "quotes": "source=a.go:1 " + 'msg="model weights" device=' * 100_000,
    "digits": "load_tensors: CUDA0 model buffer size = " + "9" * 1_000_000 + " MiB",
    "devices": "llama_context: " + "using device CUDA0 (" * 100_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(tmp_path: Path, text: str) -> None:
    """Lines made to be slow are cut, and refused in about a second."""
    path = tmp_path / "x.log"
    path.write_text("\n".join([text, *[text[:9000]] * 20]))
    start = time.process_time()
    with pytest.raises(UsageError):
        read_startup_log(path)
    assert time.process_time() - start < 5


def test_frozen() -> None:
    """A log that was read does not change."""
    log = read_startup_log(LOGS / "vllm_kaggle_120b.log")
    with pytest.raises(TypeError):
        log.measured["weights"] = 0  # type: ignore[index]


def test_cold() -> None:
    """Reading logs loads nothing heavy."""
    code = "import sys, ossquant.startup_log; print(sorted({'torch', 'numpy', 'rich', 'numba'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _read(tmp_path: Path, text: str) -> StartupLog:
    path = tmp_path / "server.log"
    path.write_text(text)
    return read_startup_log(path)


def read_measured(tmp_path: Path, text: str) -> dict[str, int]:
    return dict(_read(tmp_path, text).measured)
