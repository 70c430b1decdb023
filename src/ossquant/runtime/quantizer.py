"""What transformers calls to load a checkpoint of ours, or to quantize one as it is loaded.

The checkpoint's headers are held against the plan before a byte is read; afterwards every parameter that
should be in four bits is looked at. Both ways of loading use one codec, so they give identical weights.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ossquant.checkpoint.header import read_header
from ossquant.codec.recode import Matrix, Mxfp4Matrix, recode
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role
from ossquant.plan import QUANTIZED, Plan, make_plan, read_plan
from ossquant.recipe import parse_recipe
from ossquant.runtime.experts import Linear4bitExperts, NativeMxfp4Experts, linear4bit
from ossquant.runtime.hub_experts import KernelExperts, cannot_be
from ossquant.scheme import Scheme, expert_name
from ossquant.spec import ModelSpec

METHOD = "ossquant"
FORMAT_VERSION = 1
# the statistics that bitsandbytes keeps beside a 4-bit weight
_STATISTICS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
               ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")  # fmt: skip
_MATRIX = {Role.ATTENTION: r"(?<=[qkvo]_proj)\.weight", Role.LM_HEAD: r"(?<=lm_head)\.weight"}
_EXPERT = r"(?<=\d)\.weight"  # gate_up_projs.3.weight; nothing else ends in a number


@register_quantization_config(METHOD)
class OssquantConfig(QuantizationConfigMixin):
    """The schemes of experts, attention and lm_head, as tables of a recipe."""

    def __init__(
        self,
        experts: dict[str, Any],
        attention: dict[str, Any],
        lm_head: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise UnsupportedError(
                f"quantization_config has format_version {format_version}, this ossquant reads {FORMAT_VERSION}",
                hint="pip install -U ossquant",
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.experts = experts
        self.attention = attention
        self.lm_head = lm_head or {"format": "bf16"}


@register_quantizer(METHOD)
class OssquantQuantizer(HfQuantizer):
    """Builds the 4-bit modules and says how each stored tensor gets into them."""

    requires_calibration = False
    quantization_config: OssquantConfig
    source: Plan  # what the files hold
    plan: Plan  # what the model is to hold

    def __init__(self, quantization_config: OssquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # transformers then hands us the tensors as they are stored, whoever quantized them
        self.pre_quantized = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "OssquantQuantizer":
        # transformers copies a converter, and with it us, for every stored tensor
        return self

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), Linear4bit)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return super().param_element_size(model, param_name, param)
        scheme = self.plan.scheme(_role(param_name))
        total = sum(part.nbytes for part in scheme.stored("weight", tuple(param.shape)))
        return total / param.numel()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise UnsupportedError("ossquant loads from files, not from a state_dict", hint="pass the folder's path")
        spec = ModelSpec.from_config(model.config.to_dict())
        stored = [placed.tensor for file in checkpoint_files for placed in read_header(Path(file))]
        self.source = read_plan(spec, {tensor.name: tensor for tensor in stored})
        self.plan = make_plan(spec, parse_recipe(_tables(self.quantization_config), "quantization_config"))
        for role in QUANTIZED:
            self._check_reachable(role)
        self._replace_modules(model, model.dtype)
        self._model = weakref.ref(model)

    def _check_reachable(self, role: Role) -> None:
        stored, wanted = self.source.scheme(role), self.plan.scheme(role)
        if stored != wanted and stored.is_bnb:
            raise CheckpointError(
                f"the {role} are stored as {stored.format}, quantization_config says {wanted.format}",
                hint="config.json and the weights are not of the same checkpoint",
            )

    def _replace_modules(self, model: nn.Module, dtype: torch.dtype) -> None:
        experts = self.plan.scheme(Role.EXPERTS)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "GptOssExperts" and experts.is_bnb:
                model.set_submodule(name, Linear4bitExperts(model.config, experts, dtype))
            elif type(module).__name__ == "GptOssExperts" and experts.format == "mxfp4":
                model.set_submodule(name, NativeMxfp4Experts(model.config))
            elif type(module) is nn.Linear and (".self_attn." in name or name == "lm_head"):
                scheme = self.plan.scheme(_role(name))
                if scheme.is_bnb:
                    size = module.in_features, module.out_features
                    model.set_submodule(name, linear4bit(*size, scheme, dtype, bias=module.bias is not None))

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        experts = self.plan.scheme(Role.EXPERTS)
        converters = list(weight_conversions)
        if self.source.unsloth:
            converters.append(WeightRenaming(r"mlp\.router\.linear\.", "mlp.router."))
        for role, pattern in _MATRIX.items():
            if self.source.scheme(role).is_bnb:
                converters.append(_load_converter(self, pattern))
            elif self.plan.scheme(role).is_bnb:
                quantize = QuantizeMatrix(self, self.plan.scheme(role))
                converters.append(WeightConverter([pattern], ".weight", [quantize], force_cpu=True))
        stored = self.source.scheme(Role.EXPERTS)
        if stored.is_bnb:
            converters.append(_load_converter(self, _EXPERT))
        elif stored != experts:
            for projection in ("gate_up_proj", "down_proj"):
                converters += self._expert_converters(projection, stored, experts)
        return converters

    def _expert_converters(self, projection: str, stored: Scheme, wanted: Scheme) -> list[WeightConverter]:
        name = f"experts.{projection}"
        target = expert_name(name, 0) if wanted.is_bnb else f"{name}_blocks"
        sources = [f"{name}_blocks", f"{name}_scales"] if stored.format == "mxfp4" else [name]
        converters = [WeightConverter(sources, target, [QuantizeExperts(self, wanted)], force_cpu=True)]
        if wanted.is_bnb:
            bias = f"{name}_bias"
            converters.append(WeightConverter([bias], expert_name(bias, 0), [SplitBias()]))
        return converters

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_loaded(model, self.plan)
        # the names it has now are those it is saved under
        model._weight_conversions = []
        model.is_loaded_in_4bit = self.plan.has_bnb  # by which peft knows bitsandbytes' modules
        return model

    def is_serializable(self) -> bool:
        model = self._model()
        modules = tuple(model.modules()) if model is not None else ()
        if any(isinstance(module, KernelExperts) for module in modules):
            raise cannot_be("saved")
        if any(_is_repacked(module) for module in modules):
            raise UnsupportedError(
                "this model has run on AVX512-BF16, for which bitsandbytes repacks weights with a loss",
                hint="save before the first forward pass, or use `ossquant quantize` on its source",
            )
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {name: _as_bf16(name, tensor) for name, tensor in model.state_dict().items()}, {}

    @property
    def is_trainable(self) -> bool:
        model = self._model()
        return model is None or not any(isinstance(module, KernelExperts) for module in model.modules())


class LoadBnb4(ConversionOps):
    """A weight and its statistics, as stored, to a Params4bit."""

    def __init__(self, hf_quantizer: OssquantQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any) -> Any:
        tensors = {pattern.partition(r"\.weight")[2]: _only(value) for pattern, value in input_dict.items()}
        parts = {f"weight{suffix.replace(chr(92), '')}": tensor for suffix, tensor in tensors.items()}
        return {full_layer_name: params4bit(parts, "weight", model, full_layer_name)}


class QuantizeMatrix(ConversionOps):
    """A bf16 matrix to a Params4bit."""

    def __init__(self, hf_quantizer: OssquantQuantizer, scheme: Scheme) -> None:
        self.hf_quantizer = hf_quantizer
        self.scheme = scheme

    def convert(self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any) -> Any:
        (value,) = input_dict.values()
        parts = recode(_bf16_bits(_only(value)), self.scheme, full_layer_name)
        return {full_layer_name: params4bit(_tensors(parts), full_layer_name, model, full_layer_name)}


class QuantizeExperts(ConversionOps):
    """A stack of experts, bf16 or MXFP4, to one Params4bit an expert, or to a stack in MXFP4."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: OssquantQuantizer, scheme: Scheme) -> None:
        self.hf_quantizer = hf_quantizer
        self.scheme = scheme

    def convert(self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any) -> Any:
        stack = {pattern: _only(value) for pattern, value in input_dict.items()}
        projection = next(iter(stack)).removesuffix("_blocks").removesuffix("_scales")
        name = full_layer_name.partition("experts.")[0] + projection
        experts = next(iter(stack.values())).shape[0]

        def code(expert: int) -> dict[str, Tensor]:
            return _tensors(recode(_expert_matrix(stack, projection, expert), self.scheme, name, expert))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            coded = list(pool.map(code, range(experts)))
        if not self.scheme.is_bnb:
            return {part: torch.stack([parts[part] for parts in coded]) for part in coded[0]}
        weights = {}
        for expert, parts in enumerate(coded):
            weight = expert_name(name, expert)
            weights[weight] = params4bit(parts, weight, model, weight)
        return weights


class SplitBias(ConversionOps):
    """A stack of expert biases to one bias an expert."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> Any:
        ((pattern, value),) = input_dict.items()
        name = full_layer_name.partition("experts.")[0] + pattern
        return {expert_name(name, expert): row.clone() for expert, row in enumerate(_only(value))}


def params4bit(parts: dict[str, Tensor], name: str, model: nn.Module, target: str) -> Params4bit:
    """Build the parameter called target in the model from the stored parts called name."""
    data = parts[name]
    statistics = {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items() if part != name}
    module = model.get_submodule(target.removesuffix(".weight"))
    return Params4bit.from_prequantized(data, statistics, device=data.device, module=module)


def check_loaded(model: nn.Module, plan: Plan) -> None:
    """Raise CheckpointError unless every parameter is there and each that should be in 4 bits is."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise CheckpointError(f"'{name}' was not loaded", hint="spilling to disk is not supported; free memory")
    expected, found = plan.parameters_4bit, parameters_4bit(model)
    if found != expected:
        raise CheckpointError(
            f"{found:,} parameters are in 4 bits, {expected:,} should be", hint="report this as a bug"
        )


def parameters_4bit(model: nn.Module) -> int:
    """Count the parameters that really lie in four bits."""
    return sum(_module_4bit(module) for module in model.modules())


def _module_4bit(module: nn.Module) -> int:
    if isinstance(module, NativeMxfp4Experts):
        return 2 * (module.gate_up_proj_blocks.numel() + module.down_proj_blocks.numel())
    if isinstance(module, KernelExperts):
        return module.parameters_4bit
    if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is not None:
        return 2 * module.weight.numel() if module.weight.dtype == torch.uint8 else 0
    return 0


def _load_converter(quantizer: OssquantQuantizer, pattern: str) -> WeightConverter:
    sources = [pattern + suffix.replace(".", r"\.") for suffix in _STATISTICS]
    return WeightConverter(sources, ".weight", [LoadBnb4(quantizer)])


def _tables(config: OssquantConfig) -> dict[str, Any]:
    return {
        "name": METHOD, "why": "as stored",
        "experts": config.experts, "attention": config.attention, "lm_head": config.lm_head,
    }  # fmt: skip


def _role(name: str) -> Role:
    if ".experts." in name:
        return Role.EXPERTS
    return Role.LM_HEAD if name.startswith("lm_head") else Role.ATTENTION


def _only(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _bf16_bits(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def _expert_matrix(stack: dict[str, Tensor], projection: str, expert: int) -> Matrix:
    if projection in stack:
        return _bf16_bits(stack[projection][expert].t())
    blocks, scales = stack[f"{projection}_blocks"], stack[f"{projection}_scales"]
    return Mxfp4Matrix(blocks[expert].numpy(), scales[expert].numpy())


def _tensors(parts: dict[str, Any]) -> dict[str, Tensor]:
    # some parts are constants that all tensors share, or not writable
    return {name: torch.from_numpy(part.copy() if part.size <= 4096 else part) for name, part in parts.items()}


def _as_bf16(name: str, tensor: Tensor) -> Tensor:
    """The form in which a checkpoint keeps what is not in four bits, whatever the model computes in."""
    if not tensor.is_floating_point() or ".weight." in name:  # bitsandbytes' statistics are fp32
        return tensor
    cast = tensor.to(torch.bfloat16)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise UnsupportedError(f"'{name}' has changed in {tensor.dtype}, a checkpoint keeps it in bf16",
                               hint="round it first: model.to(torch.bfloat16)")  # fmt: skip
    return cast


def _is_repacked(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
