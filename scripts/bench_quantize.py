#!/usr/bin/env python3
"""Time `ossquant quantize` beside `cp`, its codec beside other libraries, and what it costs by layers and by shape.

    scripts/make_checkpoint.py 20b 20b
    scripts/make_checkpoint.py 20b-bf16 20b --layers 4 --form bf16
    scripts/bench_quantize.py 20b --bf16 20b-bf16 --scratch . --rounds 3      all parts
    scripts/bench_quantize.py 20b --parts codec
    scripts/bench_quantize.py --parts layers shapes --scratch . --layers 4,12,24

jobs     the commands beside `cp` of the same files, in turns; with --bf16 the way back to MXFP4, too
codec    one expert of CHECKPOINT, beside bitsandbytes' and compressed-tensors' own functions, in turns
layers   slices of the 20b, to NF4: seconds a layer, and how far from a straight line
shapes   the smallest slice of the 20b beside the same of the 120b, to NF4: peak memory

Slices are made in the --scratch folder one after the other, and removed; 24 layers take 27 GB while they are timed.
Before each command the page cache is dropped, where the system lets us, so that all read from the disk.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.codec.recode import Mxfp4Matrix, recode
from ossquant.layout import Role
from ossquant.quantize import read_matrix
from ossquant.scheme import INT4_GROUP, Scheme

OSSQUANT = str(Path(sys.executable).parent / "ossquant")
MAKE_CHECKPOINT = str(Path(__file__).with_name("make_checkpoint.py"))
SCHEMES = ("hybrid", "nf4", "int4")
SLICE_SUFFIX = " of the bf16 slice"
CODEC_ROUNDS = 7
PARTS = ("jobs", "codec", "layers", "shapes")

# A child's peak as wait4 tells it is never below the memory of the process that started it: so this small one does.
LAUNCH = """
import json, os, sys, time
null = os.open(os.devnull, os.O_WRONLY)
streams = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
started = time.monotonic()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=streams)
_, status, usage = os.wait4(pid, 0)
print(json.dumps({"status": status, "wall": time.monotonic() - started,
                  "cpu": usage.ru_utime + usage.ru_stime, "peak_rss": usage.ru_maxrss * 1024}))
"""

Run = dict[str, float]  # wall and CPU seconds, peak resident bytes, whether the page cache was dropped


def time_command(command: list[str], drop: Callable[[], bool] | None = None) -> Run:
    """Run a command and measure it, after dropping the page cache."""
    dropped = (drop or drop_page_cache)()
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    found: Run = json.loads(subprocess.run(launcher, check=True, capture_output=True).stdout)
    if found.pop("status"):
        raise SystemExit(f"{' '.join(command)} failed")
    return found | {"cold": float(dropped)}


def drop_page_cache() -> bool:
    """Have the next command read from the disk; only root may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def quantize_command(source: Path, output: Path, scheme: str) -> list[str]:
    """The command that is timed."""
    return [OSSQUANT, "quantize", str(source), str(output), "--scheme", scheme]


def time_jobs(source: Path, schemes: tuple[str, ...], rounds: int, suffix: str = "") -> dict[str, list[Run]]:
    """Copy and quantize a checkpoint in turns; each run by what it was."""
    output = source.with_name(f"{source.name}.timed")
    commands = {"cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(output)]} | {
        scheme: quantize_command(source, output, scheme) for scheme in schemes
    }
    runs: dict[str, list[Run]] = {name + suffix: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name + suffix].append(time_command(command))
            shutil.rmtree(output)
    return runs


def time_codec(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Each recoding of one expert beside another library's: million weights a second, and how many times faster.

    Ours is on one thread, the others as they come. The ratio is the median over rounds of one after the other.
    """
    entry = next(entry for entry in checkpoint.plan.tensors if entry.tensor.role is Role.EXPERTS)
    matrix = read_matrix(checkpoint, entry, 0)
    if not isinstance(matrix, Mxfp4Matrix):
        raise SystemExit("the codec is timed on a checkpoint in the published layout")
    rows = recode(matrix, Scheme("bf16"), "w")["w"]
    peers = codec_peers(rows)
    pairs: dict[str, tuple[Callable[[], Any], str]] = {
        "MXFP4 to NF4": (lambda: recode(matrix, Scheme("nf4"), "w"), "bitsandbytes NF4"),
        "bf16 to NF4": (lambda: recode(rows, Scheme("nf4"), "w"), "bitsandbytes NF4"),
        "bf16 to FP4": (lambda: recode(rows, Scheme("fp4"), "w"), "bitsandbytes FP4"),
        "bf16 to INT4": (lambda: recode(rows, Scheme("int4"), "w"), "compressed-tensors INT4"),
        "bf16 to MXFP4": (lambda: recode(rows, Scheme("mxfp4"), "w"), "compressed-tensors MXFP4"),
    }
    return [
        {"codec": name, "beside": peer} | compare(ours, peers[peer], rows.size) for name, (ours, peer) in pairs.items()
    ]


def codec_peers(rows: Any) -> dict[str, Callable[[], Any]]:
    """What other libraries do with the same bf16 matrix; transformers' MXFP4 needs Triton and is not among them."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=INT4_GROUP, symmetric=True)
    int4 = QuantizationScheme(targets=["Linear"], weights=args)

    def compress(compressor: Any, scheme: Any) -> Any:
        groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)

    return {
        "bitsandbytes NF4": lambda: quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        "bitsandbytes FP4": lambda: quantize_4bit(weight, quant_type="fp4", compress_statistics=True),
        "compressed-tensors INT4": lambda: compress(PackedQuantizationCompressor, int4),
        "compressed-tensors MXFP4": lambda: compress(
            MXFP4PackedCompressor, preset_name_to_scheme("MXFP4A16", ["Linear"])
        ),
    }


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], weights: int) -> dict[str, float]:
    """Call both in turns: median rates, and the median of the rounds' ratios."""
    ours(), theirs()  # compile
    taken = [(seconds(ours), seconds(theirs)) for _ in range(CODEC_ROUNDS)]
    return {
        "mweights_per_second": weights / statistics.median(mine for mine, _ in taken) / 1e6,
        "beside_mweights_per_second": weights / statistics.median(other for _, other in taken) / 1e6,
        "ratio": statistics.median(other / mine for mine, other in taken),
    }


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def made_slice(scratch: Path, size: str, layers: int) -> Iterator[Path]:
    """A checkpoint of the first layers of a published shape, in a folder that goes with it."""
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix="slice-") as folder:
        source = Path(folder) / f"{size}-{layers}"
        command = [sys.executable, MAKE_CHECKPOINT, str(source), size, "--layers", str(layers)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        yield source


def time_slice(scratch: Path, size: str, layers: int, rounds: int) -> list[Run]:
    """Quantize a slice of a shape to NF4."""
    runs = []
    with made_slice(scratch, size, layers) as source:
        output = source.with_name("output")
        for _ in range(rounds):
            runs.append(time_command(quantize_command(source, output, "nf4")))
            shutil.rmtree(output)
    return runs


def by_layers(runs: dict[int, list[Run]], figure: str) -> dict[str, float]:
    """The straight line through a figure's medians by the number of layers: slope, start, and the worst distance."""
    layers, found = np.array(list(runs)), np.array([median(each, figure) for each in runs.values()])
    slope, start = np.polyfit(layers, found, 1)
    residual = np.abs(slope * layers + start - found) / found
    return {"per_layer": float(slope), "start": float(start), "worst_residual": float(residual.max())}


def median(runs: list[Run], figure: str) -> float:
    """The median of one figure."""
    return statistics.median(run[figure] for run in runs)


def peak(runs: list[Run]) -> float:
    """The largest peak of memory."""
    return max(run["peak_rss"] for run in runs)


def print_jobs(runs: dict[str, list[Run]]) -> None:
    """One line a command."""
    print(f"{'':24}{'wall s':>10}{'beside cp':>12}{'CPU s':>8}{'peak RSS MB':>13}   all walls")
    for name, measured in runs.items():
        beside = runs["cp" + SLICE_SUFFIX if name.endswith(SLICE_SUFFIX) else "cp"]
        ratio = statistics.median(run["wall"] / base["wall"] for run, base in zip(measured, beside, strict=True))
        walls = " ".join(f"{run['wall']:.1f}" for run in measured)
        print(
            f"{name:24}{median(measured, 'wall'):10.1f}{ratio:12.2f}{median(measured, 'cpu'):8.1f}"
            f"{peak(measured) / 1e6:13.0f}   {walls}"
        )


def print_codec(compared: list[dict[str, Any]]) -> None:
    """One line a recoding."""
    print(f"\n{'':24}{'M weights/s':>12}{'times':>8}   beside")
    for each in compared:
        beside = f"{each['beside']}, {each['beside_mweights_per_second']:.1f} M weights/s"
        print(f"{each['codec']:24}{each['mweights_per_second']:12.0f}{each['ratio']:8.1f}   {beside}")


def print_slices(slices: dict[str, dict[int, list[Run]]], fits: dict[str, dict[str, float]]) -> None:
    """One line a slice, and the straight lines through those of the 20b."""
    print(f"\n{'layers, to nf4':24}{'wall s':>10}{'a layer':>10}{'CPU s':>8}{'a layer':>10}{'peak RSS MB':>13}")
    for size, by_count in slices.items():
        for layers, runs in by_count.items():
            wall, cpu = median(runs, "wall"), median(runs, "cpu")
            print(
                f"{f'{layers} of the {size}':24}{wall:10.1f}{wall / layers:10.2f}{cpu:8.1f}{cpu / layers:10.2f}"
                f"{peak(runs) / 1e6:13.0f}"
            )
    for figure, line in fits.items():
        print(
            f"{figure} s = {line['start']:.2f} + {line['per_layer']:.3f} a layer, "
            f"off by {line['worst_residual']:.1%} at most"
        )


def measure_jobs(source: Path, bf16: Path | None, rounds: int) -> dict[str, Any]:
    """The jobs part."""
    runs = time_jobs(source, SCHEMES, rounds)
    if bf16:
        runs |= time_jobs(bf16, ("mxfp4",), rounds, SLICE_SUFFIX)
    print_jobs(runs)
    return {"runs": runs}


def measure_codec(source: Path) -> dict[str, Any]:
    """The codec part."""
    with open_checkpoint(source) as checkpoint:
        compared = time_codec(checkpoint)
    print_codec(compared)
    return {"codec": compared}


def measure_slices(scratch: Path, layers: list[int], rounds: int, shapes: bool) -> dict[str, Any]:
    """The layers part, and with shapes the smallest slice of the 120b; each slice is made once."""
    slices = {"20b": {count: time_slice(scratch, "20b", count, rounds) for count in layers}}
    if shapes:
        slices["120b"] = {layers[0]: time_slice(scratch, "120b", layers[0], rounds)}
    fits = {figure: by_layers(slices["20b"], figure) for figure in ("wall", "cpu")} if len(layers) > 2 else {}
    print_slices(slices, fits)
    found: dict[str, Any] = {"slices": slices, "by_layers": fits}
    if shapes:
        ratio = peak(slices["120b"][layers[0]]) / peak(slices["20b"][layers[0]])
        print(f"peak RSS of the 120b's slice: {ratio:.2f} times that of the 20b's")
        found["peak_rss_120b_to_20b"] = ratio
    return found


def layer_counts(text: str) -> list[int]:
    """Read `4,12,24`, smallest first."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not like 4,12,24")
    return sorted({int(word) for word in text.split(",")})


def parse_arguments() -> argparse.Namespace:
    """Read the command line; without --parts everything whose folder is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="in the published layout, for jobs and codec")
    parser.add_argument("--bf16", type=Path, help="a checkpoint in bf16, for the way back to MXFP4")
    parser.add_argument("--scratch", type=Path, help="a folder for slices, on the disk to measure; layers and shapes")
    parser.add_argument("--layers", type=layer_counts, default=[4, 12, 24], help="4,12,24 if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    arguments = parser.parse_args()
    source, scratch = arguments.checkpoint, arguments.scratch
    has = {"jobs": source, "codec": source, "layers": scratch, "shapes": scratch}
    arguments.parts = arguments.parts or [part for part in PARTS if has[part]]
    lacking = [part for part in arguments.parts if not has[part]]
    if lacking or not arguments.parts:
        parser.error(f"{lacking[0] if lacking else 'nothing to do'}: name a CHECKPOINT, or --scratch for slices")
    if arguments.rounds < 1:
        parser.error("--rounds is at least 1")
    return arguments


def main() -> None:
    """Measure the parts asked for, print a table of each and one JSON object."""
    arguments = parse_arguments()
    parts, found = arguments.parts, {"cores": os.cpu_count()}
    if "jobs" in parts:
        found |= measure_jobs(arguments.checkpoint, arguments.bf16, arguments.rounds)
    if "codec" in parts:
        found |= measure_codec(arguments.checkpoint)
    if "layers" in parts or "shapes" in parts:
        layers = arguments.layers if "layers" in parts else arguments.layers[:1]
        found |= measure_slices(arguments.scratch, layers, arguments.rounds, "shapes" in parts)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
