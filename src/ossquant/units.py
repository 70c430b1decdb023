"""Numbers to words and back."""

import difflib
import re
from collections.abc import Iterable
from decimal import Decimal

from ossquant.errors import UsageError

GIB = 2**30
MIB = 2**20

_SIZE_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def size(nbytes: float) -> str:
    """Say a number of bytes in decimal units, as disks and file listings do: `13.76 GB`."""
    return _scaled(nbytes, "GB", "MB", "kB") or f"{nbytes:.0f} B"


def size_both(nbytes: float) -> str:
    """Say bytes in both units people meet: `13.76 GB (12.82 GiB)`."""
    return f"{nbytes / 1e9:.2f} GB ({nbytes / GIB:.2f} GiB)" if nbytes >= 1e8 else size(nbytes)


def count(number: float) -> str:
    """Say a count in thousands, millions or billions: `20.91 B`."""
    return _scaled(number, "B", "M", "k") or f"{number:.0f}"


def _scaled(number: float, *units: str) -> str:
    for unit, scale in zip(units, (10**9, 10**6, 10**3), strict=True):
        if abs(number) >= scale * (1 - 5e-6):  # what rounds to 1.00 of a unit is said in it
            return f"{number / scale:.2f} {unit}"
    return ""


def parse_size(text: str) -> int:
    """Read `5GB`, `4.5 GiB` or `1000` (bytes). Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?B?)\s*", text.upper())
    unit = match and (match[2] if match[2].endswith("B") else match[2] + "B")
    if not match or unit not in _SIZE_UNITS:
        raise UsageError(f"'{text}' is not a size", hint="write it like 5GB or 4.5GiB")
    return int(Decimal(match[1]) * _SIZE_UNITS[unit])


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known word that was probably meant, as the end of a hint."""
    words = list(known)
    found = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'?" if found else f"known: {', '.join(words)}"
