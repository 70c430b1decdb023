"""What `ossquant eval --json` printed, read back strictly, version 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ossquant.bench.metrics import QUALITY, Better
from ossquant.bench.result import Metric, Requests, Result, Scenario, Target
from ossquant.bench.strict import Reader, count, list_of, mapping, maybe_number, number, one_of, read_object, text
from ossquant.errors import UsageError
from ossquant.units import nearest

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class QualityMetric:
    """A figure of a candidate with its standard error, the texts as units; None where it has none."""

    value: float
    unit: str
    better: Better
    count: int
    se: float | None
    se_tokens: float | None


@dataclass(frozen=True)
class QualityCandidate:
    """A checkpoint or GGUF file that was held against the reference; nbytes are those of its tensors."""

    name: str
    kind: str
    format: str
    nbytes: int
    bits_per_weight: float
    metrics: Mapping[str, QualityMetric]


@dataclass(frozen=True)
class QualityResult:
    """An evaluation of candidates over so many scored tokens of texts."""

    created: str
    ossquant: str
    reference: Mapping[str, Any]
    settings: Mapping[str, Any]
    texts: int
    tokens: int
    candidates: tuple[QualityCandidate, ...]

    def as_result(self) -> Result:
        """The same as a bench result, for gates: a scenario a candidate, by its name."""
        scenarios = tuple(
            Scenario(
                candidate.name, {"kind": "quality"}, True, (), False, Requests(0, 0, 0, 0), 0.0,
                {name: Metric(each.value, each.unit, each.better, each.count, "client")
                 for name, each in candidate.metrics.items()},
            )
            for candidate in self.candidates
        )  # fmt: skip
        target = Target("checkpoint", str(self.reference.get("name", "")), "", "")
        return Result(self.created, self.ossquant, False, target, {}, self.settings, scenarios)


def quality_from_json(raw: dict[str, Any], name: str) -> QualityResult:
    """Read an evaluation. Raises UsageError for another version, a missing, unknown or wrong key."""
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{name} has schema version {raw.get('schema_version', 'none')}, this ossquant reads {SCHEMA_VERSION}",
            hint="evaluate again with one version of ossquant",
        )
    own = {key: raw[key] for key in raw if key not in ("schema_version", "kind")}
    result: QualityResult = read_object(name, own, _RESULT, QualityResult)
    return result


def _candidate(where: str, raw: Any) -> QualityCandidate:
    own = dict(mapping(where, raw))
    for unused in ("parameters", "vocab_size"):
        count(f"{where}: {unused}", own.pop(unused, None))
    scenarios = list_of(_quality)(f"{where}: scenarios", own.pop("scenarios", None))
    if len(scenarios) != 1:
        raise UsageError(f"{where}: scenarios are {len(scenarios)}, not one")
    candidate: QualityCandidate = read_object(where, own | {"metrics": scenarios[0]}, _CANDIDATE, QualityCandidate)
    return candidate


def _quality(where: str, raw: Any) -> dict[str, Any]:
    if mapping(where, raw).get("name") != "quality":
        raise UsageError(f"{where} is not 'quality'")
    return mapping(f"{where}: metrics", raw.get("metrics"))


def _metrics(where: str, raw: Any) -> dict[str, QualityMetric]:
    for name in mapping(where, raw):
        if name not in QUALITY:
            raise UsageError(f"{where} has an unknown metric '{name}'", hint=nearest(name, QUALITY))
    return {name: _metric(f"{where} {name}", each) for name, each in raw.items()}


def _metric(where: str, raw: Any) -> QualityMetric:
    own = {key: value for key, value in mapping(where, raw).items() if key != "cut"}
    metric: QualityMetric = read_object(where, own, _METRIC, QualityMetric)
    return metric


_METRIC: dict[str, Reader] = {
    "value": number, "unit": text, "better": one_of(Better), "count": count, "se": maybe_number,
    "se_tokens": maybe_number,
}  # fmt: skip
_CANDIDATE: dict[str, Reader] = {
    "name": text, "kind": text, "format": text, "nbytes": count, "bits_per_weight": number, "metrics": _metrics,
}  # fmt: skip
_RESULT: dict[str, Reader] = {
    "created": text, "ossquant": text, "reference": mapping, "settings": mapping, "texts": count, "tokens": count,
    "candidates": list_of(_candidate),
}  # fmt: skip
