"""recipes/README.md: every row is what the library computes today."""

import re
import shlex
from pathlib import Path

import pytest

from conftest import run_cli
from ossquant.fit import Candidate, candidate, fit
from ossquant.hardware import Machine, devices, find_machine
from ossquant.memory import Workload, parse_engine
from ossquant.plan import make_plan
from ossquant.recipe import load_recipe
from ossquant.spec import ModelSpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "recipes/README.md").read_text("utf-8")
RECIPES = {path.stem: load_recipe(path) for path in (ROOT / "recipes").glob("*.toml")}
WORKLOAD = Workload(max_model_len=8192, max_num_seqs=1)
LEAST_CHANGE_FIRST = ("hybrid", "hybrid-smallest", "nf4-smallest")
SERVED = (("vllm", "mxfp4"), ("llama.cpp", "gguf-q8"))
NONE = "-"


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose header begins with these words."""
    lines = README.partition(f"| {header}")[2].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


CARDS = rows("model | card")
KINDS = rows("recipe | 20b")


def answer(asked: Candidate, machine: Machine) -> str:
    """One cell: the longest context that surely fits, or how else it fits, or that it does not."""
    found = fit(asked, machine, WORKLOAD)
    if not found.longest_max_model_len:
        return "tight" if found.verdict == "tight" else NONE
    moved = f"offload {found.workload.n_cpu_moe}: " if found.verdict == "offload" else ""
    return f"{moved}{found.longest_max_model_len:,}"


def chosen(spec: ModelSpec, machine: Machine) -> tuple[str, str]:
    """The recipe that changes least of those `ossquant run` has room for, else of the longest context; its cell."""
    asked = {
        name: Candidate("", name, parse_engine("transformers"), make_plan(spec, RECIPES[name]))
        for name in LEAST_CHANGE_FIRST
    }
    found = {name: fit(each, machine, WORKLOAD) for name, each in asked.items()}
    fitting = [name for name in found if found[name].verdict == "fits"]
    name = fitting[0] if fitting else max(found, key=lambda name: found[name].longest_max_model_len)
    cell = answer(asked[name], machine)
    return (NONE if cell == NONE else name, cell)


def row(model: str, card: str) -> list[str]:
    """A row of the table as the library has it now."""
    spec, machine = ModelSpec.published(model), find_machine(card)
    served = [answer(candidate(model, spec, form, parse_engine(engine)), machine) for engine, form in SERVED]
    return [model, card, *chosen(spec, machine), *served]


@pytest.mark.parametrize("written", CARDS, ids=lambda cells: " ".join(cells[:2]))
def test_cards(written: list[str]) -> None:
    """A row names the recipe, and the contexts, that fit computes for its model and card."""
    assert written == row(*written[:2])


def test_cards_are_many() -> None:
    """Both models are held against the usual sizes of card; no row stands twice."""
    assert len({tuple(cells[:2]) for cells in CARDS}) == len(CARDS) <= 25
    for model in ("20b", "120b"):
        sizes = {find_machine(card).device.memory_gb for which, card, *_ in CARDS if which == model}
        assert len(sizes) >= 6


def test_smallest_make_the_difference() -> None:
    """Each recipe in the choice is the choice of a row, and some row has none."""
    assert {cells[2] for cells in CARDS} == {*LEAST_CHANGE_FIRST, NONE}


def smallest_card(name: str, size: str) -> float:
    """The least memory, in GB as sold, of an NVIDIA card with memory of its own that `ossquant run` fits on."""
    plan = make_plan(ModelSpec.published(size), RECIPES[name])
    asked = Candidate("", name, parse_engine("transformers"), plan)
    cards = (each for each in devices() if each.vendor == "nvidia" and not each.unified_memory)
    return min(card.memory_gb for card in cards if fit(asked, Machine(card, 1, None), WORKLOAD).verdict == "fits")


@pytest.mark.parametrize("cells", KINDS, ids=lambda cells: cells[0])
def test_smallest_cards(cells: list[str]) -> None:
    """Where a recipe's line or its own text says from what card on it runs, a smaller one does not fit."""
    for size, memory in re.findall(r"(\d+b) from (\d+) GB", f"{cells[4]} {RECIPES[cells[0]].why}"):
        assert smallest_card(cells[0], size) == float(memory)


@pytest.mark.parametrize("cells", KINDS, ids=lambda cells: cells[0])
def test_sizes(cells: list[str]) -> None:
    """A recipe's sizes are those of its plans, in the README and where its own text names one."""
    recipe = RECIPES[cells[0]]
    sizes = {size: f"{make_plan(ModelSpec.published(size), recipe).nbytes / 1e9:.2f} GB" for size in ("20b", "120b")}
    assert cells[1:3] == list(sizes.values())
    for size, said in re.findall(r"\b(\d+b): ([\d.]+ GB)", recipe.why):
        assert sizes[size] == said


def test_every_recipe_is_listed() -> None:
    """Each file of recipes/ has a line that says what it is for, and no other."""
    assert sorted(cells[0] for cells in KINDS) == sorted(RECIPES)


def test_commands(trained: Path) -> None:
    """Each model and recipe of the table has its command, and none else; as typed they are understood."""
    commands = [shlex.split(line) for line in re.findall(r"^    (ossquant quantize .+)", README, re.MULTILINE)]
    named = {(words[2].removeprefix("openai/gpt-oss-"), Path(words[5]).stem) for words in commands}
    assert named == {(cells[0], cells[2]) for cells in CARDS if cells[2] != NONE}
    for words in commands:
        done = run_cli("quantize", trained, *words[3:], "--dry-run", cwd=ROOT)
        assert done.returncode == 0, done.stderr
