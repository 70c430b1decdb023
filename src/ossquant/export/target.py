"""What a checkpoint can be exported to, and from which form."""

from collections.abc import Mapping
from dataclasses import dataclass

from ossquant.errors import UnsupportedError, UsageError
from ossquant.layout import Role
from ossquant.plan import Plan
from ossquant.recipe import Recipe, built_in
from ossquant.units import nearest

# what a GGUF file of ours may hold, the default first
DENSE = ("q8_0", "bf16", "q4_0", "f32")
EXPERTS = ("mxfp4", "q8_0", "q5_0", "q4_0", "bf16", "f32")


@dataclass(frozen=True)
class Target:
    """A form that servers load: which, from what it is made, and its recipe where it is safetensors.

    sources are pairs of formats, of experts and of attention.
    """

    name: str
    servers: str
    sources: tuple[tuple[str, str], ...]
    recipe: Recipe | None = None


_DENSE = (("mxfp4", "bf16"), ("bf16", "bf16"))  # as published, and a fine-tune
_WITH_HYBRID = (*_DENSE, ("mxfp4", "nf4"), ("mxfp4", "fp4"))
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("gguf", "llama.cpp, LM Studio", _WITH_HYBRID),
        Target("ollama", "Ollama", _WITH_HYBRID),
        Target("mxfp4", "transformers, vLLM, SGLang, mlx-lm, Ollama's import", _DENSE, built_in("mxfp4")),
        Target("vllm-int4", "vLLM; experimental: never executed on a GPU by us", _DENSE, built_in("int4")),
        Target("unsloth", "unsloth", (*_DENSE, ("nf4", "nf4")), built_in("nf4").for_unsloth()),
    )
}
_NAMES = {
    ("mxfp4", "bf16"): "mxfp4",
    ("bf16", "bf16"): "bf16",
    ("mxfp4", "nf4"): "hybrid",
    ("mxfp4", "fp4"): "hybrid in fp4",
    ("nf4", "nf4"): "nf4",
    ("fp4", "fp4"): "fp4",
    ("int4", "bf16"): "int4",
}


def find_target(name: str) -> Target:
    """Find a target by its name. Raises UsageError naming the nearest."""
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}'", hint=nearest(name, TARGETS))
    return TARGETS[name]


def check_formats(dense: str, experts: str) -> None:
    """Raise UsageError for formats that a GGUF file of gpt-oss does not have."""
    for role, value, known in (("dense", dense, DENSE), ("experts", experts, EXPERTS)):
        if value not in known:
            hint = nearest(value, known)
            if "_k" in value.lower():  # what people ask for by habit
                hint = f"K-quants need rows of 256, gpt-oss' have 2880; {', '.join(known)}"
            raise UsageError(f"--{role} cannot be '{value}'", hint=hint)


def check_pair(plan: Plan, target: Target, where: str) -> None:
    """Raise UnsupportedError, which says what goes to where, if the target is not made from what the plan holds."""
    form = plan.scheme(Role.EXPERTS).format, plan.scheme(Role.ATTENTION).format
    if form in target.sources:
        return
    held = _NAMES.get(form, f"experts in {form[0]}, attention in {form[1]}")
    raise UnsupportedError(
        f"{where} is {held}, and {target.name} is made from {_listed(target)}",
        hint="export the published or bf16 checkpoint it was made of. "
        + "; ".join(f"{each.name} takes {_listed(each)}" for each in TARGETS.values()),
    )


def _listed(target: Target) -> str:
    return ", ".join(dict.fromkeys(_NAMES[source].partition(" ")[0] for source in target.sources))
