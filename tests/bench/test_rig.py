import pytest

from ossquant.bench.rig import find_rig, served_plan
from ossquant.decode import bytes_per_token
from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec


@pytest.mark.parametrize(
    ("size", "name", "nbytes"),
    [("20b", "mxfp4", 3.73e9), ("120b", "mxfp4", 5.04e9), ("20b", "gguf-q8", 2.59e9), ("120b", "gguf-q8", 3.60e9)],
)
def test_bytes_of_a_token(size: str, name: str, nbytes: float) -> None:
    """What a token reads agrees with the published reckoning to 1 %, which counts a little of the cache, too."""
    assert bytes_per_token(make_plan(ModelSpec.published(size), FORMATS[name])) == pytest.approx(nbytes, rel=0.01)


def test_a_served_model_is_known_by_its_name() -> None:
    """20b and 120b are found in a name, with the engine's usual format or the one that is given; else it says why."""
    plan = served_plan("openai/gpt-oss-20b", "vllm", None)
    assert isinstance(plan, Plan)
    assert bytes_per_token(plan) == bytes_per_token(make_plan(ModelSpec.published("20b"), FORMATS["mxfp4"]))
    given = served_plan("gpt-oss:120b", "unknown", "gguf-q8")
    assert isinstance(given, Plan)
    assert given.spec == ModelSpec.published("120b")
    assert served_plan("gpt-oss-20b", "unknown", None) == "what the server holds is not known: --format says it"
    assert served_plan("my-model", "vllm", None) == "'my-model' is neither named 20b nor 120b"
    with pytest.raises(UsageError, match="unknown format 'mxfp5'"):
        served_plan("gpt-oss-20b", "vllm", "mxfp5")


def test_the_roof_is_bandwidth_by_bytes() -> None:
    """1008 GB/s over the bytes of a token; two devices side by side have twice the roof, layer by layer the same."""
    plan = make_plan(ModelSpec.published("20b"), FORMATS["gguf-q8"])
    one = find_rig("4090", None, plan, absent=None, layered=False)
    assert one.roof_tokens_per_second == pytest.approx(1008e9 / bytes_per_token(plan))
    two = find_rig("2x4090", None, plan, absent=None, layered=False)
    layered = find_rig("2x4090", None, plan, absent=None, layered=True)
    assert two.roof_tokens_per_second == pytest.approx(2 * (one.roof_tokens_per_second or 0))
    assert layered.roof_tokens_per_second == pytest.approx(one.roof_tokens_per_second)
    assert one.described["device"] == "GeForce RTX 4090"


def test_rent_is_the_tables_or_as_given() -> None:
    """The table's price for so many devices, or the user's for all; neither is said to be unknown."""
    plan = make_plan(ModelSpec.published("20b"), FORMATS["mxfp4"])
    table = find_rig("h100 sxm", None, plan, absent=None, layered=False).usd_per_hour
    assert table
    assert find_rig("2x h100 sxm", None, plan, absent=None, layered=False).usd_per_hour == pytest.approx(2 * table)
    assert find_rig("h100 sxm", 1.5, plan, absent=None, layered=False).usd_per_hour == 1.5
    with pytest.raises(UsageError):
        find_rig(None, 0.0, plan, absent=None, layered=False)


def test_what_is_not_known_is_said() -> None:
    """Without a device, its bandwidth or the model, there is no roof, and the reason is there."""
    plan = make_plan(ModelSpec.published("20b"), FORMATS["mxfp4"])
    away = find_rig(None, None, plan, absent="the server is on another machine", layered=False)
    assert (away.roof_tokens_per_second, away.usd_per_hour) == (None, None)
    assert away.why["roofline_share"] == "the server is on another machine: --gpu names its device"
    assert "--usd-per-hour" in away.why["usd_per_million_tokens"]
    assert find_rig("24GB", None, plan, absent=None, layered=False).why["roofline_share"].endswith("is not known")
    unknown = find_rig("4090", None, "'x' is neither named 20b nor 120b", absent=None, layered=False)
    assert unknown.why["roofline_share"] == "'x' is neither named 20b nor 120b"
