"""A report as JUnit XML: a test case a scenario and gated metric, and one a scenario for whether it is valid."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ossquant.bench.comparison import Change, Comparison, Limit, Verdict
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.result import Result, Scenario
from ossquant.bench.words import allowed, interval, metric_name, percent, plain, with_unit

TAGS: dict[Verdict, str] = {"regressed": "failure", "failed": "failure", "inconclusive": "error"}


def to_junit(content: Content) -> str:
    """Write what regressed or broke a limit as a failure, what is inconclusive or invalid as an error."""
    root = Element("testsuites", name="ossquant")
    for entry in content.entries:
        suite = SubElement(root, "testsuite", name=plain(entry.name))
        cases = list(_cases(entry))
        suite.extend(cases)
        _count(suite, cases)
    _count(root, [case for suite in root for case in suite])
    indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(root, "unicode")}\n'


def _count(element: Element, cases: list[Element]) -> None:
    element.set("tests", str(len(cases)))
    for tag in ("failure", "error"):
        element.set(f"{tag}s", str(sum(case.find(tag) is not None for case in cases)))


def _cases(entry: Entry) -> Iterator[Element]:
    document = entry.document
    if isinstance(document, Comparison):
        yield from (_change(change) for change in document.gated)
        yield from (_limit(limit) for limit in document.limits)
    elif isinstance(document, Result):
        yield from (_valid(scenario) for scenario in document.scenarios)
    yield from (_limit(limit) for limit in entry.limits)
    if entry.problem:
        yield _case("gate", "can be applied", "inconclusive", entry.problem)


def _case(scenario: str, name: str, verdict: Verdict, said: str) -> Element:
    case = Element("testcase", classname=plain(scenario), name=name)
    if tag := TAGS.get(verdict):
        SubElement(case, tag, message=plain(said), type=verdict)
    else:
        SubElement(case, "system-out").text = plain(said)
    return case


def _change(change: Change) -> Element:
    why = f"; {change.why}" if change.why else ""
    said = f"{percent(change.ratio)} ({interval(change)}), allowed: {allowed(change)}{why}"
    return _case(change.scenario, f"{metric_name(change)} against base", change.verdict or "inconclusive", said)


def _limit(limit: Limit) -> Element:
    said = f"{with_unit(limit.value, limit.unit)}, allowed: {allowed(limit)}"
    return _case(limit.scenario, metric_name(limit), limit.verdict, said)


def _valid(scenario: Scenario) -> Element:
    why = "; ".join(scenario.invalid) or ("interrupted" if scenario.partial else "")
    case = _case(scenario.name, "is a valid run", "inconclusive" if why else "ok", why or "valid")
    case.set("time", f"{scenario.seconds:.3f}")
    return case
