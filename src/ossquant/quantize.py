"""Carry a checkpoint from the form it has to the form a recipe asks for: read, code, write, piece by piece."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ossquant.checkpoint.manifest import MANIFEST, is_side_file, make_manifest
from ossquant.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from ossquant.checkpoint.writer import CheckpointWriter, TensorWriter, plan_shards
from ossquant.codec import bnb4, mxfp4
from ossquant.codec.recode import Matrix, Mxfp4Matrix, recode
from ossquant.errors import CheckpointError, UnsupportedError, UsageError
from ossquant.jobs import Job, Progress, nothing, run_jobs
from ossquant.layout import Role
from ossquant.plan import QUANTIZED, Plan, TensorPlan, make_plan
from ossquant.recipe import BF16, Recipe
from ossquant.rope import Rope
from ossquant.scheme import INT4_GROUP, Scheme, StoredTensor

DEFAULT_SHARD_SIZE = 5 * 10**9  # as the hub's tools split
COPY_BYTES = 8 * 2**20
WEIGHTS_AT_ONCE = 8 * 2**20  # of a matrix that is no expert
STACKED = ("bf16", "mxfp4")  # formats that keep all experts of a layer in one tensor

# codes all that a writer needs, adds up the loss, gives the CPU seconds that other processes took
Run = Callable[[Checkpoint, Plan, CheckpointWriter, "Loss", Progress | None], float]


class Loss:
    """Adds up, from any thread, what rounding to MXFP4 lost: sums of squared errors and of squared weights."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.error = self.norm = 0.0

    def add(self, error: float, norm: float) -> None:
        """Add the sums of a part."""
        with self._lock:
            self.error += error
            self.norm += norm

    @property
    def relative(self) -> float | None:
        """The relative Frobenius norm, None if nothing was rounded."""
        return math.sqrt(self.error / self.norm) if self.norm else None


def run_here(
    checkpoint: Checkpoint, plan: Plan, writer: TensorWriter, loss: Loss, progress: Progress | None, cores: int = 0
) -> float:
    """Code all that the writer needs by threads of this process, for so many cores, or the machine's; see Run."""
    run_jobs(_jobs(checkpoint, plan, writer, loss), checkpoint.plan.nbytes, progress, cores)
    return 0.0


@dataclass(frozen=True)
class QuantizeReport:
    """What was done: plans of source and result, and what it took.

    mxfp4_error is what rounding bf16 experts to MXFP4 lost, a relative Frobenius norm, 0.0 if they were MXFP4
    values already; None if none were rounded in this run.
    """

    source: Plan
    result: Plan
    output: Path
    files: int
    resumed: bool
    seconds: float
    cpu_seconds: float
    mxfp4_error: float | None

    @property
    def bytes_per_second(self) -> float:
        """Source bytes a second, over the whole job."""
        return self.source.nbytes / self.seconds


def quantize(
    source: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
    run: Run = run_here,
    open_source: Callable[[str | Path], Checkpoint] = open_checkpoint,
) -> QuantizeReport:
    """Write SOURCE as recipe has it into the folder OUTPUT, which appears whole or not at all.

    An interrupted job goes on where it stopped when it is run again. Raises UsageError, CheckpointError,
    DoesNotFitError.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    with open_source(source) as checkpoint:
        check_output(output, checkpoint.folder)
        plan = plan_quantize(checkpoint, recipe)
        shards = plan_shards(plan, max_shard_size)
        with CheckpointWriter(output, shards, identity(checkpoint), force=force) as writer:
            resumed = writer.resumed
            loss = Loss()
            cpu_elsewhere = run(checkpoint, plan, writer, loss, progress)
            manifest = make_manifest(checkpoint, source_name(source), recipe.name, plan, writer.tensors)
            writer.commit(output_config(checkpoint.config, plan), plan.nbytes, side_files(checkpoint.folder), manifest)
        return QuantizeReport(
            source=checkpoint.plan,
            result=plan,
            output=output,
            files=len(shards),
            resumed=resumed,
            seconds=time.monotonic() - started,
            cpu_seconds=time.process_time() - cpu_started + cpu_elsewhere,
            mxfp4_error=loss.relative,
        )


def plan_quantize(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan of the result. Raises UnsupportedError if the source is quantized to NF4, FP4 or INT4 already."""
    for total in checkpoint.plan.by_role():
        wanted = recipe.scheme(total.role)
        if total.scheme.format not in ("bf16", "mxfp4") and wanted != total.scheme:
            raise UnsupportedError(
                f"{checkpoint.folder}: its {total.role} are {total.scheme.format} already",
                hint="quantize from the published or the bf16 checkpoint it was made of",
            )
    return make_plan(checkpoint.spec, recipe)


def output_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The source's config.json with the result's quantization_config in place of its own.

    A mix that stock transformers does not know gets a quant_method of ours, so that it refuses the
    checkpoint instead of loading random weights.
    """
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if "rope_parameters" in result and "rope_theta" not in result:
        # transformers 5 saves it so; other servers know the published keys alone, and mlx-lm would go without YaRN
        rope = Rope.from_config({"rope_parameters": result.pop("rope_parameters"), **result})
        result |= rope.published()
    experts = plan.scheme(Role.EXPERTS)
    if plan.unsloth:
        result["quantization_config"] = bitsandbytes_config(plan.scheme(Role.EXPERTS))
    elif plan.has_bnb:
        result["quantization_config"] = quantization_config(*(plan.scheme(role) for role in QUANTIZED))
    elif experts.format == "int4":
        result["quantization_config"] = compressed_tensors_config()
    elif experts.format == "mxfp4":
        result["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                       "model.embed_tokens", "lm_head"],
        }  # fmt: skip
    return result


def compressed_tensors_config() -> dict[str, Any]:
    """The quantization_config of INT4 experts as vLLM asks for it.

    vLLM 0.32 calls attention `attn` by the time it looks at `ignore`, and does not translate patterns.
    Source: compressed-tensors 0.20.
    """
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT4_GROUP,
               "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
               "observer_kwargs": {}}  # fmt: skip
    group = {"targets": ["Linear"], "format": "pack-quantized", "input_activations": None,
             "output_activations": None, "weights": weights}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": group},
        "ignore": ["re:.*attn.*", "re:.*router.*", "re:.*embed.*", "lm_head"],
    }


def bitsandbytes_config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a checkpoint for unsloth: plain bitsandbytes, which does not say what experts are.

    Source: transformers 5.23's BitsAndBytesConfig; unsloth 2026.10 leaves router and lm_head in 16 bits.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.format,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "router"],
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def quantization_config(experts: Scheme, attention: Scheme, lm_head: Scheme = BF16) -> dict[str, Any]:
    """The quantization_config of a checkpoint of ours."""
    config = {
        "quant_method": "ossquant",
        "format_version": 1,
        "experts": experts.table(),
        "attention": attention.table(),
    }
    return config if lm_head == BF16 else config | {"lm_head": lm_head.table()}


def side_files(folder: Path) -> list[Path]:
    """What stands beside the weights and is copied verbatim: generation config, tokenizer, chat template."""
    replaced = {"config.json", INDEX, MANIFEST}
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.name not in replaced and is_side_file(path.name)
    )


def check_output(output: Path, source: Path) -> None:
    """Raise UsageError for an OUTPUT that is the source, or inside of it."""
    inside = output.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise UsageError(f"{output} lies inside the source", hint="choose an OUTPUT outside of it")


def source_name(source: str | Path) -> str:
    """What a folder or a hub id is called, without what a terminal or a manifest would not take."""
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)
    return "".join(c if c.isprintable() else "-" for c in name)[:200] or "checkpoint"


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What makes a job the same as one before: the source's files and config, and our version."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.files]
    config = hashlib.sha256(repr(sorted(checkpoint.config.items())).encode()).hexdigest()
    return {"files": files, "config": config, "origin": checkpoint.origin, "ossquant": version("ossquant")}


def _jobs(checkpoint: Checkpoint, plan: Plan, writer: TensorWriter, loss: Loss) -> Iterator[Job]:
    """List the pieces in the plan's order; those of finished files count, but do nothing."""
    for old, new in zip(checkpoint.plan.tensors, plan.tensors, strict=True):
        if not any(writer.needs(part.name) for part in new.stored):
            yield Job(old.nbytes, nothing)
        elif _only_named_anew(old, new):
            yield from _copies(checkpoint, old, new, writer)
        elif new.tensor.role is Role.EXPERT_BIAS:
            yield Job(old.nbytes, partial(_split_bias, checkpoint, old, new, writer))
        elif new.tensor.numel > WEIGHTS_AT_ONCE and len(new.tensor.shape) == 2:
            yield from _LargeMatrix(checkpoint, old, new, writer).jobs()
        else:
            experts = range(new.tensor.shape[0]) if new.tensor.role is Role.EXPERTS else [None]
            for expert in experts:
                needed = any(writer.needs(part.name) for part in _parts(new, expert))
                job = partial(_convert, checkpoint, old, new.scheme, expert, writer, loss) if needed else nothing
                yield Job(old.nbytes // len(experts), job)


def _only_named_anew(old: TensorPlan, new: TensorPlan) -> bool:
    """Whether the bytes stay as they are."""
    return old.stored == (new if old.unsloth == new.unsloth else replace(new, unsloth=old.unsloth)).stored


def _parts(entry: TensorPlan, expert: int | None) -> Sequence[StoredTensor]:
    """The stored tensors that one expert goes to; all, if it is none or they are stacks."""
    if expert is None or entry.scheme.format in STACKED:
        return entry.stored
    each = len(entry.stored) // entry.tensor.shape[0]  # they lie expert by expert
    return entry.stored[expert * each : (expert + 1) * each]


def _copies(checkpoint: Checkpoint, old: TensorPlan, new: TensorPlan, writer: TensorWriter) -> Iterator[Job]:
    for source, part in zip(old.stored, new.stored, strict=True):
        if checkpoint.stored[source.name].nbytes != part.nbytes:
            yield Job(part.nbytes, partial(_copy_state, checkpoint, part, writer))
            continue
        for offset in range(0, part.nbytes, COPY_BYTES):
            nbytes = min(COPY_BYTES, part.nbytes - offset)
            yield Job(nbytes, partial(_copy, checkpoint, source.name, part.name, offset, nbytes, writer))


def _copy(checkpoint: Checkpoint, source: str, name: str, offset: int, nbytes: int, writer: TensorWriter) -> None:
    if writer.needs(name):
        buffer = memoryview(bytearray(nbytes))
        checkpoint.read_into(source, buffer, offset)
        _check_copied(checkpoint.stored[source], buffer)
        writer.write(name, buffer, offset, piece=COPY_BYTES)


def _check_copied(part: StoredTensor, buffer: memoryview) -> None:
    """Refuse in what is copied what would be refused in what is coded: NaN, infinity, a scale beyond bf16."""
    if part.name.endswith("_scales"):
        mxfp4.check_scales(np.frombuffer(buffer, np.uint8), part.name)
    elif part.dtype == "BF16":
        mxfp4.check_finite(np.frombuffer(buffer, np.uint16), part.name)


def _copy_state(checkpoint: Checkpoint, part: StoredTensor, writer: TensorWriter) -> None:
    """Copy a quant_state that another program wrote, to our length."""
    raw = bytearray(checkpoint.stored[part.name].nbytes)
    checkpoint.read_into(part.name, memoryview(raw))
    state = bytes(raw).strip()
    if len(state) > part.nbytes:
        raise CheckpointError(f"'{part.name}' is {len(state)} bytes, longer than any quant state",
                              hint="quantize again from the checkpoint it was made of")  # fmt: skip
    if writer.needs(part.name):
        writer.write(part.name, memoryview(state.ljust(part.nbytes)))


def _convert(
    checkpoint: Checkpoint, old: TensorPlan, scheme: Scheme, expert: int | None, writer: TensorWriter, loss: Loss
) -> None:
    source = read_matrix(checkpoint, old, expert)
    parts = recode(source, scheme, old.tensor.name, expert)
    counts = writer.needs(next(iter(parts)))  # once, for blocks and scales may go to different files
    if scheme.format == "mxfp4" and counts and not isinstance(source, Mxfp4Matrix):
        loss.add(*mxfp4.squared_error(source, *parts.values()))
    stacked = expert is not None and scheme.format in STACKED
    for name, part in parts.items():
        if writer.needs(name):
            offset = (expert or 0) * part.nbytes if stacked else 0
            writer.write(name, _bytes(part), offset, piece=part.nbytes)


class _LargeMatrix:
    """A matrix that is coded some rows at a time: the codes are written as they come, the statistics at the end."""

    def __init__(self, checkpoint: Checkpoint, old: TensorPlan, new: TensorPlan, writer: TensorWriter) -> None:
        self.checkpoint, self.old, self.new, self.writer = checkpoint, old, new, writer
        self.rows, self.columns = new.tensor.shape
        self.at_once = max(1, WEIGHTS_AT_ONCE // self.columns)
        self.absmax = np.empty(new.tensor.numel // new.scheme.block_size, np.float32)
        self.left = -(-self.rows // self.at_once)
        self.lock = threading.Lock()

    def jobs(self) -> Iterator[Job]:
        for first in range(0, self.rows, self.at_once):
            rows = min(self.at_once, self.rows - first)
            yield Job(2 * rows * self.columns, partial(self._convert, first, rows))

    def _convert(self, first: int, rows: int) -> None:
        name, scheme = self.new.tensor.name, self.new.scheme
        bits = np.empty((rows, self.columns), np.uint16)
        self.checkpoint.read_into(name, _bytes(bits), 2 * first * self.columns)
        codes, absmax = bnb4.encode(bits, scheme, name)
        blocks = self.columns // scheme.block_size
        self.absmax[first * blocks : (first + rows) * blocks] = absmax
        if self.writer.needs(name):
            self.writer.write(name, _bytes(codes), first * self.columns // 2, piece=self.at_once * self.columns // 2)
        with self.lock:
            self.left -= 1
            last = not self.left
        if last:
            for suffix, part in bnb4.statistics(self.absmax, scheme, (self.rows, self.columns), name).items():
                if self.writer.needs(name + suffix):
                    self.writer.write(name + suffix, _bytes(part))


def _split_bias(checkpoint: Checkpoint, old: TensorPlan, new: TensorPlan, writer: TensorWriter) -> None:
    biases = bytearray(old.nbytes)
    view = memoryview(biases)
    checkpoint.read_into(old.tensor.name, view)
    row = old.nbytes // old.tensor.shape[0]
    for expert, part in enumerate(new.stored):
        if writer.needs(part.name):
            writer.write(part.name, view[expert * row : (expert + 1) * row])


def read_matrix(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Matrix:
    """Read one matrix, or one expert's of a stack, as it is stored."""
    name = entry.tensor.name
    if entry.scheme.format == "mxfp4":
        blocks = _read(checkpoint, f"{name}_blocks", np.uint8, expert)
        return Mxfp4Matrix(blocks, _read(checkpoint, f"{name}_scales", np.uint8, expert))
    rows = _read(checkpoint, name, np.uint16, expert)
    return rows if expert is None else np.ascontiguousarray(rows.T)


def _read(checkpoint: Checkpoint, name: str, dtype: type, expert: int | None) -> npt.NDArray[Any]:
    shape = checkpoint.stored[name].shape
    array: npt.NDArray[Any] = np.empty(shape if expert is None else shape[1:], dtype)
    checkpoint.read_into(name, _bytes(array), (expert or 0) * array.nbytes)
    return array


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
