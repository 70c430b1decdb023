import re

import pytest

from made_documents import EVALUATION, HOSTILE, comparison, hostile_result, loaded_result
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.report.markdown import escape, to_markdown


def test_comparison() -> None:
    """The verdict is in the heading, every gated change and limit has its row, and the rest is folded."""
    text = to_markdown(Content((Entry("c.json", comparison()),)))
    assert text.startswith("## Comparison: ❌ regressed\n")
    rows = [line for line in text.splitlines() if line.startswith("| concurrency=16 | output_tokens_per_second |")]
    assert rows[0].endswith("| 5 % worse | ❌ regressed |")
    assert "−9." in rows[0]
    assert "| concurrency=64 | ttft | 306 ms | ≤ 200 ms | ❌ failed |" in text
    assert "| concurrency=4 | ttft | 66 ms | ≤ 200 ms | ✅ ok |" in text
    assert text.index("<details>") < text.index("tokens_per_second_per_user") < text.index("</details>")


def test_result_and_evaluation() -> None:
    """A result has a row a scenario, an evaluation one a candidate, with its error."""
    text = to_markdown(Content((Entry("r.json", loaded_result()), Entry("e.json", EVALUATION))))
    assert "| concurrency=4 | 300/300 | 66 ms |" in text
    assert "| hybrid | hybrid | 12.82 GB | 181 | 0.00300 ± 0.00015 |" in text
    assert "12,000 tokens of 48 texts, against openai/gpt-oss-20b" in text


def test_every_row_has_the_columns_of_its_table() -> None:
    """No name adds a cell or a line to a table."""
    text = to_markdown(Content((Entry("c", comparison()), Entry(HOSTILE, hostile_result()), Entry("e", EVALUATION))))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1


def test_hostile_names() -> None:
    """What a server calls itself is no markup."""
    text = to_markdown(Content((Entry("h.json", hostile_result()),)))
    assert "<script" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert text.encode("utf-8")


@pytest.mark.parametrize("name", ["gpt-oss-20b", "concurrency=16", "http://127.0.0.1:8000/v1", "rate=0.5"])
def test_common_names_stay_readable(name: str) -> None:
    """What needs no escape gets none."""
    assert escape(name) == name
