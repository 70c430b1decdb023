import json
import shutil
import subprocess
import sys
from copy import copy
from pathlib import Path

import bitsandbytes
import pytest
import torch
from reference import reference_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from ossquant import load_model
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError, DoesNotFitError, UnsupportedError, UsageError
from ossquant.layout import Role
from ossquant.plan import make_plan
from ossquant.quantize import quantize
from ossquant.recipe import Recipe, built_in
from ossquant.runtime import devices, quantizer
from ossquant.runtime.load import placement
from ossquant.scheme import Scheme

FOUR_BIT = ("hybrid", "nf4", "fp4")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # torch's mean, which double quantization takes, differs in the last bit with the number of threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    """Two sequences longer than the sliding window of 128."""
    return torch.randint(0, 600, (2, 300), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt).logits


@pytest.mark.parametrize("scheme", (*FOUR_BIT, "mxfp4", "bf16"))
def test_logits_equal_the_reference(
    scheme: str, trained: Path, random_tiny: Path, quantized: dict[str, Path], prompt: torch.Tensor
) -> None:
    """In fp32 both ways of loading give the logits of transformers' own modules, to 1e-5."""
    for source, ours in ((trained, quantized[scheme]), (random_tiny, None)):
        expected = logits(reference_model(source, scheme), prompt)
        for path in filter(None, (source, ours)):
            model, _ = load_model(path, scheme=scheme, dtype="float32")
            found = logits(model, prompt)
            assert (found - expected).norm() / expected.norm() <= TOLERANCE


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_loading_twice_is_identical(
    scheme: str, trained: Path, quantized: dict[str, Path], prompt: torch.Tensor
) -> None:
    """Quantized on load from MXFP4 or from bf16, or from our checkpoint: the very same logits."""
    paths = (trained, quantized["bf16"], quantized[scheme])
    found = [logits(load_model(path, scheme=scheme, dtype="float32")[0], prompt) for path in paths]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_saved_model_loads_the_same_in_a_fresh_process(
    scheme: str, trained: Path, prompt: torch.Tensor, tmp_path: Path
) -> None:
    """save_pretrained, then load_model and plain from_pretrained in a new process: difference 0.0."""
    model, _ = load_model(trained, scheme=scheme, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    for path in trained.glob("*token*"):
        shutil.copy(path, tmp_path / "saved")
    torch.save((prompt, logits(model, prompt)), tmp_path / "expected.pt")
    program = f"""
import torch, ossquant.runtime
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
prompt, expected = torch.load({str(tmp_path / "expected.pt")!r})
ours = ossquant.load_model({str(tmp_path / "saved")!r}, dtype="float32")[0]
plain = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r}, dtype=torch.float32)
with torch.no_grad():
    print([(model(prompt).logits - expected).abs().max().item() for model in (ours, plain)])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[0.0, 0.0]", result.stderr


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_every_expert_and_attention_weight_is_in_4_bits(scheme: str, quantized: dict[str, Path]) -> None:
    """The parameters found in 4 bits are the plan's, and the bytes loaded are the plan's within 1 %."""
    model, _ = load_model(quantized[scheme])
    with open_checkpoint(quantized[scheme]) as checkpoint:
        plan = make_plan(checkpoint.spec, built_in(scheme))
    placed = placement(model)
    assert placed.parameters_4bit == plan.parameters_4bit
    assert placed.parameters == plan.parameters
    assert sum(placed.bytes_by_device.values()) == pytest.approx(plan.nbytes, rel=0.01)
    assert "4 bits" in str(placed)
    assert "cpu" in str(placed)


def test_an_expert_left_in_16_bits_is_an_error(quantized: dict[str, Path]) -> None:
    """A model in which one expert lost its 4 bits does not pass for a 4-bit model."""
    model, _ = load_model(quantized["nf4"])
    experts = model.model.layers[0].mlp.experts
    experts.down_projs[3] = torch.nn.Linear(128, 192, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="should be"):
        quantizer.check_loaded(model, model.hf_quantizer.plan)


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_stock_transformers_refuses_our_checkpoints(scheme: str, quantized: dict[str, Path]) -> None:
    """Without ossquant.runtime transformers raises, instead of loading random experts."""
    program = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(quantized[scheme])!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Error" in result.stderr.splitlines()[-1]


def test_stock_load_in_4bit_leaves_the_experts_in_bf16(quantized: dict[str, Path]) -> None:
    """The trap we are here for: on the same model stock bitsandbytes puts attention alone in 4 bits."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stock = AutoModelForCausalLM.from_pretrained(quantized["bf16"], quantization_config=config, device_map="cpu")
    ours, _ = load_model(quantized["nf4"])
    assert stock.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert quantizer.parameters_4bit(stock) < 0.25 * quantizer.parameters_4bit(ours)


def test_plain_from_pretrained_quantizes_a_bf16_checkpoint(quantized: dict[str, Path], prompt: torch.Tensor) -> None:
    """OssquantConfig is accepted where users put a BitsAndBytesConfig."""
    nf4 = {"format": "nf4"}
    config = quantizer.OssquantConfig(experts=nf4, attention=nf4)
    model = AutoModelForCausalLM.from_pretrained(
        quantized["bf16"], quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    ours, _ = load_model(quantized["nf4"], dtype="float32")
    assert torch.equal(logits(model, prompt), logits(ours, prompt))


def test_saving_after_a_lossy_repack_is_refused(quantized: dict[str, Path], tmp_path: Path) -> None:
    """Where bitsandbytes repacks weights on the first pass, what it would save is no longer the checkpoint."""
    model, _ = load_model(quantized["nf4"])
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    if not any(quantizer._is_repacked(module) for module in model.modules()):
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    with pytest.raises(UnsupportedError, match="repacks"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_changed_fp32_weights_are_not_rounded_in_silence(trained: Path, tmp_path: Path) -> None:
    """A norm trained in fp32 is not cut to bf16 when the model is saved."""
    model, _ = load_model(trained, scheme="hybrid", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight += 1e-5
    with pytest.raises(UnsupportedError, match="norm"):
        model.save_pretrained(tmp_path / "saved")


def test_bf16_experts_need_a_word(quantized: dict[str, Path]) -> None:
    """A bf16 checkpoint is not quantized, nor left as it is, without being asked."""
    with pytest.raises(UsageError, match="bf16"):
        load_model(quantized["bf16"])


def test_scheme_must_be_the_stored_one(quantized: dict[str, Path]) -> None:
    """What bitsandbytes has quantized is not quantized to something else."""
    with pytest.raises(UnsupportedError, match="nf4"):
        load_model(quantized["nf4"], scheme="fp4")


@pytest.mark.parametrize("implementation", ("sdpa", "flash_attention_2"))
def test_attention_without_sinks_is_refused(implementation: str, quantized: dict[str, Path]) -> None:
    """Asking for attention that drops the sinks gets the reason and the alternative."""
    with pytest.raises(UnsupportedError, match="sinks") as caught:
        load_model(quantized["nf4"], attn_implementation=implementation)
    assert "eager" in caught.value.hint


def test_too_little_memory_is_said_beforehand(quantized: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beyond the free memory are an error before anything is read."""
    monkeypatch.setattr(devices, "available_host_memory", lambda: 10**6)
    with pytest.raises(DoesNotFitError, match="memory"):
        load_model(quantized["nf4"])
    for device_map in ("cpu", {"": "cpu"}):
        with pytest.raises(DoesNotFitError, match="weights are to go to cpu"):
            load_model(quantized["nf4"], device_map=device_map)


@pytest.mark.parametrize("damage", ("missing", "unexpected", "shape", "format"))
def test_a_damaged_checkpoint_does_not_load(damage: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A missing, unexpected or mismatched tensor is an error, also for plain from_pretrained."""
    folder = tmp_path / "damaged"
    shutil.copytree(quantized["nf4"], folder)
    _damage(folder, damage)
    with pytest.raises(CheckpointError):
        load_model(folder)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dropped_quantization_config_is_noticed(quantized: dict[str, Path], tmp_path: Path) -> None:
    """Deleting quantization_config, the usual dodge, does not lead to random experts."""
    folder = tmp_path / "dropped"
    shutil.copytree(quantized["nf4"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not say so"):
        load_model(folder)


def _damage(folder: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.1.mlp.experts.down_projs.5.weight"
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    if damage == "missing":
        del tensors[name], index["weight_map"][name]
    elif damage == "unexpected":
        tensors["model.layers.1.extra"] = torch.zeros(2)
        index["weight_map"]["model.layers.1.extra"] = shard.name
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "format":
        config["quantization_config"]["experts"]["format"] = "fp4"
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def test_every_mode_plans_devices_on_the_real_shapes() -> None:
    """device_map='auto' sizes a 4-bit weight as its stored bytes: on the 20b within 1 % of the plan."""
    from ossquant.quantize import quantization_config
    from ossquant.spec import ModelSpec

    spec = ModelSpec.published("20b")
    for scheme in FOUR_BIT:
        plan = make_plan(spec, built_in(scheme))
        config = quantizer.OssquantConfig(
            **{k: v for k, v in quantization_config(plan.scheme(Role.EXPERTS), plan.scheme(Role.ATTENTION)).items()}
        )
        model = _meta_model(spec, config, plan)
        total = sum(
            model.hf_quantizer.param_element_size(model, name, parameter) * parameter.numel()
            for name, parameter in model.named_parameters()
        )
        assert total == pytest.approx(plan.nbytes, rel=0.01)


def _meta_model(spec, config, plan):  # type: ignore[no-untyped-def]
    """A full-size model without data, as the quantizer builds it."""
    from dataclasses import asdict

    from transformers import GptOssConfig, GptOssForCausalLM

    fields = asdict(spec) | {"layer_types": list(spec.layer_types), "tie_word_embeddings": False}
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**fields)).to(torch.bfloat16)
        model.hf_quantizer = quantizer.OssquantQuantizer(config)
        model.hf_quantizer.plan = plan
        model.hf_quantizer._replace_modules(model, torch.bfloat16)
    return model


def test_config_of_another_format_version_is_refused(quantized: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint of a later ossquant is refused, with the cure."""
    folder = tmp_path / "later"
    shutil.copytree(quantized["hybrid"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="format_version 2"):
        load_model(folder)


def test_the_source_config_survives(quantized: dict[str, Path], trained: Path) -> None:
    """transformers reads the same model from our config.json as from the source's."""
    ours, source = (AutoConfig.from_pretrained(path).to_dict() for path in (quantized["nf4"], trained))
    differing = {key for key in ours if ours[key] != source.get(key)}
    assert differing <= {"quantization_config", "_name_or_path", "name_or_path"}


def test_fp32_is_not_computed_in_bf16(quantized: dict[str, Path]) -> None:
    """bitsandbytes' AVX512-BF16 path, which computes in bf16 whatever the dtype, is off in fp32."""
    model, _ = load_model(quantized["nf4"], dtype="float32")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert not any(quantizer._is_repacked(module) for module in model.modules())


def test_lm_head_in_nf4(trained: Path, tmp_path: Path) -> None:
    """An lm_head in NF4 loads as such, and gives the logits of its dequantized weights."""
    schemes = {Role.EXPERTS: Scheme("mxfp4"), Role.ATTENTION: Scheme("nf4"), Role.LM_HEAD: Scheme("nf4")}
    quantize(trained, tmp_path / "head", Recipe("head", "", schemes))
    model, _ = load_model(tmp_path / "head", dtype="float32")
    plain, _ = load_model(trained, scheme="hybrid", dtype="float32")
    state = copy(model.lm_head.weight.quant_state)
    state.dtype = torch.float32
    with torch.no_grad():
        plain.lm_head.weight.copy_(bitsandbytes.functional.dequantize_4bit(model.lm_head.weight.data, state))
    prompt = torch.arange(40).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(prompt).logits, plain(prompt).logits, rtol=0, atol=1e-4)
    assert placement(model).parameters_4bit == placement(plain).parameters_4bit + plain.lm_head.weight.numel()


def test_int4_does_not_run(trained: Path, quantized: dict[str, Path]) -> None:
    """INT4 is for vLLM."""
    with pytest.raises(UsageError, match="int4"):
        load_model(trained, scheme="int4")
    with pytest.raises(UnsupportedError, match="vLLM"):
        load_model(quantized["int4"])
