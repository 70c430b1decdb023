"""Read a comparison back, strictly."""

from typing import Any

from ossquant.bench.comparison import SCHEMA_VERSION, Change, Comparison, Limit, Side, Verdict
from ossquant.bench.metrics import Better
from ossquant.bench.strict import Reader, count, list_of, maybe_number, number, one_of, read_object, text
from ossquant.errors import UsageError


def comparison_from_json(raw: dict[str, Any], name: str) -> Comparison:
    """Read what `compare --json` printed. Raises UsageError for another version, a missing, unknown or wrong key."""
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{name} has schema version {raw.get('schema_version', 'none')}, this ossquant reads {SCHEMA_VERSION}",
            hint="compare again with one version of ossquant",
        )
    own = {key: raw[key] for key in raw if key not in ("schema_version", "kind")}
    comparison: Comparison = read_object(name, own, _COMPARISON, Comparison)
    return comparison


def _verdict_or_none(where: str, raw: Any) -> Any:
    return None if raw is None else one_of(Verdict)(where, raw)


_METRIC: dict[str, Reader] = {
    "scenario": text, "metric": text, "statistic": text, "unit": text, "better": one_of(Better),
}  # fmt: skip
_CHANGE: dict[str, Reader] = {
    **_METRIC, "base": list_of(maybe_number), "head": list_of(maybe_number), "ratio": maybe_number,
    "low": maybe_number, "high": maybe_number, "max_regression": maybe_number, "p": maybe_number,
    "verdict": _verdict_or_none, "why": text,
}  # fmt: skip
_LIMIT: dict[str, Reader] = {**_METRIC, "bound": number, "value": number, "verdict": one_of(Verdict)}
_SIDE: dict[str, Reader] = {"target": text, "model": text, "engine": text, "source": text}


def _side(where: str, raw: Any) -> Any:
    return read_object(where, raw, _SIDE, Side)


_COMPARISON: dict[str, Reader] = {
    "created": text, "ossquant": text, "gate": text, "base": _side, "head": _side, "pairs": count,
    "looks": list_of(count), "alpha": number, "verdict": one_of(Verdict),
    "changes": list_of(lambda where, raw: read_object(where, raw, _CHANGE, Change)),
    "limits": list_of(lambda where, raw: read_object(where, raw, _LIMIT, Limit)),
    "notes": list_of(text),
}  # fmt: skip
