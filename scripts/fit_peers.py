#!/usr/bin/env python3
"""Ask other memory estimators what `ossquant fit` is asked, and hold every answer against one log.

    scripts/fit_peers.py              needs PyPI and a minute or two; no model, no GPU

The question: gpt-oss-20b in llama.cpp with q8_0 dense weights and MXFP4 experts, 131072 tokens, f16 KV, one sequence,
ubatch 512. The engine's own log says 14.16 GiB on the device: weights 10949 MiB, KV 3.02 GiB, the rest compute.

Each peer is installed at a fixed version into an environment of its own. Those that read files get sparse ones with
the true headers, those that read the Hub a local server that answers with these files. A peer that has no words for
the question is asked the nearest thing it knows: the last column says what.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type

from ossquant.checkpoint.reader import INDEX
from ossquant.checkpoint.writer import plan_shards
from ossquant.layout import Role
from ossquant.plan import make_plan
from ossquant.recipe import Recipe
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec

GIB = 2**30
REFERENCE = 14.16  # GiB
REPO, GGUF = "openai/gpt-oss-20b", "gpt-oss-20b-Q8_0.gguf"
ABOUT, TREE = "about.json", "tree.json"  # the Hub's answers about the repository
SPEC = ModelSpec.published("20b")
TINY_CONFIG = Path(__file__).parent.parent / "tests/data/tiny/config.json"  # all but the dimensions is the 20b's
# mdl fit plans only for a GPU that it finds; this asks its model of llama.cpp for a command line instead
MDL = (
    "import sys; from mdl_fit import gguf, model; flags = model.parse_argv(sys.argv[2:])[0]; "
    "print(model.memory(model.Shape(gguf.load(sys.argv[1])), flags).gpu)"
)


@dataclass(frozen=True)
class Peer:
    """A package of PyPI, the command that asks it, and how its answer reads in GiB.

    version None: it runs as it stands beside this interpreter.
    """

    package: str
    version: str | None
    command: str
    read: Callable[[str], float]
    beside: tuple[str, ...] = ()  # what else to install


def at(*keys: str, unit: float = 1) -> Callable[[str], float]:
    """Read a number from a JSON answer, at these keys."""

    def read(text: str) -> float:
        value = json.loads(text)
        for key in keys:
            value = value[key]
        return float(value) / unit

    return read


def in_a_log(text: str) -> float:
    """Read our answer without the driver's share, which no log counts."""
    memory = json.loads(text)["device_memory"]
    return float(sum(memory[term]["expected"] for term in ("weights", "kv_cache", "compute"))) / GIB


def after(pattern: str, unit: float = 1) -> Callable[[str], float]:
    """Read the sum of the numbers that stand behind a pattern."""

    def read(text: str) -> float:
        numbers = re.findall(rf"(?:{pattern})\D*?([\d.]+(?:e\d+)?)", text)
        if not numbers:
            raise ValueError(f"no {pattern!r} in its answer")
        return sum(map(float, numbers)) / unit

    return read


HF_MEM = f"hf-mem --model-id {REPO} --experimental --max-model-len 131072 --json-output"
WHICHLLM = ("typer==0.28.0",)  # 0.5.21 does not start with 0.29
PEERS = (
    # where llmfit, whichllm, accelerate, modelinfo and canirun write GB they divide by 2**30 or compare with GiB
    Peer("llmfit", "1.1.17", f"llmfit plan {REPO} --context 131072 --json", at("minimum", "vram_gb")),
    Peer("llmfit", "1.1.17", f"llmfit --max-context 131072 --memory 24G info {REPO}", after("Min VRAM:")),
    Peer("whichllm", "0.5.21", f"whichllm plan {REPO} -c 131072 --json",
         at("vram_by_quant", "Q4_K_M", "vram_bytes", unit=GIB), beside=WHICHLLM),
    Peer("whichllm", "0.5.21", f"whichllm plan {REPO} -c 131072 -q MXFP4", after(r"\(MXFP4,"), beside=WHICHLLM),
    Peer("hf-mem", "0.5.6", HF_MEM, at("total_memory", unit=GIB)),
    Peer("hf-mem", "0.5.6", f"{HF_MEM} --kv-cache-dtype bfloat16", at("total_memory", unit=GIB)),
    Peer("hf-mem", "0.5.6", f"{HF_MEM} --gguf-file {GGUF}", at("total_memory", unit=GIB)),
    Peer("accelerate", None, f"accelerate estimate-memory {REPO} --library_name transformers --dtypes int4",
         after(r"int4\W+[\d.]+ MB\W")),
    Peer("modelinfo-cli", "1.4.4", f"modelinfo {GGUF} --context 131072", after(r"VRAM \(est\):")),
    Peer("canirun", "1.0.1", f"canirun {REPO} --ctx 131072", after("4-bit")),
    Peer("ridgepoint", "0.1.2", f"ridgepoint fit {REPO} --engine llama.cpp --dtype q4_k_m --gpu rtx4090-24gb:1 "
         "--ctx 131072 --json", after(r'(?:weights_bytes|overhead_bytes)[^}]*"best":|bytes_per_seq":', GIB)),
    Peer("llama-mdl", "0.14.0", f"python -c MDL {GGUF} -c 131072 -ngl 99 -fa on -ub 512 -np 1",
         lambda text: float(text) / GIB),
    Peer("ossquant", None, "ossquant fit --model 20b --engine llama.cpp --format gguf-q8 --max-model-len 131072 "
         "--gpu 24GB --json", in_a_log),
)  # fmt: skip
NOT_RUN = {
    "gguf-parser-go": "a Go program; PyPI's gguf-parser 0.1.1 is another and estimates nothing",
    "gpustack": "2.3.0 estimates with gguf-parser-go, which it fetches outside pip",
    "clanker-gguf": "1.2.0 plans only for an NVIDIA GPU that it finds",
}


def write_hub(folder: Path) -> None:
    """Write the repository as published: config, index, the shards' headers, and what the Hub tells about it."""
    plan = make_plan(SPEC, Recipe("mxfp4", "published", {Role.EXPERTS: Scheme("mxfp4")}))
    shards = plan_shards(plan, 5 * 10**9)
    for shard in shards:
        (folder / shard.name).write_bytes(shard.header)
    weight_map = {placed.tensor.name: shard.name for shard in shards for placed in shard.placed}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}))
    config = json.loads(TINY_CONFIG.read_text()) | asdict(SPEC)
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf_header(folder / GGUF)
    counts: Counter[str] = Counter()
    for part in (part for entry in plan.tensors for part in entry.stored):
        counts[part.dtype] += prod(part.shape) * (2 if part.name.endswith("_blocks") else 1)  # two codes a byte
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()} | {s.name: s.nbytes for s in shards}
    tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
    about = {"_id": "0", "id": REPO, "sha": "0" * 40, "downloads": 0, "likes": 0, "tags": [], "config": config,
             "siblings": [{"rfilename": name} for name in sizes],
             "safetensors": {"parameters": counts, "total": counts.total()}}  # fmt: skip
    (folder / TREE).write_text(json.dumps(tree))
    (folder / ABOUT).write_text(json.dumps(about))


def gguf_tensors() -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """The tensors of the GGUF: name, shape, type."""
    hidden, experts, inner = SPEC.hidden_size, SPEC.num_local_experts, SPEC.intermediate_size
    q, kv = SPEC.num_attention_heads * SPEC.head_dim, SPEC.num_key_value_heads * SPEC.head_dim
    attention = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "output": (hidden, q)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    yield "token_embd.weight", (SPEC.vocab_size, hidden), Type.Q8_0
    yield "output.weight", (SPEC.vocab_size, hidden), Type.Q8_0
    yield "output_norm.weight", (hidden,), Type.F32
    for layer in (f"blk.{n}" for n in range(SPEC.num_hidden_layers)):
        for name, shape in attention.items():
            yield f"{layer}.attn_{name}.weight", shape, Type.Q8_0
            yield f"{layer}.attn_{name}.bias", shape[:1], Type.F32
        for name, shape in mlp.items():
            yield f"{layer}.ffn_{name}_exps.weight", (experts, *shape), Type.MXFP4
            yield f"{layer}.ffn_{name}_exps.bias", (experts, shape[0]), Type.F32
        yield f"{layer}.ffn_gate_inp.weight", (experts, hidden), Type.F32
        yield f"{layer}.ffn_gate_inp.bias", (experts,), Type.F32
        yield f"{layer}.attn_sinks.weight", (SPEC.num_attention_heads,), Type.F32
        yield f"{layer}.attn_norm.weight", (hidden,), Type.F32
        yield f"{layer}.post_attention_norm.weight", (hidden,), Type.F32


def write_gguf_header(path: Path) -> None:
    """Write the GGUF's keys and tensor list, and no data behind them."""
    writer = GGUFWriter(path, "gpt-oss")
    keys = {
        "file_type": 38, "tokenizer_model": "gpt2", "token_list": [f"<{i}>" for i in range(SPEC.vocab_size)],
        "block_count": SPEC.num_hidden_layers, "context_length": SPEC.max_position_embeddings,
        "embedding_length": SPEC.hidden_size, "feed_forward_length": SPEC.intermediate_size,
        "expert_feed_forward_length": SPEC.intermediate_size, "head_count": SPEC.num_attention_heads,
        "head_count_kv": SPEC.num_key_value_heads, "key_length": SPEC.head_dim, "value_length": SPEC.head_dim,
        "sliding_window": SPEC.sliding_window, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 150000.0,
        "expert_count": SPEC.num_local_experts, "expert_used_count": SPEC.num_experts_per_tok,
    }  # fmt: skip
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    for name, shape, type_ in gguf_tensors():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), gguf_nbytes(shape, type_), type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def gguf_nbytes(shape: tuple[int, ...], type_: Type) -> int:
    """Bytes of a tensor; each is a multiple of GGUF's alignment, 32."""
    elements, nbytes = GGML_QUANT_SIZES[type_]
    return prod(shape) // elements * nbytes


class Hub(SimpleHTTPRequestHandler):
    """Answers as the Hub does for one repository. Files end with their headers: nobody reads further."""

    def translate_path(self, path: str) -> str:
        """The file that answers a request, of whichever revision."""
        path = path.partition("?")[0]
        name = TREE if f"{REPO}/tree/" in path else ABOUT if path == f"/api/models/{REPO}" else Path(path).name
        return str(Path(self.directory) / name)

    def end_headers(self) -> None:
        """Send what huggingface_hub asks of a file."""
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def install(peer: Peer, folder: Path, endpoint: str) -> Path:
    """Install a peer into an environment of its own; gives its folder of commands. Raises CalledProcessError."""
    if peer.version is None:
        return Path(sys.executable).parent
    commands = folder / peer.package / "bin"
    if (commands / peer.command.split()[0]).exists():
        return commands
    run([sys.executable, "-m", "venv", "--without-pip", str(commands.parent)])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(commands / "python")]
    run([*pip, "install", "--no-compile", f"{peer.package}=={peer.version}", *peer.beside])
    if peer.package == "hf-mem":  # the Hub's address is fixed in its source
        for source in commands.parent.glob("lib/*/site-packages/hf_mem/**/*.py"):
            source.write_text(source.read_text().replace("https://huggingface.co", endpoint))
    return commands


def ask(peer: Peer, folder: Path, endpoint: str) -> float | str:
    """A peer's answer in GiB, or what kept it from giving one."""
    home = str(folder / "home")
    env = {"HF_ENDPOINT": endpoint, "HOME": home, "HF_HOME": home, "XDG_CACHE_HOME": home,
           "COLUMNS": "200", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}  # fmt: skip
    program, *arguments = [MDL if word == "MDL" else word for word in peer.command.split()]
    try:
        commands = install(peer, folder, endpoint)
    except subprocess.CalledProcessError as error:
        return f"not run: {complaint(error)}"
    try:
        return peer.read(run([str(commands / program), *arguments], cwd=folder, env=os.environ | env))
    except subprocess.CalledProcessError as error:
        return complaint(error)
    except FileNotFoundError:
        return f"not run: no {program} beside this interpreter"
    except (ValueError, KeyError, TypeError) as error:
        return f"not understood: {type(error).__name__}: {error}"


def run(command: list[str], **options: Any) -> str:
    """What a command prints. Raises CalledProcessError, after ten minutes too."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, **options)
    except subprocess.TimeoutExpired as error:
        raise subprocess.CalledProcessError(1, command, stderr="no answer in ten minutes") from error
    return str(ran.stdout)


def complaint(error: subprocess.CalledProcessError) -> str:
    """The line in which a program that failed says why."""
    lines: list[str] = (error.stderr or error.stdout).strip().splitlines() or [f"exit {error.returncode}"]
    return next((line for line in lines if re.match(r"[\w.]*(Error|ERROR)\b", line)), lines[-1])


def row(peer: Peer, answer: float | str) -> str:
    """One entry of the table; a 16 GB card holds the reference."""
    try:
        tool = f"{peer.package} {peer.version or version(peer.package)}"
    except PackageNotFoundError:
        tool = peer.package
    if isinstance(answer, str):
        return f"{tool:<22}{'-':>6}{'-':>8}  {'no answer':<22}{peer.command}\n{'':38}{answer[:100]}"
    deviation = answer / REFERENCE - 1
    direction = "too low" if deviation < 0 else "too high" if answer <= 16 else "above a 16 GB card"
    verdict = "right within 5 %" if abs(deviation) <= 0.05 else direction
    return f"{tool:<22}{answer:6.2f}{deviation:+8.1%}  {verdict:<22}{peer.command}"


def main() -> None:
    """Print the table."""
    with TemporaryDirectory() as temporary:
        folder, hub = Path(temporary), Path(temporary) / "hub"
        hub.mkdir()
        write_hub(hub)
        shutil.copyfile(hub / GGUF, folder / GGUF)
        begin = -(-(folder / GGUF).stat().st_size // 32) * 32
        os.truncate(folder / GGUF, begin + sum(gguf_nbytes(shape, type_) for _, shape, type_ in gguf_tensors()))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(hub)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"{'tool':<22}{'GiB':>6}{'off by':>8}  {'verdict':<22}asked\n{'llama.cpp, its log':<22}{REFERENCE:6.2f}")
        for peer in PEERS:
            print(row(peer, ask(peer, folder, f"http://127.0.0.1:{server.server_port}")), flush=True)
        server.shutdown()
    for tool, reason in NOT_RUN.items():
        print(f"{tool:<22}not run: {reason}")
    print(f"MDL is {MDL!r}")


if __name__ == "__main__":
    main()
