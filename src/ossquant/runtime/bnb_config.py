"""BitsAndBytesConfig as users write it, to the Recipe with which experts and attention really are in 4 bits.

Stock transformers gives such a config to attention alone, for gpt-oss' experts are no nn.Linear. Every field is
honoured or refused; none is dropped in silence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ossquant.errors import UsageError
from ossquant.recipe import Recipe, built_in
from ossquant.scheme import BNB_FORMATS
from ossquant.units import nearest

METHOD = "bitsandbytes"
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
# modules that no recipe of bitsandbytes' formats puts in 4 bits, so that skipping them changes nothing
IN_16_BITS = ("lm_head", "router", "mlp.router", "embed_tokens", "model.embed_tokens")

_LOAD_IN_4BIT = "say load_in_4bit=True, for experts and attention in nf4 or fp4"
# what a field must be, as BitsAndBytesConfig has it by default, and what to do about another value
_ONLY_DEFAULT: Mapping[str, tuple[Any, str]] = {
    "quant_method": (METHOD, "give a BitsAndBytesConfig, or a scheme such as 'nf4'"),
    "load_in_8bit": (False, f"gpt-oss' experts have no 8-bit form; {_LOAD_IN_4BIT}"),
    "_load_in_8bit": (False, f"gpt-oss' experts have no 8-bit form; {_LOAD_IN_4BIT}"),
    "llm_int8_threshold": (6.0, "it is for 8 bits and does nothing in 4; leave it out"),
    "llm_int8_has_fp16_weight": (False, "it is for 8 bits and does nothing in 4; leave it out"),
    "llm_int8_enable_fp32_cpu_offload": (
        False,
        "leave it out: what device_map='auto' puts on the host stays in 4 bits here, not in fp32",
    ),
    "bnb_4bit_quant_storage": ("uint8", "leave it out: the packed weights are uint8 here"),
}
_READ = (
    "load_in_4bit",
    "_load_in_4bit",
    "llm_int8_skip_modules",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)
FIELDS = (*_ONLY_DEFAULT, *_READ)


def recipe_from_bitsandbytes(config: Any) -> tuple[Recipe, torch.dtype]:
    """Read a BitsAndBytesConfig, or the dict of one: the recipe, and the dtype that it asks to compute in.

    What it leaves out has transformers' defaults: fp4, no double quantization, computing in float32. Blocks are of
    64, router, embedding and lm_head stay in 16 bits. Raises UsageError for whatever cannot be honoured.
    """
    fields = _fields(config)
    for name, (default, cure) in _ONLY_DEFAULT.items():
        if fields.get(name, default) != default:
            raise UsageError(f"BitsAndBytesConfig: {name}={fields[name]!r} cannot be honoured on gpt-oss", hint=cure)
    if not fields["load_in_4bit"]:
        raise UsageError("BitsAndBytesConfig: load_in_4bit is not set, so it asks for nothing", hint=_LOAD_IN_4BIT)
    _check_skipped(fields["llm_int8_skip_modules"] or [])
    quant_type, dtype = fields["bnb_4bit_quant_type"], fields["bnb_4bit_compute_dtype"]
    if quant_type not in BNB_FORMATS:
        raise UsageError(f"BitsAndBytesConfig: unknown bnb_4bit_quant_type '{quant_type}'",
                         hint=nearest(quant_type, BNB_FORMATS))  # fmt: skip
    if dtype not in COMPUTE_DTYPES:
        raise UsageError(f"BitsAndBytesConfig: bnb_4bit_compute_dtype '{dtype}' is not one to compute in",
                         hint=nearest(dtype, COMPUTE_DTYPES))  # fmt: skip
    recipe = built_in(quant_type).with_double_quant(fields["bnb_4bit_use_double_quant"])
    return recipe, getattr(torch, dtype)


def _fields(config: Any) -> dict[str, Any]:
    """The config's fields by name, plain values all; checked by transformers' own class."""
    given = dict(config) if isinstance(config, Mapping) else _to_dict(config)
    method = given.get("quant_method", METHOD)
    if method != METHOD:
        raise UsageError(f"quantization_config is of '{_plain(method)}', not of {METHOD}",
                         hint=_ONLY_DEFAULT["quant_method"][1])  # fmt: skip
    unknown = sorted(given.keys() - set(FIELDS), key=str)
    if unknown:
        raise UsageError(f"BitsAndBytesConfig: unknown field '{unknown[0]}'", hint=nearest(str(unknown[0]), FIELDS))
    if "_load_in_4bit" in given or "_load_in_8bit" in given:  # as a config.json may have them, alone
        given = {f"load_in_{bits}bit": given.get(f"_load_in_{bits}bit", False) for bits in (4, 8)} | given
    arguments = {name: value for name, value in given.items() if name != "quant_method" and not name.startswith("_")}
    try:
        fields: dict[str, Any] = BitsAndBytesConfig(**arguments).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"BitsAndBytesConfig: {error}", hint="see transformers' own words on the field") from error
    return fields | {"quant_method": METHOD}


def _to_dict(config: Any) -> dict[str, Any]:
    if not hasattr(config, "to_dict"):
        raise UsageError(f"quantization_config is a {type(config).__name__}",
                         hint=_ONLY_DEFAULT["quant_method"][1])  # fmt: skip
    fields: dict[str, Any] = config.to_dict()
    return fields


def _plain(method: Any) -> str:
    return str(getattr(method, "value", method))


def _check_skipped(modules: list[str]) -> None:
    for module in modules:
        if module not in IN_16_BITS:
            raise UsageError(
                f"BitsAndBytesConfig: llm_int8_skip_modules names '{module}', which cannot be left out alone",
                hint="router, embed_tokens and lm_head are in 16 bits anyway; "
                "scheme 'hybrid' keeps the experts' MXFP4, 'bf16' keeps everything",
            )
