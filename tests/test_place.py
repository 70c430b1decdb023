"""Where the parts of the real 20b and 120b go: nothing over its budget, nothing left out, as much as fits up front."""

import pytest

from ossquant.errors import DoesNotFitError, UsageError
from ossquant.memory.terms import Workload
from ossquant.memory.transformers import (
    activation_bytes,
    kv_cache_bytes,
    kv_cache_bytes_of_layer,
    layer_expert_bytes,
    streaming_bytes,
    working_bytes,
)
from ossquant.place import DISK, HOST, HOST_RESERVE, DevicePlan, part_bytes, plan_devices, read_device_map
from ossquant.plan import Plan, make_plan
from ossquant.recipe import built_in
from ossquant.spec import ModelSpec
from ossquant.units import GIB

PLENTY = 256 * GIB


def plan_of(model: str, scheme: str = "hybrid") -> Plan:
    return make_plan(ModelSpec.published(model), built_in(scheme))


def on_host(devices: DevicePlan) -> int:
    return devices.experts.count(HOST)


@pytest.mark.parametrize("scheme", ("hybrid", "nf4", "mxfp4"))
@pytest.mark.parametrize("model", ("20b", "120b"))
@pytest.mark.parametrize(
    "gpus", ([80], [24], [16], [12], [8], [24, 24], [12, 24], [24, 12], [12] * 4, [80, 80], [48], [8] * 8)
)
def test_no_device_is_overfilled(model: str, scheme: str, gpus: list[int]) -> None:
    """Weights, cache, room to work and to copy experts stay within every accelerator; every byte is placed once."""
    plan, workload = plan_of(model, scheme), Workload()
    free = {f"cuda:{index}": gigabytes * GIB for index, gigabytes in enumerate(gpus)}
    devices = plan_devices(plan, free | {HOST: PLENTY}, workload)
    assert sum(devices.nbytes.values()) == plan.nbytes == sum(part_bytes(plan).values())
    assert set(devices.layers) <= set(free)
    computing = working_bytes(plan, workload) + (streaming_bytes(plan) if on_host(devices) else 0)
    spare = 0
    for device, nbytes in free.items():
        here = (layer for layer, placed in enumerate(devices.layers) if placed == device)
        cache = sum(kv_cache_bytes_of_layer(plan, workload, layer) for layer in here)
        left = nbytes - devices.nbytes.get(device, 0) - computing - cache
        assert left >= 0
        spare = max(spare, left)
    if on_host(devices):  # not one more layer's experts would have gone in beside its attention
        assert spare < 2 * layer_expert_bytes(plan) + 2 * GIB


def test_the_120b_runs_on_a_card_of_24_gb_and_the_host() -> None:
    """Attention of all layers and the experts of some on the card, the other experts on the host."""
    devices = plan_devices(plan_of("120b"), {"cuda:0": 23 * GIB, HOST: 64 * GIB}, Workload())
    assert set(devices.layers) == {"cuda:0"}
    assert 20 < on_host(devices) < 30
    assert devices.crosses
    assert f"experts of {on_host(devices)} of 36 layers" in str(devices)
    moved = devices.device_map()
    assert moved["model.layers.0.mlp.experts"] == HOST
    assert moved["model.layers.35.mlp.experts"] == "cuda:0"
    assert moved["model.embed_tokens"] == moved["lm_head"] == "cuda:0"


def test_buffers_for_experts_on_the_host_are_kept_free() -> None:
    """A card is full to the byte with its weights, cache, room to work, and two experts' buffers."""
    plan, workload = plan_of("120b"), Workload()
    planned = plan_devices(plan, {"cuda:0": 23 * GIB, HOST: PLENTY}, workload)
    full = planned.nbytes["cuda:0"] + kv_cache_bytes(plan, workload) + working_bytes(plan, workload)
    full += streaming_bytes(plan)
    for free, more in ((full, 0), (full - 1, 1)):
        found = plan_devices(plan, {"cuda:0": free, HOST: PLENTY}, workload)
        assert on_host(found) == on_host(planned) + more


def test_everything_on_one_device_where_it_fits() -> None:
    """A 24-GB card holds the whole 20b: nothing crosses, nothing is on the host."""
    devices = plan_devices(plan_of("20b"), {"cuda:0": 23 * GIB, "cuda:1": 23 * GIB, HOST: PLENTY}, Workload())
    assert set(devices.device_map().values()) == {"cuda:0"}
    assert not devices.crosses


def test_a_longer_context_moves_experts() -> None:
    """The cache and attention's scores of a longer context take the room of experts."""
    free = {"cuda:0": 23 * GIB, HOST: PLENTY}
    short, long = (plan_devices(plan_of("120b"), free, Workload(max_model_len=n)) for n in (4096, 32768))
    assert on_host(short) < on_host(long)


def test_disk_is_last() -> None:
    """What the host cannot hold stays in the files, as little as needed; only mapped experts can."""
    plan = plan_of("120b")
    devices = plan_devices(plan, {HOST: 32 * GIB}, Workload(), mapped=True)
    room = 32 * GIB - HOST_RESERVE - activation_bytes(plan, Workload()) - kv_cache_bytes(plan, Workload())
    assert devices.nbytes[HOST] <= room < devices.nbytes[HOST] + layer_expert_bytes(plan)
    assert devices.experts.count(DISK) == pytest.approx(devices.nbytes[DISK] / layer_expert_bytes(plan))
    assert not devices.crosses
    assert set(devices.device_map().values()) == {HOST}
    with pytest.raises(DoesNotFitError, match="host memory"):
        plan_devices(plan, {HOST: 32 * GIB}, Workload())


@pytest.mark.parametrize("free", ({"cuda:0": 3 * GIB, HOST: PLENTY}, {"cuda:0": 23 * GIB, HOST: 20 * GIB}, {HOST: GIB}))
def test_too_little_is_one_sentence(free: dict[str, int]) -> None:
    """What is needed, what is free, and where to see what fits."""
    with pytest.raises(DoesNotFitError, match=r"GB.* are (needed|free)") as caught:
        plan_devices(plan_of("120b", "nf4"), free, Workload())
    assert "ossquant fit --gpu" in caught.value.hint


def test_float32_takes_more() -> None:
    """Computing in float32 doubles what is not quantized, and only that."""
    plan = plan_of("20b")
    wide, narrow = part_bytes(plan, 4), part_bytes(plan, 2)
    assert wide["model.embed_tokens"] == 2 * narrow["model.embed_tokens"]
    biases = 2 * 32 * (5760 + 2880)
    assert wide["model.layers.0.mlp.experts"] == narrow["model.layers.0.mlp.experts"] + biases


def test_a_map_by_the_user() -> None:
    """The longest name wins; numbers are CUDA devices; what is on disk is mapped into the host."""
    plan = plan_of("20b")
    devices = read_device_map(
        plan, {"": 0, "model.layers.1": "cuda:1", "model.layers.1.mlp.experts": "cpu", "lm_head": "cuda",
               "model.layers.2.mlp.experts": "disk"}
    )  # fmt: skip
    assert devices.layers[:3] == ("cuda:0", "cuda:1", "cuda:0")
    assert devices.experts[:4] == ("cuda:0", HOST, DISK, "cuda:0")
    assert devices.device_map()["model.layers.2.mlp.experts"] == HOST
    assert devices.device_map()["model.layers.10.mlp.experts"] == "cuda:0"
    assert sum(devices.nbytes.values()) == plan.nbytes


@pytest.mark.parametrize(
    ("device_map", "match"),
    [
        ({"model.layers": 0}, "nothing says where 'model.embed_tokens' goes"),
        ({"": 0, "model.layers.3.self_attn": "cpu"}, "'model.layers.3.self_attn' cannot be placed by itself"),
        ({"": 0, "model.layers.24": "cpu"}, "model.layers.24"),
        ({"": 0, "lm_head": "disk"}, "'lm_head' cannot stay on disk"),
        ({"": "disk"}, "'model.embed_tokens' cannot stay on disk"),
    ],
)
def test_a_map_that_cannot_be(device_map: dict[str, object], match: str) -> None:
    """One sentence that names the part."""
    with pytest.raises(UsageError, match=match):
        read_device_map(plan_of("20b"), device_map)
