"""Export a checkpoint as GGUF, for llama.cpp, Ollama and LM Studio: reader → codec → writer, without torch.

MXFP4 experts keep their codes and scales and are only put in ggml's order.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ossquant.checkpoint.manifest import TensorEntry, TensorHash, make_manifest
from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.checkpoint.writer import CheckpointWriter, Shard, TensorWriter
from ossquant.codec import ggml, mxfp4
from ossquant.codec.bnb4 import Floats
from ossquant.codec.expand import Piece, expand, pieces
from ossquant.codec.mxfp4 import Bytes
from ossquant.codec.recode import Mxfp4Matrix
from ossquant.export.gguf_header import plan_files
from ossquant.export.gguf_tensors import GgufTensor, gguf_tensors
from ossquant.export.target import check_formats, check_pair, find_target
from ossquant.export.vocabulary import read_vocabulary
from ossquant.jobs import Job, Progress, nothing, run_jobs
from ossquant.layout import Role
from ossquant.plan import Plan, TensorPlan, make_plan
from ossquant.quantize import Loss, QuantizeReport, check_output, identity, read_matrix, source_name
from ossquant.recipe import Recipe, gguf_recipe

ROWS_AT_ONCE = 2**18  # weights of an expert that are coded at a time: a megabyte of floats


@dataclass(frozen=True)
class GgufPlan:
    """What will be written: the plan, its tensors under GGUF's names, the files, and what a user must know."""

    recipe: Recipe
    plan: Plan
    tensors: tuple[GgufTensor, ...]
    files: tuple[Shard, ...]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(file.nbytes for file in self.files)


def plan_gguf(
    checkpoint: Checkpoint, name: str, *, dense: str = "q8_0", experts: str = "mxfp4", split_max_size: int | None = None
) -> GgufPlan:
    """Plan the export of a model called name; reads its headers and tokenizer alone.

    Raises UsageError, CheckpointError, UnsupportedError.
    """
    check_formats(dense, experts)
    check_pair(checkpoint.plan, find_target("gguf"), str(checkpoint.folder))
    recipe = gguf_recipe(f"{experts}-{dense}", dense, experts)
    plan = make_plan(checkpoint.spec, recipe)
    vocabulary = read_vocabulary(checkpoint.folder, plan.spec.vocab_size, checkpoint.config)
    tensors = gguf_tensors(plan)
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-120:]}-{recipe.name}"
    files = plan_files(tensors, plan, checkpoint.config, vocabulary, name, stem, split_max_size)
    warnings = (
        _larger_and_worse(checkpoint.plan, plan),
        "" if vocabulary.splits_as_published else (
            "tokenizer.json does not split text as gpt-oss' own does, and llama.cpp will: compare its tokens before use"
        ),
    )  # fmt: skip
    return GgufPlan(recipe, plan, tuple(tensors), tuple(files), tuple(each for each in warnings if each))


def _larger_and_worse(source: Plan, plan: Plan) -> str:
    """Warn of experts that take more room than MXFP4 and lose what it keeps."""
    experts = plan.scheme(Role.EXPERTS).format
    error = {"q8_0": "0.6 %", "q5_0": "4 %", "q4_0": "7 %"}.get(experts)  # of normal weights in MXFP4, coded again
    if error is None:
        return ""
    bits = {total.role: total.bits_per_weight for total in plan.by_role()}[Role.EXPERTS]
    if source.scheme(Role.EXPERTS).format == "mxfp4":
        return (
            f"experts in {experts} take {bits:.2f} bits a weight and are off by {error}; MXFP4, which they are in, "
            "takes 4.25 and is exact"
        )
    return f"experts in {experts} take {bits:.2f} bits a weight, MXFP4 4.25"


def export_gguf(
    source: str | Path,
    output: Path,
    *,
    dense: str = "q8_0",
    experts: str = "mxfp4",
    split_max_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    announce: Callable[[GgufPlan], None] = lambda planned: None,
    made: Callable[[GgufPlan], Mapping[str, bytes]] = lambda planned: {},
) -> QuantizeReport:
    """Write SOURCE as GGUF into the folder OUTPUT, which appears whole or not at all, with config.json and manifest.

    split_max_size is the bytes of data in a file; None for one file. announce is told the plan before anything is
    written, made gives further files to write beside. An interrupted job goes on where it stopped when it is run
    again. Raises UsageError, CheckpointError, DoesNotFitError.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    with open_checkpoint(source) as checkpoint:
        check_output(output, checkpoint.folder)
        planned = plan_gguf(checkpoint, model_name(source), dense=dense, experts=experts, split_max_size=split_max_size)
        with CheckpointWriter(output, planned.files, identity(checkpoint), force=force) as writer:
            announce(planned)
            loss = Loss()
            run_jobs(_jobs(checkpoint, planned.tensors, writer, loss), checkpoint.plan.nbytes, progress)
            entries = {file.name: _header_entry(file) for file in planned.files} | writer.tensors
            manifest = make_manifest(checkpoint, source_name(source), planned.recipe.name, planned.plan, entries)
            config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
            writer.commit(config, None, [], manifest, made(planned))
        return QuantizeReport(
            source=checkpoint.plan,
            result=planned.plan,
            output=output,
            files=len(planned.files),
            resumed=writer.resumed,
            seconds=time.monotonic() - started,
            cpu_seconds=time.process_time() - cpu_started,
            mxfp4_error=loss.relative,
        )


def _header_entry(file: Shard) -> TensorEntry:
    """What the manifest has of a file before its weights: metadata, tokenizer, the places of the tensors."""
    digest = TensorHash(len(file.header), len(file.header))
    digest.add(0, file.header)
    return TensorEntry(file.name, len(file.header), digest.hexdigest())


def model_name(source: str | Path) -> str:
    """What a folder or a hub id calls its model."""
    return source_name(source).rpartition("/")[2]


def _jobs(checkpoint: Checkpoint, tensors: Sequence[GgufTensor], writer: TensorWriter, loss: Loss) -> Iterator[Job]:
    """List the pieces in the plan's order; those of finished tensors count, but do nothing."""
    stored_as = {entry.tensor.name: entry for entry in checkpoint.plan.tensors}
    for name, same in groupby(tensors, lambda tensor: tensor.entry.tensor.name):
        old, needed = stored_as[name], [tensor for tensor in same if writer.needs(tensor.stored.name)]
        if not needed:
            yield Job(old.nbytes, nothing)
            continue
        parts = pieces(old.tensor)
        for part in parts:
            write = _write_expert if part.expert is not None else _write_rows
            yield Job(old.nbytes // len(parts), partial(write, checkpoint, old, part, needed, writer, loss))


def _write_expert(
    checkpoint: Checkpoint, old: TensorPlan, part: Piece, needed: Sequence[GgufTensor], writer: TensorWriter, loss: Loss
) -> None:
    """Code one expert's matrix for the tensors that take its rows."""
    coded = _code_expert(checkpoint, old, part, needed[0].entry.scheme.format, loss)
    for tensor in needed:
        rows = coded if tensor.half is None else coded[tensor.half :: 2]
        _write(writer, tensor, rows, (part.expert or 0) * rows.size, rows.size)


def _code_expert(checkpoint: Checkpoint, old: TensorPlan, part: Piece, format_: str, loss: Loss) -> Bytes:
    """The rows of one expert in ggml's form: uint8 (rows, bytes of a row)."""
    matrix = read_matrix(checkpoint, old, part.expert)
    if format_ == "mxfp4":
        if not isinstance(matrix, Mxfp4Matrix):
            bits, matrix = matrix, Mxfp4Matrix(*mxfp4.quantize(matrix, part.label))
            loss.add(*mxfp4.squared_error(bits, matrix.blocks, matrix.scales))
        return ggml.pack_mxfp4(matrix.blocks, matrix.scales, part.label)
    bits = mxfp4.dequantize(matrix.blocks, matrix.scales, part.label) if isinstance(matrix, Mxfp4Matrix) else matrix
    step = max(1, ROWS_AT_ONCE // bits.shape[1])
    floats = (mxfp4.to_floats(bits[begin : begin + step]) for begin in range(0, len(bits), step))
    return _encoded(floats, format_, part.label)


def _write_rows(
    checkpoint: Checkpoint, old: TensorPlan, part: Piece, needed: Sequence[GgufTensor], writer: TensorWriter, loss: Loss
) -> None:
    """Code some rows of a matrix, or a vector, for the tensors that take them."""
    format_ = needed[0].entry.scheme.format
    coded = _encoded(expand(checkpoint, old, part), format_, part.label)
    first, share = pieces(old.tensor)[0], 1 if needed[0].half is None else 2
    piece = (first.end - first.begin) * coded.shape[1] // share
    for tensor in needed:  # biases of all experts, in f32: gate and up take turns
        rows = coded if tensor.half is None else coded.reshape(-1, 2, 4)[:, tensor.half]
        _write(writer, tensor, rows, part.begin * coded.shape[1] // share, min(piece, tensor.stored.nbytes))


def _encoded(floats: Iterator[Floats], format_: str, name: str) -> Bytes:
    """Code rows that come in steps; gives uint8 (rows, bytes of a row)."""
    return np.concatenate([ggml.encode(step, format_, name) for step in floats])


def _write(writer: TensorWriter, tensor: GgufTensor, rows: Any, offset: int, piece: int) -> None:
    data = np.ascontiguousarray(rows).reshape(-1).data
    writer.write(tensor.stored.name, data, offset, piece)
