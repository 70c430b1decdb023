"""The gate's promises, simulated through its own code by scripts/gate_power.py."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from gate_power import CASES, CHANGES, Case, simulate, stored_baseline

FIXED, DEFAULT = CASES[0], CASES[2]
PAGE = (Path(__file__).parent.parent / "docs/compare.md").read_text("utf-8")
FEW = 400
MANY = 1500  # experiments; a share of 1 % is known to 0.5 %, one of 60 % to 2.5 %


def test_false_alarms() -> None:
    """Where nothing changed, at most 1 in 100 is called a regression: with 5 pairs, and with up to 12."""
    for case in (FIXED, DEFAULT):
        verdicts, _ = simulate(case, 0.0, MANY)
        assert verdicts["regressed"] / MANY <= 0.01


def test_power() -> None:
    """With 5 pairs 60 % of slowdowns by 5 % are found, and 99 % of those by 10 %."""
    assert simulate(FIXED, 0.05, MANY)[0]["regressed"] / MANY >= 0.60
    assert simulate(FIXED, 0.10, MANY)[0]["regressed"] / MANY >= 0.99


def test_more_pairs_until_decided() -> None:
    """Up to 12 pairs find more of them, 85 % and 99 %, and take few pairs for the large ones."""
    verdicts, pairs = simulate(DEFAULT, 0.05, MANY)
    assert verdicts["regressed"] / MANY >= 0.85
    assert verdicts["ok"] / MANY <= 0.01
    assert 5 < pairs < 9
    verdicts, pairs = simulate(DEFAULT, 0.10, MANY)
    assert verdicts["regressed"] / MANY >= 0.99
    assert pairs < 5.2


def test_looks_do_not_add_up() -> None:
    """At the limit itself, where either answer is wrong, three looks give each in at most 5 of 100."""
    verdicts, _ = simulate(DEFAULT, 0.02, MANY)
    assert verdicts["regressed"] / MANY <= 0.05 + 0.01
    assert verdicts["ok"] / MANY <= 0.05 + 0.01


def test_many_metrics() -> None:
    """With 6 metrics at the limit one is called a regression in at most 5 of 100, for Holm raises each."""
    verdicts, _ = simulate(replace(FIXED, scenarios=6), 0.02, MANY // 3)
    assert verdicts["regressed"] / (MANY // 3) <= 0.05 + 0.02


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_page_says_so(case: Case) -> None:
    """The table of docs/compare.md is what the simulation gives, within what fewer experiments can tell."""
    block = PAGE.partition("<!-- gate_power: begin -->\n")[2].partition("<!-- gate_power: end -->")[0]
    (row,) = (line.split("|")[2:] for line in block.splitlines() if line.startswith(f"| {case.name} |"))
    for change, cell in zip(CHANGES, row, strict=False):
        said = float(cell.strip().removesuffix(" %")) / 100
        found = simulate(case, change, FEW)[0]["regressed"] / FEW
        assert found == pytest.approx(said, abs=4 * math.sqrt(said * (1 - said) / FEW) + 0.005)


def test_what_a_stored_baseline_does() -> None:
    """The rule that others use is wrong where nothing changed in about 1 of 5."""
    assert stored_baseline(0.0, 20_000) == pytest.approx(0.21, abs=0.02)
