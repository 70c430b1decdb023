"""Read a result back, strictly: a file may be of another version, damaged or somebody else's."""

from pathlib import Path
from typing import Any

from ossquant.bench.metrics import METRICS, Better
from ossquant.bench.result import SCHEMA_VERSION, Metric, Requests, Result, Scenario, Source, Target, TargetKind
from ossquant.bench.strict import (
    Reader,
    count,
    flag,
    list_of,
    map_of,
    mapping,
    maybe_number,
    number,
    one_of,
    read_json,
    read_object,
    text,
)
from ossquant.errors import UsageError
from ossquant.units import nearest


def from_json(raw: Any, name: str = "the result") -> Result:
    """Read a result's object, strictly. Raises UsageError for another version, a missing, unknown or wrong key."""
    if not isinstance(raw, dict) or raw.get("kind") != "bench":
        raise UsageError(
            f"{name} is no result of ossquant bench", hint="give a result.json, or what bench --json printed"
        )
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{name} has schema version {raw.get('schema_version', 'none')}, this ossquant reads {SCHEMA_VERSION}",
            hint="measure again with one version of ossquant",
        )
    return read_object(name, {key: raw[key] for key in raw if key not in ("schema_version", "kind")}, _RESULT, Result)


def load_result(path: Path) -> Result:
    """Read result.json. Raises UsageError for a file that is not there, too large or no result."""
    return from_json(read_json(path), str(path))


def _shape(where: str, raw: Any) -> dict[str, Any]:
    return mapping(where, raw) | {"kind": text(f"{where}: kind", mapping(where, raw).get("kind"))}


def _metrics(where: str, raw: Any) -> dict[str, Metric]:
    for name in mapping(where, raw):
        if name not in METRICS:
            raise UsageError(f"{where} has an unknown metric '{name}'", hint=nearest(name, METRICS))
    return {name: read_object(f"{where} {name}", each, _METRIC, Metric) for name, each in raw.items()}


_METRIC: dict[str, Reader] = {
    "value": number, "unit": text, "better": one_of(Better), "count": count, "source": one_of(Source),
    "mean": maybe_number, "p50": maybe_number, "p90": maybe_number, "p95": maybe_number, "p99": maybe_number,
}  # fmt: skip
_REQUESTS: dict[str, Reader] = {"sent": count, "succeeded": count, "failed": count, "truncated": count}
_SCENARIO: dict[str, Reader] = {
    "name": text, "shape": _shape, "valid": flag, "invalid": list_of(text), "partial": flag,
    "requests": lambda where, raw: read_object(where, raw, _REQUESTS, Requests),
    "seconds": number, "metrics": _metrics, "counts": mapping, "unmeasured": map_of(text),
}  # fmt: skip
_TARGET: dict[str, Reader] = {"kind": one_of(TargetKind), "name": text, "model": text, "engine": text}
_RESULT: dict[str, Reader] = {
    "created": text, "ossquant": text, "partial": flag,
    "target": lambda where, raw: read_object(where, raw, _TARGET, Target),
    "environment": mapping, "settings": mapping,
    "scenarios": list_of(lambda where, raw: read_object(where, raw, _SCENARIO, Scenario)),
}  # fmt: skip
