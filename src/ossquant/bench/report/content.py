"""Content: the documents that a report is about, by name, with what a gate says of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ossquant.bench.compare import check_limits
from ossquant.bench.comparison import Comparison, Limit, Verdict, overall
from ossquant.bench.documents import Document, load_document
from ossquant.bench.gate import Gate
from ossquant.bench.quality_result import QualityResult
from ossquant.bench.result import Result
from ossquant.bench.runs import Runs
from ossquant.errors import InvalidRunError


@dataclass(frozen=True)
class Entry:
    """A document, how it is called, the absolute limits that a gate holds it against, or why it cannot."""

    name: str
    document: Document
    limits: tuple[Limit, ...] = ()
    problem: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """That of a comparison, or of the limits; None where nothing was asked."""
        if isinstance(self.document, Comparison):
            return self.document.verdict
        if self.problem:
            return "inconclusive"
        return overall([limit.verdict for limit in self.limits]) if self.limits else None


@dataclass(frozen=True)
class Content:
    """Everything that a report is about."""

    entries: tuple[Entry, ...]

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        """Comparisons with their names."""
        yield from ((each.name, each.document) for each in self.entries if isinstance(each.document, Comparison))

    def results(self) -> Iterator[tuple[str, Result]]:
        """Bench results with their names."""
        yield from ((each.name, each.document) for each in self.entries if isinstance(each.document, Result))

    def evaluations(self) -> Iterator[tuple[str, QualityResult]]:
        """Evaluations with their names."""
        yield from ((each.name, each.document) for each in self.entries if isinstance(each.document, QualityResult))

    @property
    def verdict(self) -> Verdict | None:
        """One for all; None where nothing was asked."""
        verdicts = [each.verdict for each in self.entries if each.verdict]
        return overall(verdicts) if verdicts else None


def load_content(paths: Iterable[Path], gate: Gate | None) -> Content:
    """Read files; hold results and evaluations against the absolute limits of a gate. Raises UsageError."""
    return Content(tuple(_entry(path, gate) for path in dict.fromkeys(paths)))


def _entry(path: Path, gate: Gate | None) -> Entry:
    document = load_document(path)
    if gate is None or isinstance(document, Comparison):
        return Entry(str(path), document)
    result = document.as_result() if isinstance(document, QualityResult) else document
    try:
        return Entry(str(path), document, check_limits(Runs(str(path), str(path), (result,)), gate))
    except InvalidRunError as error:
        return Entry(str(path), document, problem=error.message)
