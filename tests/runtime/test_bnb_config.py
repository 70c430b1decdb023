import json

import pytest
import torch
from transformers import BitsAndBytesConfig, Mxfp4Config

from ossquant.errors import UsageError
from ossquant.layout import Role
from ossquant.runtime.bnb_config import _ONLY_DEFAULT, _READ, FIELDS, recipe_from_bitsandbytes
from ossquant.scheme import Scheme


def test_the_config_that_everyone_writes() -> None:
    """nf4, double quantization, bfloat16: experts and attention alike, nothing else."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    recipe, dtype = recipe_from_bitsandbytes(config)
    nf4 = Scheme("nf4", 64, double_quant=True)
    assert dict(recipe.schemes) == {Role.EXPERTS: nf4, Role.ATTENTION: nf4}
    assert dtype is torch.bfloat16


def test_defaults_are_those_of_the_class() -> None:
    """load_in_4bit alone is fp4 without double quantization, computed in float32."""
    recipe, dtype = recipe_from_bitsandbytes(BitsAndBytesConfig(load_in_4bit=True))
    fp4 = Scheme("fp4", 64, double_quant=False)
    assert recipe.scheme(Role.EXPERTS) == recipe.scheme(Role.ATTENTION) == fp4
    assert dtype is torch.float32


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dict_means_the_same(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    """The class, its dict, the dict after a trip through config.json and the bare arguments give one answer."""
    arguments = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
    }
    config = BitsAndBytesConfig(**arguments)
    forms = (config, config.to_dict(), json.loads(json.dumps(config.to_dict())), config.to_diff_dict(), arguments)
    for form in forms:
        recipe, found = recipe_from_bitsandbytes(form)
        assert recipe.scheme(Role.EXPERTS) == recipe.scheme(Role.ATTENTION)
        assert recipe.scheme(Role.EXPERTS) == Scheme(quant_type, 64, double_quant)
        assert found is dtype


def test_every_field_is_known() -> None:
    """A field that a new transformers adds is neither read nor refused yet, and makes this red."""
    assert set(BitsAndBytesConfig().to_dict()) == set(FIELDS)
    assert not set(_ONLY_DEFAULT) & set(_READ)


def test_what_is_required_is_the_default() -> None:
    """A field that may only have its default is refused for no config that leaves it out."""
    defaults = BitsAndBytesConfig().to_dict()
    for field, (value, _) in _ONLY_DEFAULT.items():
        assert getattr(defaults[field], "value", defaults[field]) == value


OTHER_VALUES = {
    "quant_method": "mxfp4",
    "load_in_8bit": True,
    "_load_in_8bit": True,
    "llm_int8_threshold": 4.0,
    "llm_int8_has_fp16_weight": True,
    "llm_int8_enable_fp32_cpu_offload": True,
    "bnb_4bit_quant_storage": "bfloat16",
    "load_in_4bit": False,
    "_load_in_4bit": False,
    "llm_int8_skip_modules": ["self_attn"],
    "bnb_4bit_quant_type": "int4",
    "bnb_4bit_compute_dtype": "float64",
}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_what_cannot_be_honoured_is_refused(field: str) -> None:
    """Another value is refused by the field's name or what it means, with a cure."""
    config = BitsAndBytesConfig(load_in_4bit=field not in ("load_in_8bit", "_load_in_8bit", "_load_in_4bit"))
    given = config.to_dict()
    if field in ("_load_in_4bit", "_load_in_8bit"):
        given = {key: value for key, value in given.items() if not key.startswith("load_in")}
    with pytest.raises(UsageError) as caught:
        recipe_from_bitsandbytes(given | {field: OTHER_VALUES[field]})
    assert field.strip("_") in caught.value.message or field == "quant_method"
    assert caught.value.hint


def test_every_field_is_tried_with_another_value() -> None:
    """The list above misses no field; double quantization alone has two values that can be honoured."""
    assert set(OTHER_VALUES) == set(FIELDS) - {"bnb_4bit_use_double_quant"}


@pytest.mark.parametrize("skipped", [[], ["lm_head"], ["router", "lm_head", "embed_tokens"]])
def test_skipping_what_is_in_16_bits_anyway(skipped: list[str]) -> None:
    """Router, embedding and lm_head are never in 4 bits, so they may be named."""
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    recipe, _ = recipe_from_bitsandbytes(config)
    assert recipe.scheme(Role.LM_HEAD) == recipe.scheme(Role.ROUTER) == Scheme("bf16")


@pytest.mark.parametrize("config", [Mxfp4Config(dequantize=True), {"load_in_4bits": True}, "nf4", 4, None])
def test_what_is_no_such_config_is_refused(config: object) -> None:
    """Another kind of config, an unknown field and no config at all are one sentence each."""
    with pytest.raises(UsageError) as caught:
        recipe_from_bitsandbytes(config)
    assert caught.value.hint


@pytest.mark.parametrize("field", ["bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"])
def test_values_of_the_wrong_type_are_refused(field: str) -> None:
    """What the class itself refuses is a UsageError, also in a dict."""
    with pytest.raises(UsageError):
        recipe_from_bitsandbytes({"load_in_4bit": True, field: "nonsense"})
