"""Read what should be JSON of ours, strictly: every key known, every value of its kind. Raises UsageError."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ossquant.errors import UsageError
from ossquant.units import nearest, size

MAX_BYTES = 64 * 2**20  # of a result file

# where it stands and what stands there → the value; raises UsageError
Reader = Callable[[str, Any], Any]


def read_json(path: Path) -> Any:
    """Read a JSON file of ours. Raises UsageError for one that is not there, too large or no JSON."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {size(MAX_BYTES)}", hint="give a result.json")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give the result.json of a bench run") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON", hint="give the result.json of a bench run") from error


def read_object(where: str, raw: Any, readers: Mapping[str, Reader], kind: Any) -> Any:
    """Make a dataclass of an object with exactly these keys."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is not an object")
    for key in raw:
        if key not in readers:
            raise UsageError(f"{where} has an unknown key '{key}'", hint=nearest(key, readers))
    if missing := [key for key in readers if key not in raw]:
        raise UsageError(f"{where} has no '{missing[0]}'", hint="it is not whole; measure again")
    return kind(**{key: read(f"{where}: {key}", raw[key]) for key, read in readers.items()})


def text(where: str, raw: Any) -> str:
    """A text."""
    if not isinstance(raw, str):
        raise UsageError(f"{where} is not a text")
    return raw


def flag(where: str, raw: Any) -> bool:
    """True or false."""
    if not isinstance(raw, bool):
        raise UsageError(f"{where} is neither true nor false")
    return raw


def number(where: str, raw: Any) -> float:
    """A finite number."""
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) <= sys.float_info.max:
        raise UsageError(f"{where} is not a finite number")
    return float(raw)


def maybe_number(where: str, raw: Any) -> float | None:
    """A finite number, or null."""
    return None if raw is None else number(where, raw)


def count(where: str, raw: Any) -> int:
    """A whole number from 0 up."""
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 0:
        raise UsageError(f"{where} is not a count")
    return raw


def mapping(where: str, raw: Any) -> dict[str, Any]:
    """An object with any keys."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is not an object")
    return raw


def one_of(kind: Any) -> Reader:
    """One of the texts of a Literal."""
    known: tuple[str, ...] = get_args(kind)

    def read(where: str, raw: Any) -> str:
        if raw not in known:
            raise UsageError(f"{where} is none of {', '.join(known)}")
        return str(raw)

    return read


def list_of(read: Reader) -> Reader:
    """A list of such values, as a tuple."""

    def read_all(where: str, raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            raise UsageError(f"{where} is not a list")
        return tuple(read(f"{where} {index}", each) for index, each in enumerate(raw))

    return read_all


def map_of(read: Reader) -> Reader:
    """An object with any keys and such values."""
    return lambda where, raw: {key: read(f"{where} {key}", each) for key, each in mapping(where, raw).items()}
