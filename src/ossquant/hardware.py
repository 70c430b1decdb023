"""Device: what a model can run on, looked up by the name people type."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ossquant.errors import UsageError
from ossquant.units import MIB, parse_size

# words in front of a model number that people write or leave out
_PREFIXES = re.compile(r"^(nvidia|geforce|rtx|tesla|amd|radeon|rx|instinct|ryzen|intel|arc|apple)+")
_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[GT]I?B?\s*", re.IGNORECASE)
_EXAMPLE = "write it like 'rtx 4090', or as a plain size like 24GB"


@dataclass(frozen=True)
class Device:
    """One accelerator, or the memory a machine shares with it.

    memory_gb is the vendor's figure, in the vendor's sense of GB; usable_bytes is what a program can have
    of it, known as usable_basis says. bandwidth_gbps is 10**9 bytes a second. None: not known.
    """

    name: str
    aliases: tuple[str, ...]
    vendor: str
    memory_gb: float
    usable_bytes: int
    usable_basis: str
    bandwidth_gbps: float | None
    compute_capability: tuple[int, int] | None
    arch: str
    unified_memory: bool
    tdp_w: int | None
    usd_per_hour: float | None
    usd_per_hour_source: str
    memory_evidence: str
    source: str


def find_device(text: str) -> Device:
    """Find the device meant by `4090`, `RTX-4090` or `m4 max`, or one of a plain size, `24GB`.

    Raises UsageError naming the candidates of a name that several share, or the nearest to an unknown one.
    """
    found = _by_key().get(_key(text), ())
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"'{text}' is more than one device", hint=f"say which: {_names(found)}")
    if _SIZE.fullmatch(text):
        return _of_size(text.strip())
    raise UsageError(f"unknown device '{text}'", hint=_nearest(text))


@cache
def devices() -> tuple[Device, ...]:
    """Every device known by name, in the order of hardware.toml."""
    text = Path(__file__).with_name("hardware.toml").read_text("utf-8")
    return tuple(_device(row) for row in tomllib.loads(text)["device"])


def _device(row: Mapping[str, Any]) -> Device:
    capability = row.get("compute_capability")
    return Device(
        name=row["name"],
        aliases=tuple(row["aliases"]),
        vendor=row["vendor"],
        memory_gb=row["memory_gb"],
        usable_bytes=row["usable_mib"] * MIB,
        usable_basis=row["usable_basis"],
        bandwidth_gbps=row["bandwidth_gbps"],
        compute_capability=(capability[0], capability[1]) if capability else None,
        arch=row["arch"],
        unified_memory=row["unified_memory"],
        tdp_w=row["tdp_w"],
        usd_per_hour=row.get("usd_per_hour"),
        usd_per_hour_source=row.get("usd_per_hour_source", ""),
        memory_evidence=row["memory_evidence"],
        source=row["source"],
    )


def _of_size(text: str) -> Device:
    nbytes = parse_size(text)
    return Device(
        name=text,
        aliases=(),
        vendor="",
        memory_gb=nbytes / 1e9,
        usable_bytes=nbytes,
        usable_basis="the size as given, all of it usable; a real device keeps some back",
        bandwidth_gbps=None,
        compute_capability=None,
        arch="",
        unified_memory=False,
        tdp_w=None,
        usd_per_hour=None,
        usd_per_hour_source="",
        memory_evidence="as given",
        source="as given",
    )


@cache
def _by_key() -> Mapping[str, tuple[Device, ...]]:
    index: dict[str, tuple[Device, ...]] = {}
    for device in devices():
        for key in {_key(name) for name in (device.name, *device.aliases)}:
            index[key] = (*index.get(key, ()), device)
    return index


def _key(text: str) -> str:
    return _PREFIXES.sub("", re.sub(r"[^a-z0-9]", "", text.lower()))


def _nearest(text: str) -> str:
    keys = difflib.get_close_matches(_key(text), _by_key(), n=3)
    found = dict.fromkeys(device for key in keys for device in _by_key()[key])
    return f"did you mean {_names(tuple(found))}?" if found else _EXAMPLE


def _names(found: tuple[Device, ...]) -> str:
    return " or ".join(f"'{device.name}'" for device in found)
