"""Add a LoRA adapter to the weights it was trained beside, on the way to whatever a recipe asks for.

A QLoRA run trains on NF4, which cannot be served everywhere. Its adapter is small: it is added to the published or
bf16 weights as they are read, so that no 16-bit copy of the model is needed between training and MXFP4.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ossquant.checkpoint.header import read_header, read_json
from ossquant.checkpoint.reader import Checkpoint, locate, open_checkpoint, refuse_strangers
from ossquant.codec import mxfp4
from ossquant.codec.bnb4 import Floats
from ossquant.codec.expand import Piece, expand, pieces
from ossquant.codec.mxfp4 import Bf16Bits
from ossquant.errors import CheckpointError, UnsupportedError, UsageError
from ossquant.jobs import Progress
from ossquant.layout import Role
from ossquant.plan import QUANTIZED, Plan, TensorPlan, make_plan
from ossquant.quantize import DEFAULT_SHARD_SIZE, QuantizeReport, quantize
from ossquant.recipe import BF16, Recipe
from ossquant.scheme import MXFP4_BLOCK, StoredTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SAMPLE = 32  # experts of a role, or parts of matrices
TILE = 256  # rows that BLAS is given at a time: what it makes of a row depends on those beside it
ROUNDS_TO_INFINITY = 2.0**128 - 2.0**119  # and all above it, in bf16

# fields of peft's LoraConfig that change nothing about what is added, or are read below; every other one must be off
_READ = ("peft_type", "lora_alpha", "r", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "target_modules", "task_type",
)  # fmt: skip
# ways to begin that leave the base weights alone; the others, such as pissa, change them
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)
_OFF = (None, False, "none")
_LM_HEAD_ITSELF = "base_model.model.lm_head.base_layer.weight"  # peft saves it where it has a LoRA
_COMPARED = 2**22  # of its weights at a time
_TAKES = "merge takes LoRA on attention, lm_head and single experts"
_NAME = re.compile(r"\^?[\w.]+", re.ASCII)
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_EXPERT = re.compile(r"(?P<stack>.+\.experts\.(?:gate_up|down)_proj)s\.(?P<expert>0|[1-9]\d{0,4})")


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix (out, in): scale * b @ a, with a (r, in) and b (out, r), by their stored names."""

    a: str
    b: str
    scale: float


class Adapter:
    """A LoRA adapter as peft saves it. deltas: what is added, by tensor and expert, None where there are none."""

    def __init__(
        self, config: Mapping[str, Any], weights: Checkpoint, deltas: Mapping[tuple[str, int | None], LowRank]
    ) -> None:
        self.config = config
        self.weights = weights
        self.deltas = deltas

    def rows(self, name: str, expert: int | None, begin: int, end: int, transposed: bool) -> Floats | None:
        """What is added to the rows begin to end of a matrix, or of its transpose; None if nothing is.

        A row has the same bits whichever rows it is asked for with. Raises CheckpointError for NaN and infinity.
        """
        delta = self.deltas.get((name, expert))
        if delta is None:
            return None
        a, b = self._read(delta.a), self._read(delta.b)
        left, right = (a.T, b.T) if transposed else (b, a)
        first = begin - begin % TILE
        with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked
            tiles = [left[at : at + TILE] @ right for at in range(first, end, TILE)]
            product: Floats = np.concatenate(tiles)[begin - first : end - first]
            product *= np.float32(delta.scale)
        return product

    def _read(self, name: str) -> Floats:
        part = self.weights.stored[name]
        raw = np.empty(part.nbytes, np.uint8)
        self.weights.read_into(name, raw.data)
        floats = _floats(raw.view(np.uint16)) if part.dtype == "BF16" else raw.view(np.float32)
        if not np.isfinite(floats).all():
            raise CheckpointError(f"{WEIGHTS}: NaN or infinity in '{name}'", hint="the adapter is broken: train again")
        return floats.reshape(part.shape)


def read_adapter(folder: Path, plan: Plan) -> Adapter:
    """Read what an adapter adds to a model of this plan. Raises UsageError, CheckpointError, UnsupportedError."""
    try:
        if folder.is_dir():
            refuse_strangers(folder)
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise UsageError(
                f"{folder}: not an adapter, which is a folder with {CONFIG} and {WEIGHTS}",
                hint="save it with model.save_pretrained(folder)",
            )
        config = read_json(folder / CONFIG)
        _check_config(config)
        locations = locate(folder, [WEIGHTS], lambda shard: read_header(folder / shard), None)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}", hint="check the disk, and who may read it") from error
    weights = Checkpoint(folder, {}, locations)
    return Adapter(config, weights, _deltas(config, weights.stored, plan))


def _deltas(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], plan: Plan
) -> dict[tuple[str, int | None], LowRank]:
    shapes = {entry.tensor.name: entry.tensor.shape for entry in plan.tensors if entry.tensor.role in QUANTIZED}
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, part in stored.items():
        if name == _LM_HEAD_ITSELF and part.shape == shapes["lm_head.weight"] and part.dtype in ("F32", "BF16"):
            continue  # held against the source's
        match = _LORA.fullmatch(name)
        if match is None or part.dtype not in ("F32", "BF16") or len(part.shape) != 2:
            raise UnsupportedError(
                f"{WEIGHTS}: '{name}' ({part.dtype}) is no half of a matrix in fp32 or bf16", hint=_TAKES
            )
        halves.setdefault(match["module"], {})[match["half"]] = part
    if not halves:
        raise CheckpointError(f"{WEIGHTS}: no tensors", hint="save the adapter again")
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    deltas = {}
    for module, parts in halves.items():
        name, expert = _tensor_of(module)
        rank = _check_shapes(module, parts, shapes.get(name), expert)
        stated = _by_pattern(ranks, module, config.get("r"))
        alpha = _by_pattern(alphas, module, config.get("lora_alpha"))
        if stated != rank or not _is_finite(alpha):
            raise CheckpointError(f"{CONFIG}: rank {stated!r} and lora_alpha {alpha!r} for '{module}' of rank {rank}",
                                  hint=f"{CONFIG} and {WEIGHTS} are not of the same adapter")  # fmt: skip
        # as peft 0.21 has it
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        deltas[name, expert] = LowRank(parts["A"].name, parts["B"].name, scale)
    return deltas


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{CONFIG}: an adapter of type {kind!r}", hint="merge takes LoRA")
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise UnsupportedError(
            f"{CONFIG}: init_lora_weights {beginning!r} has changed the weights it was trained on",
            hint="have peft convert it: path_initial_model_for_weight_conversion in save_pretrained",
        )
    for name, value in config.items():
        off = value in _OFF if not isinstance(value, (dict, list)) else not value
        if name not in (*_READ, *_WITHOUT_EFFECT) and not off:
            raise UnsupportedError(f"{CONFIG}: '{name}' is {value!r}, which merge does not know",
                                   hint="merge takes plain LoRA, without biases or whole modules")  # fmt: skip


def _tensor_of(module: str) -> tuple[str, int | None]:
    """The tensor, and the expert of it, that a module has for its weight."""
    expert = _EXPERT.fullmatch(module)
    return (expert["stack"], int(expert["expert"])) if expert else (f"{module}.weight", None)


def _check_shapes(
    module: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...] | None, expert: int | None
) -> int:
    """Check that both halves are there and fit their matrix; gives the rank."""
    if shape is None or (expert is not None and expert >= shape[0]):
        raise UnsupportedError(f"{WEIGHTS}: '{module}' is none of the model's matrices", hint=_TAKES)
    rank = parts["A"].shape[0] if "A" in parts else 0
    expected = {"A": (rank, shape[-1]), "B": (shape[-2], rank)}
    found = {half: part.shape for half, part in parts.items()}
    if not rank or found != expected:
        raise CheckpointError(f"{WEIGHTS}: lora_A and lora_B of '{module}' are {found}, not {expected}",
                              hint="the adapter was trained on another model")  # fmt: skip
    if rank > min(shape[-2:]):  # what is read at once grows with it
        raise UnsupportedError(f"{WEIGHTS}: '{module}' has rank {rank}, more than its matrix {shape[-2:]}",
                               hint="add it to the bf16 model with peft's merge_and_unload")  # fmt: skip
    return rank


def _is_finite(number: Any) -> bool:
    """Whether a value from JSON is a number that float32 holds, and bf16."""
    return type(number) in (int, float) and abs(number) < ROUNDS_TO_INFINITY


def _patterns(config: Mapping[str, Any], key: str) -> dict[str, tuple[int, Any]]:
    """A table of peft's patterns with the place of each: the first that is a module's name, or its end, counts.

    To peft each is a regular expression, but who wrote the file would choose how long that takes.
    """
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{CONFIG}: '{key}' is {table!r}, not a table", hint="save the adapter again")
    odd = next((pattern for pattern in table if not _NAME.fullmatch(pattern)), None)
    if odd is not None:
        raise UnsupportedError(f"{CONFIG}: '{odd}' in {key} is no module's name", hint="write each name out")
    return {pattern: (place, value) for place, (pattern, value) in enumerate(table.items())}


def _by_pattern(patterns: Mapping[str, tuple[int, Any]], module: str, default: Any) -> Any:
    parts = module.split(".")
    names = [f"^{module}", *(".".join(parts[begin:]) for begin in range(len(parts)))]
    return min((patterns[name] for name in names if name in patterns), default=(0, default))[1]


def _check_lm_head(weights: Checkpoint, source: Checkpoint) -> None:
    """See that lm_head's own weights, if the adapter has them, are the source's: then only its LoRA was trained."""
    part = weights.stored.get(_LM_HEAD_ITSELF)
    if part is None or source.stored["lm_head.weight"].dtype != "BF16":  # another is refused with its role
        return
    itemsize = part.nbytes // math.prod(part.shape)
    for begin in range(0, math.prod(part.shape), _COMPARED):
        count = min(_COMPARED, math.prod(part.shape) - begin)
        own, original = np.empty(count * itemsize, np.uint8), np.empty(count, np.uint16)
        weights.read_into(_LM_HEAD_ITSELF, own.data, begin * itemsize)
        source.read_into("lm_head.weight", original.view(np.uint8).data, 2 * begin)
        same = own.view(np.uint16) == original if part.dtype == "BF16" else own.view(np.float32) == _floats(original)
        if not same.all():
            raise UnsupportedError(f"{WEIGHTS}: '{_LM_HEAD_ITSELF}' is not the lm_head of {source.folder}", hint=_TAKES)


class MergedCheckpoint(Checkpoint):
    """A checkpoint read as if the adapter had been added: roles that it touches are bf16, the others as stored."""

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        super().__init__(source.folder, source.config, source.locations)
        self.source = source
        self.adapter = read_adapter(folder, source.plan)
        _check_lm_head(self.adapter.weights, source)
        self.origin = {"adapter": self.adapter.config}
        touched = {name for name, _ in self.adapter.deltas}
        self.roles = {entry.tensor.role for entry in source.plan.tensors if entry.tensor.name in touched}
        # what is read is bf16, so it has the tensor's own name
        self._merged = {old.tensor.name: old for old in source.plan.tensors if old.tensor.role in self.roles}

    @cached_property
    def plan(self) -> Plan:
        """How the merged model would be stored."""
        schemes = {role: self.source.plan.scheme(role) for role in QUANTIZED}
        for role in self.roles:
            if schemes[role].format not in ("bf16", "mxfp4"):
                raise UnsupportedError(
                    f"{self.folder}: its {role} are {schemes[role].format}, to which nothing can be added",
                    hint="merge into the published or the bf16 checkpoint that it was made of",
                )
            schemes[role] = BF16
        return make_plan(self.spec, Recipe("merged", "", schemes, unsloth=self.source.plan.unsloth))

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The stored tensors by name, as they are read."""
        parts = (part for entry in self.plan.tensors for part in entry.stored)
        return {part.name: self.source.stored.get(part.name, part) for part in parts}

    @property
    def files(self) -> list[Path]:
        """The safetensors files of both."""
        return [*self.source.files, *self.adapter.weights.files]

    def read_into(self, name: str, buffer: memoryview, offset: int = 0) -> None:
        """Fill buffer with a tensor's bytes from offset on."""
        entry = self._merged.get(name)
        if entry is None:
            self.source.read_into(name, buffer, offset)
            return
        rows, columns = self.stored[name].shape[-2:]
        while buffer:
            matrix, at = divmod(offset, 2 * rows * columns)
            begin, end = at // (2 * columns), min(rows, -(-(at + len(buffer)) // (2 * columns)))
            expert = matrix if entry.tensor.role is Role.EXPERTS else None
            bits = self._rows(entry, expert, begin, end)
            part = bits.reshape(-1).view(np.uint8).data[at - 2 * begin * columns :][: len(buffer)]
            buffer[: len(part)] = part
            buffer, offset = buffer[len(part) :], offset + len(part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)
        self.adapter.weights.__exit__(kind, error, trace)

    def _rows(self, entry: TensorPlan, expert: int | None, begin: int, end: int) -> Bf16Bits:
        """Rows of a matrix as bf16 has it, (out, in), or (in, out) of an expert, with the adapter added."""
        name = entry.tensor.name
        if entry.scheme.format == "mxfp4":
            bits = self._columns_of_mxfp4(name, expert or 0, begin, end)
        else:
            columns = self.source.stored[name].shape[-1]
            bits = np.empty((end - begin, columns), np.uint16)
            first = (expert or 0) * self.source.stored[name].shape[-2] + begin
            self.source.read_into(name, bits.reshape(-1).view(np.uint8).data, 2 * first * columns)
        added = self.adapter.rows(name, expert, begin, end, transposed=expert is not None)
        return bits if added is None else _to_bf16(_floats(bits) + added, name)

    def _columns_of_mxfp4(self, name: str, expert: int, begin: int, end: int) -> Bf16Bits:
        """Inputs begin to end of one expert: rows of its transpose, which is how bf16 stacks lie."""
        first, last = begin // MXFP4_BLOCK, -(-end // MXFP4_BLOCK)
        blocks = self._expert(f"{name}_blocks", expert)[:, first:last]
        scales = self._expert(f"{name}_scales", expert)[:, first:last]
        rows = mxfp4.dequantize(np.ascontiguousarray(blocks), np.ascontiguousarray(scales), name)
        return np.ascontiguousarray(rows.T[begin - first * MXFP4_BLOCK : end - first * MXFP4_BLOCK])

    def _expert(self, name: str, expert: int) -> npt.NDArray[np.uint8]:
        part = np.empty(self.source.stored[name].shape[1:], np.uint8)
        self.source.read_into(name, part.reshape(-1).data, expert * part.nbytes)
        return part


@dataclass(frozen=True)
class MergeReport:
    """What was written, and the share of the adapter that is left in it, by role.

    A share is <written - source, added> / <added, added>, over at most 32 experts of a role, or parts of its
    matrices. Rounding to 4 bits gives back the source's own value where less is added than half a step, so that a
    faint adapter may vanish.
    """

    quantize: QuantizeReport
    kept: Mapping[Role, float]


def merge(
    source: str | Path,
    adapter: Path,
    output: Path,
    recipe: Recipe,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write SOURCE with a LoRA adapter added, as recipe has it, into the folder OUTPUT; see quantize.

    Sums are made in fp32 and rounded to bf16; roles that the adapter does not touch keep their bytes where the recipe
    leaves them as they are.
    """
    report = quantize(
        source, output, recipe, max_shard_size=max_shard_size, force=force, progress=progress,
        open_source=partial(_open_merged, adapter),
    )  # fmt: skip
    merged = _open_merged(adapter, source)
    with merged, open_checkpoint(output) as written:
        return MergeReport(report, _kept(merged, written))


def _kept(merged: MergedCheckpoint, written: Checkpoint) -> dict[Role, float]:
    touched = [
        (old, new, piece)
        for old, new in zip(merged.source.plan.tensors, written.plan.tensors, strict=True)
        if old.tensor.role in merged.roles
        for piece in pieces(old.tensor)
        if (old.tensor.name, piece.expert) in merged.adapter.deltas
    ]
    shares = {}
    for role in sorted(merged.roles):
        of_role = [each for each in touched if each[0].tensor.role is role]
        step = -(-len(of_role) // SAMPLE)
        left, added = np.sum([_sums(merged, written, *each) for each in of_role[::step]], axis=0)
        shares[role] = float(left / added) if added else 1.0
    return shares


def _sums(
    merged: MergedCheckpoint, written: Checkpoint, old: TensorPlan, new: TensorPlan, piece: Piece
) -> tuple[float, float]:
    """<written - source, added> and <added, added>, over a piece."""
    rows = merged.adapter.rows(old.tensor.name, piece.expert, piece.begin, piece.end, transposed=False)
    added = cast(Floats, rows).astype(np.float64)
    change = np.concatenate([
        now - was for was, now in zip(expand(merged.source, old, piece), expand(written, new, piece), strict=True)
    ])  # fmt: skip
    return float(np.vdot(change, added)), float(np.vdot(added, added))


def _open_merged(adapter: Path, source: str | Path) -> MergedCheckpoint:
    return MergedCheckpoint(open_checkpoint(source), adapter)


def _floats(bits: Bf16Bits) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: Floats, name: str) -> Bf16Bits:
    """Round to the nearest bf16, ties to even. Raises CheckpointError for what would not be finite."""
    if not (np.abs(values) < ROUNDS_TO_INFINITY).all():  # nor is NaN
        raise CheckpointError(f"'{name}': NaN or infinity once the adapter is added",
                              hint="the adapter is broken, or was trained on another model")  # fmt: skip
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
