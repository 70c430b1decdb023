"""Documents of each kind to report on."""

from dataclasses import replace

from made_results import result, scenario
from ossquant.bench.compare import compare
from ossquant.bench.comparison import Comparison
from ossquant.bench.gate import parse_gate
from ossquant.bench.quality_result import QualityCandidate, QualityMetric, QualityResult
from ossquant.bench.result import Result, Target
from ossquant.bench.runs import Runs

HOSTILE = (
    "<script>document.title='mine'</script>\"'&|`*[x](javascript:0) \u202e\x1b[2J\ud800 "
    "<img src=http://127.0.0.1:9/x onerror=alert(2)> ]]> --> | @somebody"
)
LOADS = (1, 4, 16, 64)


def loaded_result(slower: float = 1.0, minute: int = 0) -> Result:
    """A run at several concurrencies; slower divides throughput."""
    scenarios = []
    for load in LOADS:
        rate = 200 * load / (1 + 0.05 * load) / slower
        made = scenario(
            f"concurrency={load}", ttft=0.05 + 0.004 * load, tpot=load / rate, e2e=2.0 + 0.1 * load,
            output_tokens_per_second=rate * (1 + 0.001 * minute), tokens_per_second_per_user=rate / load,
        )  # fmt: skip
        scenarios.append(
            replace(made, shape={"kind": "closed", "concurrency": load}, unmeasured={"power_watts": "none"})
        )
    return result(*scenarios, minute=minute)


def comparison() -> Comparison:
    """Three pairs in which head is 10 % slower; one limit is kept, another is not."""
    base = Runs("base", "out/base", tuple(loaded_result(1.0, minute) for minute in (0, 3, 4)))
    head = Runs("head", "out/head", tuple(loaded_result(1.1, minute) for minute in (1, 2, 5)))
    gate = parse_gate(
        {
            "output_tokens_per_second": {"max_regression": 0.05, "scenarios": ["concurrency=16"]},
            "ttft": {"max": 0.2, "max_regression": 0.05},
        },
        "gate.toml",
    )
    return compare(base, head, gate, in_turns=True)


def hostile_result() -> Result:
    """A run whose every text is hostile."""
    made = scenario(HOSTILE, invalid=HOSTILE, ttft=0.1, output_tokens_per_second=10.0)
    target = Target("endpoint", HOSTILE, HOSTILE, HOSTILE)
    return replace(
        result(made), target=target, created=HOSTILE, environment={HOSTILE: [HOSTILE]}, settings={HOSTILE: 1}
    )


def _candidate(name: str, nbytes: int, kld: float, rate: float) -> QualityCandidate:
    metrics = {
        "kld_mean": QualityMetric(kld, "nat", "lower", 12_000, kld / 20, kld / 40),
        "kld_p99": QualityMetric(12 * kld, "nat", "lower", 12_000, kld, None),
        "ppl_ratio": QualityMetric(1 + kld, "1", "lower", 12_000, 0.001, 0.0005),
        "same_top": QualityMetric(100 - 600 * kld, "%", "higher", 12_000, 0.2, 0.1),
        "decode_tokens_per_second": QualityMetric(rate, "tokens/s", "higher", 3, None, None),
    }
    return QualityCandidate(name, "checkpoint", name, nbytes, 8 * nbytes / 20.91e9, metrics)


EVALUATION = QualityResult(
    "2026-11-26T12:00:00+00:00", "0.1.0", {"name": "openai/gpt-oss-20b"}, {"seed": 0}, 48, 12_000,
    (_candidate("hybrid", 12_820_000_000, 0.003, 181.0), _candidate("nf4", 12_520_000_000, 0.014, 176.0),
     _candidate("int4", 14_360_000_000, 0.016, 140.0)),
)  # fmt: skip
