"""ossquant report: results for people and for CI."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ossquant.errors import UsageError


def report(
    results: Annotated[
        list[Path], typer.Argument(help="What bench, eval or compare wrote with --json or --output, any of them.")
    ],
    markdown: Annotated[Path | None, typer.Option(help="Markdown, as $GITHUB_STEP_SUMMARY takes it.")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML: a test case a scenario and gated metric.")] = None,
    html: Annotated[Path | None, typer.Option(help="One page that needs no network.")] = None,
    custom_bigger_is_better: Annotated[
        Path | None, typer.Option(help="JSON for github-action-benchmark; less is better becomes 1 / value.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="A gate.toml: hold results and evaluations against its absolute limits.")
    ] = None,
) -> None:
    """Write results in other forms; - is stdout, Markdown if no form is named.

    A comparison carries its verdict. With --gate a result or an evaluation is held against the gate's absolute limits.
    Exit codes: 0 ok or nothing asked, 1 regressed or a limit not kept, 5 inconclusive or an invalid run.
    """
    from ossquant.bench.gate import load_gate
    from ossquant.bench.report.content import load_content
    from ossquant.cli.compare import VERDICT_CODES

    content = load_content(results, load_gate(gate) if gate else None)
    if not any((markdown, junit, html, custom_bigger_is_better)):
        markdown = Path("-")
    if markdown:
        from ossquant.bench.report.markdown import to_markdown

        _write(markdown, to_markdown(content))
    if junit:
        from ossquant.bench.report.junit import to_junit

        _write(junit, to_junit(content))
    if html:
        from ossquant.bench.report.page import to_html

        _write(html, to_html(content))
    if custom_bigger_is_better:
        from ossquant.bench.report.bigger import to_bigger_is_better

        _write(custom_bigger_is_better, json.dumps(to_bigger_is_better(content), indent=2) + "\n")
    raise typer.Exit(VERDICT_CODES[content.verdict] if content.verdict else 0)


def _write(path: Path, text: str) -> None:
    if path == Path("-"):
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give a file you may write") from error
