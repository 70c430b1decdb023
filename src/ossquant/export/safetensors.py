"""Exports that are safetensors, made by quantize: the published layout, INT4 for vLLM, unsloth's names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.export.target import Target, check_pair
from ossquant.export.vllm import check_coverage
from ossquant.export.vocabulary import read_vocabulary
from ossquant.jobs import Progress
from ossquant.plan import Plan
from ossquant.quantize import DEFAULT_SHARD_SIZE, QuantizeReport, plan_quantize, quantize
from ossquant.recipe import Recipe
from ossquant.rope import Rope

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ExportPlan:
    """What will be written, and what a user must know."""

    plan: Plan
    warnings: tuple[str, ...]


def plan_export(checkpoint: Checkpoint, target: Target, recipe: Recipe, where: str) -> ExportPlan:
    """Plan an export, and check beside the weights what a server reads: positions, tokenizer, chat template.

    where is what the user calls the checkpoint. Raises CheckpointError, UnsupportedError.
    """
    check_pair(checkpoint.plan, target, where)
    plan = plan_quantize(checkpoint, recipe)
    Rope.from_config(checkpoint.config)
    read_vocabulary(checkpoint.folder, plan.spec.vocab_size, checkpoint.config)
    if target.name == "vllm-int4":
        check_coverage(plan.spec, {part.name: part for entry in plan.tensors for part in entry.stored})
    warnings = (
        _experimental(target),
        _for_unsloth_alone(target),
        "" if (checkpoint.folder / GENERATION_CONFIG).is_file() else (
            f"no {GENERATION_CONFIG}: servers then stop at config.json's eos_token_id alone, not where a tool is called"
        ),
    )  # fmt: skip
    return ExportPlan(plan, tuple(each for each in warnings if each))


def _experimental(target: Target) -> str:
    if target.name != "vllm-int4":
        return ""
    # by the source of vLLM 0.32
    return (
        "experimental: never executed on a GPU by us. vLLM 0.32 refuses its fast INT4 kernels for gpt-oss, others may "
        "leave out expert biases: compare logits. --to mxfp4 is smaller and exact"
    )


def _for_unsloth_alone(target: Target) -> str:
    if target.name != "unsloth":
        return ""
    return "for unsloth and ossquant alone: stock transformers opens it without an error and makes the experts up"


def export(
    source: str | Path,
    output: Path,
    target: Target,
    recipe: Recipe,
    *,
    max_shard_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    announce: Callable[[ExportPlan], None] = lambda planned: None,
) -> QuantizeReport:
    """Write SOURCE for a target into the folder OUTPUT, which appears whole or not at all, and read it back.

    announce is told the plan before anything is written; what plan_export refuses is refused here. Raises UsageError,
    CheckpointError, DoesNotFitError.
    """
    with open_checkpoint(source) as checkpoint:
        announce(plan_export(checkpoint, target, recipe, str(source)))
    report = quantize(
        source, output, recipe, max_shard_size=max_shard_size or DEFAULT_SHARD_SIZE, force=force, progress=progress
    )
    with open_checkpoint(output) as written:
        written.plan  # noqa: B018  read here for its errors
        if target.name == "vllm-int4":
            check_coverage(written.spec, written.stored)
    return report
