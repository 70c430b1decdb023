"""Recipe: which scheme each role gets, from TOML or by name."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ossquant.errors import UsageError
from ossquant.layout import Role
from ossquant.scheme import BLOCK_SIZES, BNB_FORMATS, Scheme
from ossquant.units import nearest

BF16 = Scheme("bf16")
F32 = Scheme("f32")
# What each role may become. Router, norms and biases are under 0.2 % of the bytes and stay bf16.
CHOICES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.ATTENTION: ("bf16", *BNB_FORMATS),
        Role.EXPERTS: ("bf16", "mxfp4", "int4", *BNB_FORMATS),
        Role.EMBEDDING: ("bf16",),
        Role.LM_HEAD: ("bf16", *BNB_FORMATS),
    }
)


@dataclass(frozen=True)
class Recipe:
    """A name, why one would want it, a scheme a role (bf16 if not named), and what is lost against MXFP4.

    unsloth asks for the names that unsloth's 4-bit checkpoints have.
    """

    name: str
    why: str
    schemes: Mapping[Role, Scheme]
    loss: str = ""
    unsloth: bool = False

    def scheme(self, role: Role) -> Scheme:
        """The scheme of a role's tensors."""
        return self.schemes.get(role, BF16)

    def with_double_quant(self, double_quant: bool) -> "Recipe":
        """The same recipe with its nf4 and fp4 absmax in 8 bits, or in fp32."""
        schemes = {
            role: replace(scheme, double_quant=double_quant) if scheme.is_bnb else scheme
            for role, scheme in self.schemes.items()
        }
        return replace(self, schemes=schemes)

    def for_unsloth(self) -> "Recipe":
        """The same recipe under unsloth's names. Raises UsageError if unsloth has no module for what it makes."""
        if any(self.scheme(role).format != "nf4" for role in (Role.EXPERTS, Role.ATTENTION)) or (
            self.scheme(Role.LM_HEAD) != BF16
        ):
            raise UsageError(
                f"unsloth's layout has experts and attention in nf4 and lm_head in bf16, '{self.name}' has not",
                hint="--scheme nf4 --to-unsloth",
            )
        return replace(self, unsloth=True)


def _uniform(name: str, experts: str, attention: str, loss: str, why: str) -> Recipe:
    return Recipe(name, why, {Role.EXPERTS: Scheme(experts), Role.ATTENTION: Scheme(attention)}, loss)


# Losses are relative Frobenius norms against MXFP4 experts, as scripts/format_error.py prints them.
BUILT_IN = {
    recipe.name: recipe
    for recipe in (
        _uniform("hybrid", "mxfp4", "nf4", "experts exact",
                 "the experts keep their published MXFP4 bytes, attention goes to NF4, the least change to the model"),
        _uniform("nf4", "nf4", "nf4", "experts off by 7 %",
                 "all that is large becomes bitsandbytes' NF4, for LoRA and stacks without MXFP4"),
        _uniform("fp4", "fp4", "fp4", "experts off by 8 %",
                 "all that is large becomes bitsandbytes' FP4, where FP4 is asked for"),
        _uniform("mxfp4", "mxfp4", "bf16", "exact where the experts are MXFP4 values already",
                 "the published layout, which every server loads: the way back for a bf16 fine-tune"),
        _uniform("int4", "int4", "bf16", "experts off by 8 %",
                 "group-wise INT4 (32, symmetric) in compressed-tensors' form, for vLLM; bitsandbytes has no INT4"),
        _uniform("bf16", "bf16", "bf16", "exact",
                 "nothing in 4 bits, the layout that transformers writes, for training and export"),
    )
}  # fmt: skip


def gguf_recipe(name: str, dense: str, experts: str = "mxfp4", why: str = "") -> Recipe:
    """The roles of a GGUF file: experts and what is large and dense as named, the rest in f32, as llama.cpp asks."""
    dense_roles = (Role.ATTENTION, Role.EMBEDDING, Role.LM_HEAD)
    f32_roles = (Role.ROUTER, Role.NORM, Role.BIAS, Role.EXPERT_BIAS)
    return Recipe(name, why, {
        Role.EXPERTS: Scheme(experts), **dict.fromkeys(dense_roles, Scheme(dense)), **dict.fromkeys(f32_roles, F32)
    })  # fmt: skip


# What others make, and servers load.
SERVED = {
    recipe.name: recipe
    for recipe in (
        gguf_recipe("gguf-q8", "q8_0", why="the GGUF that most people download: MXFP4 experts, the rest q8_0"),
        gguf_recipe("gguf-bf16", "bf16", why="the GGUF that Ollama ships: MXFP4 experts, the rest bf16"),
    )
}


def built_in(name: str) -> Recipe:
    """Find a recipe by its scheme name. Raises UsageError naming the nearest."""
    if name not in BUILT_IN:
        raise UsageError(f"unknown scheme '{name}'", hint=nearest(name, BUILT_IN))
    return BUILT_IN[name]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; every key must be known. Raises UsageError."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as TOML: {error}") from error
    return parse_recipe(table, where=path.name)


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Build a Recipe from its TOML table; where names it in errors."""
    _check_keys(table, ("name", "why", *CHOICES), where)
    for key in ("name", "why"):
        if not isinstance(table.get(key), str) or not table[key]:
            raise UsageError(f"{where}: '{key}' must be a text", hint=f'{key} = "…"')
    schemes = {role: _scheme(table[role], role, where) for role in CHOICES if role in table}
    if not schemes:
        raise UsageError(f"{where}: no role has a scheme", hint=f"name one of {', '.join(CHOICES)}")
    recipe = Recipe(table["name"], table["why"], schemes)
    if recipe.scheme(Role.EXPERTS).is_bnb and not recipe.scheme(Role.ATTENTION).is_bnb:
        # 4-bit attention is what stock transformers stumbles over; without it, it would load random experts
        raise UsageError(
            f"{where}: experts in {recipe.scheme(Role.EXPERTS).format} need attention in nf4 or fp4",
            hint='add [attention] format = "nf4"',
        )
    others = (recipe.scheme(Role.ATTENTION), recipe.scheme(Role.LM_HEAD))
    if recipe.scheme(Role.EXPERTS).format == "int4" and any(scheme.is_bnb for scheme in others):
        raise UsageError(
            f"{where}: int4 experts are for vLLM, which loads no nf4 or fp4 beside them",
            hint="leave attention and lm_head in bf16",
        )
    return recipe


def _scheme(table: object, role: Role, where: str) -> Scheme:
    if not isinstance(table, dict) or not isinstance(table.get("format"), str):
        raise UsageError(f"{where}: [{role}] needs a format", hint=f"one of {', '.join(CHOICES[role])}")
    chosen = table["format"]
    if chosen not in CHOICES[role]:
        raise UsageError(f"{where}: [{role}] cannot be '{chosen}'", hint=nearest(chosen, CHOICES[role]))
    tunable = ("block_size", "double_quant") if chosen in BNB_FORMATS else ()
    _check_keys(table, ("format", *tunable), f"{where}: [{role}]")
    scheme = Scheme(chosen, table.get("block_size", 64), table.get("double_quant", True))
    if scheme.block_size not in BLOCK_SIZES or type(scheme.block_size) is not int:
        raise UsageError(f"{where}: [{role}] block_size must be 32 or 64, not {scheme.block_size!r}")
    if not isinstance(scheme.double_quant, bool):
        raise UsageError(f"{where}: [{role}] double_quant must be true or false")
    return scheme


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'", hint=nearest(key, known))
