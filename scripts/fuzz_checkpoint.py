#!/usr/bin/env python3
"""Damage a sound checkpoint in every way we can think of, and see that ossquant reads it or says what is wrong.

    scripts/fuzz_checkpoint.py --seconds 600
    scripts/fuzz_checkpoint.py --seed 1234 --seconds 0     one case again, with its traceback

A case is one seed: some damage to the small trained model in one of its forms, which is then opened, planned,
quantized and verified. A failure is any exception but ossquant's own, a message that steers a terminal, an output
folder left to look whole, damage that must be seen and is not, more than a second of CPU time to open or to verify, or
more than 300 MB of memory.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from ossquant.checkpoint.manifest import MANIFEST, read_manifest
from ossquant.checkpoint.reader import CHECKPOINT_SUFFIXES, INDEX, open_checkpoint
from ossquant.errors import CheckpointError, OssquantError
from ossquant.quantize import quantize
from ossquant.recipe import BUILT_IN
from ossquant.verify import verify

TRAINED = Path(__file__).parent.parent / "tests/data/tiny"
SECONDS, EXTRA_BYTES = 1.0, 300 * 10**6
PATIENCE = 30.0  # seconds without an answer after which a case hangs
ADDRESS_SPACE = 2 * 2**30  # more than a case begins with; threads reserve much that they never touch
WEIGHTS = ".safetensors"
NUMBERS = [0, -1, 1, 2, 7, 255, 2**16, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e300]
TEXTS = ["", "U8", "BF16", "F32", "F64", "I4", "../a.safetensors", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800",
         "é" * 250, "x" * 10**5, "model.safetensors", "mxfp4", "ossquant"]  # fmt: skip
DTYPES = ["U8", "BF16", "F16", "F32", "F64", "I32", "I64", "BOOL", "F8_E8M0", "bf16", "F4"]
BOMBS = [b"{},", b"[],", b"0,", b'"",', b'{"a":0},', b"[[0]],", b"1e9,", "\U0001f600".encode(), b"\\u1234", b"9", b" ",
         b'"a":0,']  # fmt: skip


@dataclass
class Case:
    """A checkpoint's files, to be damaged; links are written after them."""

    rng: random.Random
    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    must_fail: str = ""  # why it may not be taken for sound
    hashed: frozenset[str] = frozenset()  # files beside the weights that verify must find changed

    def any_file(self, suffix: str = "") -> str:
        """The name of one of the files."""
        return self.rng.choice(sorted(name for name in self.files if name.endswith(suffix)))

    def write(self, folder: Path) -> None:
        """Write what there is."""
        folder.mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for name, target in self.links.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its data; an empty header if it is damaged already."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return {}, data
    return (header, data[8 + length :]) if isinstance(header, dict) else ({}, data)


def join(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """Some JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(TEXTS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [None, True, float("nan"), rng.choice(NUMBERS), rng.choice(TEXTS), rng.randrange(1000)][kind]


def change_tree(rng: random.Random, value: Any) -> Any:
    """Change something somewhere inside a JSON value."""
    if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return any_value(rng)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], change_tree(rng, value[place]), *value[place + 1 :]]
    key = rng.choice(list(value))
    kind = rng.randrange(6)
    if kind == 0:
        return {name: inner for name, inner in value.items() if name != key}
    if kind == 1:
        return {rng.choice(TEXTS) if name == key else name: inner for name, inner in value.items()}
    return value | {key: change_tree(rng, value[key])}


def header_length(case: Case) -> None:
    """The first eight bytes lie."""
    name = case.any_file(WEIGHTS)
    length = case.rng.choice([0, 1, 7, 2**20, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, len(case.files[name])])
    case.files[name] = length.to_bytes(8, "little") + case.files[name][8:]


def header_entry(case: Case) -> None:
    """One tensor's entry lies: offsets, shape, dtype, or its name."""
    name = case.any_file(WEIGHTS)
    header, data = split(case.files[name])
    tensors = [key for key, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if not tensors:
        return
    key, other = case.rng.choice(tensors), case.rng.choice(tensors)
    entry = dict(header[key])
    shift = case.rng.choice([1, -1, 16, 2**31, 2**62, -(2**40)])
    changes: list[dict[str, Any]] = [
        {"data_offsets": header[other].get("data_offsets")},
        {"data_offsets": [case.rng.choice(NUMBERS), case.rng.choice(NUMBERS)]},
        {"data_offsets": [offset + shift for offset in entry.get("data_offsets", []) if isinstance(offset, int)]},
        {"shape": [case.rng.choice(NUMBERS) for _ in range(case.rng.randrange(10))]},
        {"shape": [2**40, 2**40]},
        {"dtype": case.rng.choice(DTYPES)},
        {"dtype": header[other].get("dtype"), "shape": header[other].get("shape")},
        {"extra": 1},
    ]
    header[key] = entry | case.rng.choice(changes)
    case.files[name] = join(json.dumps(header).encode(), data)


def json_tree(case: Case) -> None:
    """Something in a JSON file or a header is another value, gone, or renamed."""
    name = case.rng.choice(["config.json", INDEX, MANIFEST, case.any_file(WEIGHTS)])
    if name not in case.files:
        return
    if name.endswith(WEIGHTS):
        header, data = split(case.files[name])
        case.files[name] = join(json.dumps(change_tree(case.rng, header)).encode(), data)
        return
    try:
        value = json.loads(case.files[name])
    except (ValueError, RecursionError):
        return
    case.files[name] = json.dumps(change_tree(case.rng, value)).encode()


def duplicate_key(case: Case) -> None:
    """A key stands there twice."""
    name = case.rng.choice(["config.json", *([INDEX] if INDEX in case.files else []), case.any_file(WEIGHTS)])
    text, data = case.files[name], b""
    if name.endswith(WEIGHTS):
        header, data = split(text)
        text = json.dumps(header).encode()
    begin = text.find(b'"')
    end = text.find(b'"', begin + 1) + 1
    if begin < 0 or not text.startswith(b"{"):
        return
    twice = b"{" + text[begin:end] + b": 0, " + text[1:]
    case.files[name] = join(twice, data) if name.endswith(WEIGHTS) else twice
    case.must_fail = "a key stands twice"


def index_path(case: Case) -> None:
    """The index names a file that is not beside it."""
    if INDEX not in case.files:
        return
    try:
        table = json.loads(case.files[INDEX])
        key = case.rng.choice(sorted(table["weight_map"]))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    outside = ["../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "..", "\0.safetensors",
               "é" * 200 + WEIGHTS, f"x{WEIGHTS}/../../y{WEIGHTS}"]  # fmt: skip
    table["weight_map"][key] = case.rng.choice(outside)
    case.files[INDEX] = json.dumps(table).encode()
    case.must_fail = "the index leads out of the folder"


def flip_bytes(case: Case) -> None:
    """Some bytes of a file change."""
    name = case.any_file()
    data = bytearray(case.files[name])
    reach = len(data) if case.rng.random() < 0.3 else min(len(data), 8192)
    for _ in range(case.rng.choice([1, 2, 30]) if reach else 0):
        data[case.rng.randrange(reach)] = case.rng.randrange(256)
    case.files[name] = bytes(data)


def truncate(case: Case) -> None:
    """A file ends early."""
    name = case.any_file()
    case.files[name] = case.files[name][: case.rng.randrange(len(case.files[name]) or 1)]
    if name.endswith(WEIGHTS):
        case.must_fail = "a file is truncated"


def extend(case: Case) -> None:
    """A file goes on after its end."""
    name = case.any_file()
    case.files[name] += case.rng.randbytes(case.rng.choice([1, 4096]))
    if name.endswith(WEIGHTS):
        case.must_fail = "a file is longer than its header says"


def bomb(case: Case) -> None:
    """A file or a header is small on disk and large in memory."""
    name = case.rng.choice(["config.json", INDEX, MANIFEST, case.any_file(WEIGHTS)])
    item = case.rng.choice(BOMBS)
    count = int(10 ** case.rng.uniform(3, 7.6)) // len(item)
    if item == b'"a":0,':
        text = b"{" + b",".join(b'"%x":0' % i for i in range(min(count, 10**6))) + b"}"
    else:
        begin, end = (b'{"a":"', b'"}') if item[-1:] != b"," and item not in (b"9", b" ") else (b'{"a":[', b"0]}")
        text = begin + item * count + end
    case.files[name] = join(text, b"") if name.endswith(WEIGHTS) else text
    case.must_fail = "a bomb"


def nest(case: Case) -> None:
    """A value is nested about as deep as Python follows."""
    begin, end = case.rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    depth = case.rng.choice([case.rng.randrange(900, 1010), 10**5])
    key = case.rng.choice([b"model_type", b"vocab_size", b"layer_types", b"new", b"quantization_config"])
    name = case.rng.choice(["config.json", *([INDEX] if INDEX in case.files else [])])
    text = case.files[name].rstrip()
    if text.endswith(b"}"):
        case.files[name] = text[:-1] + b',"' + key + b'":' + begin * depth + b"1" + end * depth + b"}"


def link(case: Case) -> None:
    """A file is a link: out of the folder, to itself, to a folder or a device."""
    name = case.any_file()
    case.links[name] = case.rng.choice(["../outside", "/etc/passwd", "/dev/zero", name, ".", "..", "nowhere", "/"])
    if case.links[name] != "nowhere":  # a side file may be a link to nothing, and is left out
        case.must_fail = "a link out of the folder"


def bad_weights(case: Case) -> None:
    """NaN or infinity in bf16 experts or attention, a scale of 255 in MXFP4."""
    name = case.any_file(WEIGHTS)
    header, data = split(case.files[name])
    kinds = {"_scales": b"\xff", "_proj.weight": b"\xc0\x7f", "_proj": case.rng.choice([b"\x80\x7f", b"\x80\xff"])}
    suffix = case.rng.choice(sorted(kinds))
    found = sorted(key for key in header if key.endswith(suffix))
    if not found:
        return
    key = case.rng.choice(found)
    entry = header[key]
    if not isinstance(entry, dict) or entry.get("dtype") not in ("U8", "BF16"):
        return
    item = kinds[suffix]
    begin, end = entry["data_offsets"]
    place = case.rng.randrange(begin, end) // len(item) * len(item)
    damaged = data[:place] + item + data[place + len(item) :]
    case.files[name] = join(json.dumps(header).encode(), damaged)


DAMAGES: list[Callable[[Case], None]] = [
    header_length, header_entry, header_entry, header_entry, json_tree, json_tree, json_tree, duplicate_key, index_path,
    flip_bytes, flip_bytes, truncate, extend, bomb, nest, link, bad_weights, bad_weights,
]  # fmt: skip


def make_case(seed: int, forms: dict[str, dict[str, bytes]]) -> tuple[Case, str]:
    """The case of a seed, and the form it began as with what was done to it."""
    rng = random.Random(seed)  # noqa: S311  not a secret
    form = rng.choice(sorted(forms))
    hashed = json.loads(forms[form].get(MANIFEST, b"{}")).get("side_files", ())
    case = Case(rng, dict(forms[form]), hashed=frozenset(hashed))
    damages = rng.sample(DAMAGES, rng.choice([1, 1, 1, 2, 3]))
    for damage in damages:
        damage(case)
    if len(damages) > 1:
        case.must_fail = ""  # the second may have undone the first
    changed = {name for name, data in forms[form].items() if case.files[name] != data} | case.links.keys()
    case.hashed = case.hashed & changed if MANIFEST not in changed else frozenset()
    return case, f"{form}: {', '.join(damage.__name__ for damage in damages)}"


def run_case(seed: int, forms: dict[str, dict[str, bytes]]) -> str:
    """Run a case; gives its outcome. Raises AssertionError, or whatever went through, for a failure."""
    case, _ = make_case(seed, forms)
    with TemporaryDirectory(prefix="fuzz") as parent:
        folder, output = Path(parent) / "model", Path(parent) / "output"
        (Path(parent) / "outside").write_bytes(case.files["config.json"])
        case.write(folder)
        recipe = BUILT_IN[case.rng.choice(sorted(BUILT_IN))]
        size = case.rng.choice([10**5, 10**6, 10**9])
        del case.files
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        outcomes = [
            _step(lambda: _open(folder)),
            _step(lambda: _verify(folder)),
            _step(lambda: quantize(folder, output, recipe, max_shard_size=size)),
        ]
        extra = _memory("VmHWM") - before
        assert extra < EXTRA_BYTES, f"{extra / 1e6:.0f} MB of memory"
        whole = (output / "config.json").exists()
        assert whole == (outcomes[2] == "sound"), f"the output looks {'' if whole else 'not '}whole: {outcomes}"
        assert not (case.hashed and outcomes[1] == "sound"), f"unseen by verify: {', '.join(case.hashed)}"
        assert not (case.must_fail and outcomes[0] == "sound" and outcomes[2] == "sound"), f"unseen: {case.must_fail}"
        return next((outcome for outcome in outcomes if outcome != "sound"), "sound")


def _open(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.plan.nbytes > 0
        read_manifest(folder)


def _verify(folder: Path) -> None:
    report = verify(folder)
    if not report.whole:
        raise CheckpointError(f"{report.faults[0].file}: {report.faults[0].kind}")


def _step(action: Callable[[], object]) -> str:
    """Do it within a second; gives the name of ossquant's error, or sound."""
    started, outcome = time.process_time(), "sound"
    try:
        action()
    except OssquantError as error:
        outcome = type(error).__name__
        assert str(error).isprintable() and len(str(error)) < 1000, ascii(str(error))
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"{seconds:.2f} s"
    return outcome


def _memory(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field_name)))


def work(pipe: Connection, forms: dict[str, dict[str, bytes]]) -> None:
    """Answer seeds with outcomes, in a process of bounded memory."""
    limit = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        seed = pipe.recv()
        try:
            pipe.send((run_case(seed, forms), ""))
        except Exception:  # noqa: BLE001  that nothing else is raised is what is tested
            pipe.send(("FAILED", traceback.format_exc(limit=-4)))


class Worker:
    """A process that runs cases, and is replaced when it dies or hangs."""

    def __init__(self, forms: dict[str, dict[str, bytes]]) -> None:
        self.forms = forms
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(theirs, self.forms), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, seed: int) -> tuple[str, str]:
        """The outcome of a case, and its traceback if it failed."""
        self.pipe.send(seed)
        try:
            if self.pipe.poll(PATIENCE):
                outcome: tuple[str, str] = self.pipe.recv()
                return outcome
            reason = f"no answer in {PATIENCE:.0f} s"
        except EOFError:
            reason = "the process died"
        self.process.kill()
        self.process.join()
        self._start()
        return "FAILED", reason


def make_forms(folder: Path) -> dict[str, dict[str, bytes]]:
    """The trained model as published and in other forms, as files in memory."""
    for name in ("bf16", "hybrid", "nf4", "int4"):
        quantize(TRAINED, folder / name, BUILT_IN[name], max_shard_size=10**6 if name != "hybrid" else 10**9)
    for name in ("mxfp4", "nf4", "int4", "hybrid"):  # compile what cases will run
        quantize(folder / "bf16", folder / "again", BUILT_IN[name])
        verify(folder / "again")
        rmtree(folder / "again")
    return {
        place.name: {path.name: path.read_bytes() for path in place.iterdir() if path.suffix in CHECKPOINT_SUFFIXES}
        for place in (TRAINED, *(folder / name for name in ("bf16", "hybrid", "nf4", "int4")))
    }


def fuzz(first: int, seconds: float, forms: dict[str, dict[str, bytes]]) -> tuple[Counter[str], int]:
    """Run cases from the first seed on, one at least; gives the outcomes and how many failed."""
    worker, outcomes, until = Worker(forms), Counter[str](), time.monotonic() + seconds
    seed = first
    while seed == first or time.monotonic() < until:
        outcome, why = worker.run(seed)
        outcomes[outcome] += 1
        if why:
            print(f"seed {seed} failed, {make_case(seed, forms)[1]}\n{why}", flush=True)
        seed += 1
    worker.process.kill()
    return outcomes, outcomes["FAILED"]


def main() -> None:
    """Fuzz, and count; exit 1 on failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each next one has the next number")
    arguments = parser.parse_args()
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    with TemporaryDirectory() as folder:
        forms = make_forms(Path(folder))
    outcomes, failures = fuzz(arguments.seed, arguments.seconds, forms)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{outcomes.total()} cases from seed {arguments.seed}: {counts}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
