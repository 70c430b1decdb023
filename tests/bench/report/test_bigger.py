import json

import pytest

from made_documents import EVALUATION, comparison, hostile_result, loaded_result
from ossquant.bench.report.bigger import to_bigger_is_better
from ossquant.bench.report.content import Content, Entry


def test_bigger_is_better() -> None:
    """Rates are as they are; of what less is better it is the inverse, and its name and unit say so."""
    found = {each["name"]: each for each in to_bigger_is_better(Content((Entry("r.json", loaded_result()),)))}
    rate = found["concurrency=4 / output_tokens_per_second"]
    assert (rate["unit"], rate["value"]) == ("tokens/s", pytest.approx(200 * 4 / 1.2))
    ttft = found["concurrency=4 / 1 / ttft"]
    assert (ttft["unit"], ttft["value"]) == ("1/s", pytest.approx(1 / 0.066))
    assert len(found) == 4 * 5


def test_a_slower_run_is_smaller() -> None:
    """Every value of a run that is worse in everything is smaller or the same: the file's one direction holds."""
    values = [
        {each["name"]: each["value"] for each in to_bigger_is_better(Content((Entry("r", loaded_result(slower)),)))}
        for slower in (1.0, 1.25)
    ]
    assert all(values[1][name] <= value for name, value in values[0].items())
    assert values[1]["concurrency=4 / 1 / tpot"] < values[0]["concurrency=4 / 1 / tpot"]


def test_several_documents() -> None:
    """Names of several files differ by their file; a comparison gives the median of head's runs."""
    entries = (Entry("c.json", comparison()), Entry("e.json", EVALUATION))
    found = {each["name"]: each for each in to_bigger_is_better(Content(entries))}
    kld = found["e.json: hybrid / 1 / kld_mean"]
    assert (kld["unit"], kld["value"], kld["range"]) == ("1/nat", pytest.approx(1 / 0.003), "± 16.7")
    head = found["c.json: concurrency=16 / output_tokens_per_second"]["value"]
    assert head == pytest.approx(200 * 16 / 1.8 / 1.1 * 1.002)


def test_an_invalid_run_is_left_out() -> None:
    """Figures of a run with errors enter no history."""
    assert to_bigger_is_better(Content((Entry("h.json", hostile_result()),))) == []


def test_it_is_json() -> None:
    """Every entry has a text for its name and unit and a number for its value, as the action asks."""
    found = json.loads(json.dumps(to_bigger_is_better(Content((Entry("e.json", EVALUATION),))), allow_nan=False))
    assert all(set(each) - {"range"} == {"name", "unit", "value"} for each in found)
