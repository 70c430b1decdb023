"""Rig: the devices that a target runs on, their rent, and the roof they put over decoding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ossquant.decode import bytes_per_token
from ossquant.detect import gpus
from ossquant.errors import UsageError
from ossquant.fit import ENGINE_FORMATS, FORMATS
from ossquant.hardware import Machine, find_machine, machine_of
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec
from ossquant.units import nearest

_SIZE = re.compile(r"(?<!\d)(20b|120b)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Rig:
    """What a run costs an hour and could reach, None where that is not known; why says it of each metric."""

    usd_per_hour: float | None = None
    roof_tokens_per_second: float | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


def find_rig(
    gpu: str | None, usd_per_hour: float | None, plan: Plan | str, *, absent: str | None, layered: bool
) -> Rig:
    """Look the devices up by name, or ask this machine; absent says why that would be wrong, if so.

    plan is what a token reads, or why that is not known. layered devices hold layers and work one after the other,
    others side by side. Raises UsageError for a name that is not known.
    """
    if usd_per_hour is not None and usd_per_hour <= 0:
        raise UsageError("--usd-per-hour must be above 0")
    machine = _machine(gpu, absent)
    rent = usd_per_hour or (_rent(machine) if isinstance(machine, Machine) else None)
    roof = _roof(machine, plan, layered)
    return Rig(
        usd_per_hour=rent,
        roof_tokens_per_second=roof if isinstance(roof, float) else None,
        described=_described(machine, rent, usd_per_hour)
        | ({"roof_tokens_per_second": roof} if isinstance(roof, float) else {}),
        why={
            **({} if rent else {"usd_per_million_tokens": _no_rent(machine)}),
            **({"roofline_share": roof} if isinstance(roof, str) else {}),
        },
    )


def served_plan(model: str, engine: str, name: str | None) -> Plan | str:
    """The plan of a served model by its name, in a format or the engine's usual one; or why it is not known.

    Raises UsageError for an unknown format.
    """
    if name is not None and name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", hint=nearest(name, FORMATS))
    size = _SIZE.search(model)
    if not size:
        return f"'{model}' is neither named 20b nor 120b"
    format_ = name or (ENGINE_FORMATS[engine][0] if engine in ENGINE_FORMATS else None)
    if format_ is None:
        return "what the server holds is not known: --format says it"
    return make_plan(ModelSpec.published(size[1].lower()), FORMATS[format_])


def _machine(gpu: str | None, absent: str | None) -> Machine | str:
    if gpu:
        return find_machine(gpu)
    if absent:
        return f"{absent}: --gpu names its device"
    try:
        found = gpus()
        return machine_of(found, None) if found else "no GPU on this machine"
    except UsageError as error:
        return error.message


def _rent(machine: Machine) -> float | None:
    hourly = machine.device.usd_per_hour
    return None if hourly is None else hourly * machine.count


def _roof(machine: Machine | str, plan: Plan | str, layered: bool) -> float | str:
    """Tokens a second of one stream if every byte came at the full bandwidth."""
    if isinstance(machine, str) or isinstance(plan, str):
        return machine if isinstance(machine, str) else str(plan)
    bandwidth = machine.device.bandwidth_gbps
    if bandwidth is None:
        return f"the bandwidth of '{machine.device.name}' is not known"
    return bandwidth * 1e9 * (1 if layered else machine.count) / bytes_per_token(plan)


def _described(machine: Machine | str, rent: float | None, given: float | None) -> dict[str, Any]:
    if isinstance(machine, str):
        return {"usd_per_hour": rent, "usd_source": "as given"} if given else {}
    device = machine.device
    return {
        "device": device.name,
        "count": machine.count,
        "bandwidth_gbps": device.bandwidth_gbps,
        "usd_per_hour": rent,
        "usd_source": "as given" if given else device.sources.get("price"),
    }


def _no_rent(machine: Machine | str) -> str:
    if isinstance(machine, str):
        return "no price is known: --usd-per-hour says it"
    return f"no price of '{machine.device.name}' is known: --usd-per-hour says it"
