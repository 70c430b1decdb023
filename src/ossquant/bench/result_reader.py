"""Read a result back, strictly: a file may be of another version, damaged or somebody else's."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ossquant.bench.metrics import METRICS, Better
from ossquant.bench.result import SCHEMA_VERSION, Metric, Requests, Result, Scenario, Source, Target, TargetKind
from ossquant.errors import UsageError
from ossquant.units import nearest, size

MAX_BYTES = 64 * 2**20  # of a result file


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
    return _read(name, {key: raw[key] for key in raw if key not in ("schema_version", "kind")}, _RESULT, Result)


def load_result(path: Path) -> Result:
    """Read result.json. Raises UsageError for a file that is not there, too large or no result."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {size(MAX_BYTES)}", hint="give a result.json")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give the result.json of a bench run") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON", hint="give the result.json of a bench run") from error
    return from_json(raw, str(path))


# where it stands and what stands there → the value; raises UsageError
Reader = Callable[[str, Any], Any]


def _read(where: str, raw: Any, readers: Mapping[str, Reader], kind: Any) -> Any:
    """Make a dataclass of an object with exactly these keys."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is not an object")
    for key in raw:
        if key not in readers:
            raise UsageError(f"{where} has an unknown key '{key}'", hint=nearest(key, readers))
    if missing := [key for key in readers if key not in raw]:
        raise UsageError(f"{where} has no '{missing[0]}'", hint="it is not whole; measure again")
    return kind(**{key: read(f"{where}: {key}", raw[key]) for key, read in readers.items()})


def _text(where: str, raw: Any) -> str:
    if not isinstance(raw, str):
        raise UsageError(f"{where} is not a text")
    return raw


def _flag(where: str, raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise UsageError(f"{where} is neither true nor false")
    return raw


def _number(where: str, raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise UsageError(f"{where} is not a finite number")
    return float(raw)


def _maybe(where: str, raw: Any) -> float | None:
    return None if raw is None else _number(where, raw)


def _count(where: str, raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 0:
        raise UsageError(f"{where} is not a count")
    return raw


def _object(where: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is not an object")
    return raw


def _shape(where: str, raw: Any) -> dict[str, Any]:
    return _object(where, raw) | {"kind": _text(f"{where}: kind", _object(where, raw).get("kind"))}


def _one_of(kind: Any) -> Reader:
    known: tuple[str, ...] = get_args(kind)

    def read(where: str, raw: Any) -> str:
        if raw not in known:
            raise UsageError(f"{where} is none of {', '.join(known)}")
        return str(raw)

    return read


def _list_of(read: Reader) -> Reader:
    def read_all(where: str, raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            raise UsageError(f"{where} is not a list")
        return tuple(read(f"{where} {index}", each) for index, each in enumerate(raw))

    return read_all


def _map_of(read: Reader) -> Reader:
    return lambda where, raw: {key: read(f"{where} {key}", each) for key, each in _object(where, raw).items()}


def _metrics(where: str, raw: Any) -> dict[str, Metric]:
    for name in _object(where, raw):
        if name not in METRICS:
            raise UsageError(f"{where} has an unknown metric '{name}'", hint=nearest(name, METRICS))
    return {name: _read(f"{where} {name}", each, _METRIC, Metric) for name, each in raw.items()}


_METRIC: dict[str, Reader] = {
    "value": _number, "unit": _text, "better": _one_of(Better), "count": _count, "source": _one_of(Source),
    "mean": _maybe, "p50": _maybe, "p90": _maybe, "p95": _maybe, "p99": _maybe,
}  # fmt: skip
_REQUESTS: dict[str, Reader] = {"sent": _count, "succeeded": _count, "failed": _count, "truncated": _count}
_SCENARIO: dict[str, Reader] = {
    "name": _text, "shape": _shape, "valid": _flag, "invalid": _list_of(_text), "partial": _flag,
    "requests": lambda where, raw: _read(where, raw, _REQUESTS, Requests),
    "seconds": _number, "metrics": _metrics, "counts": _object, "unmeasured": _map_of(_text),
}  # fmt: skip
_TARGET: dict[str, Reader] = {"kind": _one_of(TargetKind), "name": _text, "model": _text, "engine": _text}
_RESULT: dict[str, Reader] = {
    "created": _text, "ossquant": _text, "partial": _flag,
    "target": lambda where, raw: _read(where, raw, _TARGET, Target),
    "environment": _object, "settings": _object,
    "scenarios": _list_of(lambda where, raw: _read(where, raw, _SCENARIO, Scenario)),
}  # fmt: skip
