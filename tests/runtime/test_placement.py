"""Models on several devices, on the host, and in the files: the same logits, and no byte too many."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from ossquant.errors import DoesNotFitError, UnsupportedError, UsageError
from ossquant.memory.terms import Workload
from ossquant.memory.transformers import activation_bytes, kv_cache_bytes
from ossquant.place import HOST_RESERVE, part_bytes
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.runtime.host_trial import NEVER
from ossquant.runtime.load import DEFAULT_CONTEXT, load_model, placement
from ossquant.spec import ModelSpec
from ossquant.units import GIB

IDS = torch.arange(5, 105)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(("stream_from", "computed_on"), [("1", ["lazy"]), (str(NEVER), ["cpu"]), ("measured", None)])
def test_across_devices(stream_from: str, computed_on: list[str] | None, trained: Path) -> None:
    """Experts on the host, computed there or streamed: nothing mixes devices, and the logits are those of one."""
    script = Path(__file__).parent / "two_devices.py"
    command = [sys.executable, str(script), str(trained), stream_from]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["error"] < 1e-5
    assert found["same_tokens"]
    assert found["plan"] == "plan: 4.04 MB on lazy:0; 655.36 kB on cpu (experts of 2 of 4 layers)"
    assert found["bytes"] == {"lazy:0": 4040640, "cpu": 655360}
    (line,) = found["host"]  # nobody but CUDA's driver locks pages
    assert re.fullmatch(r"experts on the host: (computed there( below \d+ tokens)?|always copied over)(, .*)?", line)
    if computed_on:
        assert found["computed_on"] == computed_on


def test_experts_stay_in_the_files(trained: Path) -> None:
    """With too little host memory experts stay on disk, which is said, and nothing else changes."""
    plan = make_plan(ModelSpec.from_config(json.loads((trained / "config.json").read_text())), built_in("mxfp4"))
    sizes, workload = part_bytes(plan), Workload(max_model_len=min(DEFAULT_CONTEXT, plan.spec.max_position_embeddings))
    computing = activation_bytes(plan, workload) + kv_cache_bytes(plan, workload)
    cap = HOST_RESERVE + computing + sum(sizes.values()) - 2 * sizes["model.layers.0.mlp.experts"]
    said: list[str] = []
    model, _ = load_model(trained, scheme="mxfp4", max_memory={"cpu": cap}, announce=said.append)
    assert "on disk (experts of 2 of 4 layers)" in said[0]
    assert any("read from disk" in line for line in said)
    whole, _ = load_model(trained, scheme="mxfp4")
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=0)


def test_on_disk_means_in_the_files(trained: Path) -> None:
    """Experts that stay on disk take no memory of the process' own: they are mapped."""
    model, _ = load_model(trained, device_map={"": "cpu", "model.layers.3.mlp.experts": "disk"}, scheme="hybrid")
    blocks = model.model.layers[3].mlp.experts.gate_up_proj_blocks
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(trained) in line]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert any(begin <= blocks.data_ptr() < end for begin, end in ranges)


@pytest.mark.parametrize("scheme", ("nf4", "fp4", "bf16"))
def test_only_mapped_experts_can_stay(scheme: str, trained: Path) -> None:
    """What is changed on load, or repacked, cannot stay in the files: one sentence that says what can."""
    with pytest.raises(UnsupportedError, match="only experts in MXFP4"):
        load_model(trained, scheme=scheme, device_map={"": "cpu", "model.layers.0.mlp.experts": "disk"})
    with pytest.raises(DoesNotFitError, match="host memory"):
        load_model(trained, scheme=scheme, max_memory={"cpu": HOST_RESERVE + 2**20})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"device_map": "cuda:7"}, "no device 'cuda:7'"),
        ({"device_map": "gpu"}, "no device 'gpu'"),
        ({"device_map": {"": "cpu", "model.layers.0.self_attn": "disk"}}, "cannot be placed by itself"),
        ({"device_map": {"model.layers": "cpu"}}, "nothing says where"),
        ({"max_memory": {7: "10GiB"}}, "no device 'cuda:7'"),
        ({"max_memory": {"cpu": "much"}}, "much"),
        ({"attn_implementation": "eagre"}, "eagre"),
        ({"attn_implementation": "flash_attention_4"}, "needs a CUDA GPU"),
    ],
)
def test_what_cannot_be_is_said(arguments: dict[str, object], match: str, trained: Path) -> None:
    """One sentence, before anything is read."""
    with pytest.raises((UsageError, UnsupportedError), match=match):
        load_model(trained, **arguments)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("scheme", ("hybrid", "nf4", "fp4", "mxfp4", "bf16"))
def test_planned_bytes_are_loaded(scheme: str, dtype: str, trained: Path) -> None:
    """The plan's bytes and the loaded tensors' agree within 1 %, bitsandbytes' maps of each expert aside."""
    said: list[str] = []
    model, _ = load_model(trained, scheme=scheme, dtype=dtype, announce=said.append)
    plan = make_plan(ModelSpec.from_config(model.config.to_dict()), built_in(scheme))
    planned = sum(part_bytes(plan, 4 if dtype == "float32" else 2).values())
    loaded = sum(placement(model).bytes_by_device.values())
    assert loaded == pytest.approx(planned, rel=0.01)
    assert said[0].startswith("plan: ")


def test_bitsandbytes_config_as_users_write_it(trained: Path) -> None:
    """The experts are in NF4, too, and the weights are those of `scheme='nf4'`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model, _ = load_model(trained, quantization_config=config, device_map="auto")
    plan = make_plan(ModelSpec.from_config(model.config.to_dict()), built_in("nf4"))
    assert placement(model).parameters_4bit == plan.parameters_4bit
    assert model.dtype == torch.bfloat16
    same, _ = load_model(trained, scheme="nf4")
    torch.testing.assert_close(logits(model), logits(same), rtol=0, atol=0)


def test_one_word_for_the_format(trained: Path) -> None:
    """scheme and quantization_config exclude each other."""
    with pytest.raises(UsageError, match="exclude each other"):
        load_model(trained, scheme="nf4", quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_room_for_the_cache_is_planned(trained: Path) -> None:
    """What cannot fit beside its working memory is refused with fit's advice."""
    with pytest.raises(DoesNotFitError, match="do not go into host memory") as caught:
        load_model(trained, scheme="nf4", max_memory={"cpu": GIB})
    assert "ossquant fit" in caught.value.hint
