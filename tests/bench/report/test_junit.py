from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

from made_documents import HOSTILE, comparison, hostile_result, loaded_result
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.report.junit import to_junit


def parsed(*entries: Entry) -> Element:
    return fromstring(to_junit(Content(entries)).encode())  # noqa: S314  our own


def outcomes(root: Element) -> dict[tuple[str | None, str | None], str]:
    return {(case.get("classname"), case.get("name")): next(iter(case)).tag for case in root.iter("testcase")}


def test_a_case_a_scenario_and_metric() -> None:
    """What regressed and what breaks a limit fails, the rest passes, and the suite counts them."""
    root = parsed(Entry("c.json", comparison()))
    assert outcomes(root) == {
        ("concurrency=16", "output_tokens_per_second against base"): "failure",
        **{(f"concurrency={load}", "ttft against base"): "system-out" for load in (1, 4, 16, 64)},
        **{(f"concurrency={load}", "ttft"): "system-out" for load in (1, 4, 16)},
        ("concurrency=64", "ttft"): "failure",
    }
    suite = root[0]
    counts = {"tests": "9", "failures": "2", "errors": "0"}
    assert {key: suite.get(key) for key in counts} == counts == {key: root.get(key) for key in counts}
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message", "")[:3]) == ("regressed", "−9.")


def test_inconclusive_is_no_pass() -> None:
    """What is inconclusive is an error that says why."""
    made = comparison()
    changes = tuple(replace(each, verdict="inconclusive", why="one run a side") for each in made.gated)
    root = parsed(Entry("c.json", replace(made, changes=changes, limits=())))
    assert set(outcomes(root).values()) == {"error"}
    assert "one run a side" in str(root.find(".//error").get("message"))  # type: ignore[union-attr]


def test_an_invalid_run_is_an_error() -> None:
    """Every scenario of a result is a case; one that is no valid run is an error with its reasons."""
    root = parsed(Entry("r.json", loaded_result()), Entry("h.json", hostile_result()))
    found = list(outcomes(root).values())
    assert found == ["system-out"] * 4 + ["error"]
    assert root[1].get("errors") == "1"


def test_a_gate_that_cannot_be_applied_is_an_error() -> None:
    """A gate on what was not measured does not vanish."""
    root = parsed(Entry("r.json", loaded_result(), problem="gate.toml: no power_watts"))
    assert outcomes(root)[("gate", "can be applied")] == "error"


def test_hostile_names() -> None:
    """Any text gives well-formed XML, with the text in it."""
    root = parsed(Entry(HOSTILE, hostile_result()))
    assert str(root[0].get("name")).startswith("<script>")
