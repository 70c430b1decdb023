"""README and the pages that it leads to: links, commands, and the map."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from ossquant.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("recipes/**/*.md")),
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMANDS = get_command(app).commands


def name(page: Path) -> str:
    """A page as the reader of a failed test knows it."""
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: small letters, spaces to hyphens, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The relative links of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text("utf-8")))
    return [link for link in found if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link leads to a file or folder that is there, and its anchor to a heading of it."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_found() -> None:
    """README links to each page of docs/."""
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(ROOT.glob("docs/*.md")) <= linked


def test_readme_can_be_read() -> None:
    """README has at most 160 lines."""
    assert len(README.read_text("utf-8").splitlines()) <= 160


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=name)
def test_pages_say_what_they_are_for(page: Path) -> None:
    """Each page of docs/ begins with a title and a sentence."""
    assert re.match(r"# \S.+\n\n[\w`].+", page.read_text("utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `ossquant …` that stands in an indented or fenced block."""
    indented = re.findall(r"^    (.*)$", text, re.MULTILINE)
    blocks = "\n".join([*indented, *FENCED.findall(text)])
    for line in blocks.replace("\\\n", " ").splitlines():
        yield from in_line(line)


def in_line(line: str) -> Iterator[list[str]]:
    """The arguments of each command in a line of shell, those in quotes included; of other lines nothing."""
    if not re.match(r"(\$ )?(echo .*\| )?ossquant \S", line):
        return
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    begun: list[str] = []
    for word in (*words, ";"):
        if set(word) <= set("|&;<>"):
            if begun[:1] == ["ossquant"]:
                yield begun[1:]
            begun = []
        elif word != "$":
            begun.append(word)
            yield from in_line(word)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    """Each command shown is one that ossquant knows, with arguments and options that it takes."""
    for command, *arguments in commands(page.read_text("utf-8")):
        assert command in COMMANDS, command
        COMMANDS[command].make_context(command, arguments)  # raises on an option that is not there


def test_commands_are_found() -> None:
    """README shows every command; those over two lines, in quotes and behind a pipe are seen."""
    assert {command for command, *_ in commands(README.read_text("utf-8"))} == set(COMMANDS)
    assert list(commands('    $ ossquant bench --ab "ossquant run a" \\\n        b >> c  # d\n    a table\n')) == [
        ["run", "a"],
        ["bench", "--ab", "ossquant run a", "b"],
    ]
    assert list(commands("```\n$ echo 'b' | ossquant run a - --json\n```\n")) == [["run", "a", "-", "--json"]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_are_there(page: Path) -> None:
    """Each script that a page names is there."""
    for script in re.findall(r"\bscripts/(\w[\w./]*\w)", page.read_text("utf-8")):
        assert (ROOT / "scripts" / script).exists(), script


def test_the_map_is_whole() -> None:
    """README's map names each file and folder of src/ossquant."""
    drawn = README.read_text("utf-8").partition("## Where things are")[2].replace("hardware.toml .py", "hardware.py")
    paths = [path for path in (ROOT / "src/ossquant").iterdir() if path.suffix == ".py" or path.is_dir()]
    for path in paths:
        assert path.name.startswith("_") or path.name + "/" * path.is_dir() in drawn, path.name


def test_source_is_whole() -> None:
    """docs/source.md names each script, and each module of a folder whose files it goes through one by one."""
    named = set(re.findall(r"\w+", (ROOT / "docs/source.md").read_text("utf-8")))
    folders = ("memory", "checkpoint", "codec", "export", "runtime", "bench")
    modules = {path.stem for folder in folders for path in (ROOT / "src/ossquant" / folder).glob("*.py")}
    scripts = {path.stem for path in (ROOT / "scripts").iterdir() if path.is_file()}
    assert not modules - named - {"__init__"}
    assert not {script for script in scripts - named if not script.startswith("gpu_check_")}
