"""The `ossquant` command. Only this package speaks: answers on stdout, all else on stderr."""

import errno
import sys

import typer

from ossquant.cli import (
    bench,
    chat,
    compare,
    evaluate,
    export,
    fit,
    merge,
    quantize,
    report,
    run,
    serve_command,
    verify,
    warmup,
)
from ossquant.errors import (
    CheckpointError,
    CommandError,
    DoesNotFitError,
    EndpointError,
    InvalidRunError,
    OssquantError,
    UsageError,
)

EXIT_CODES: dict[type[OssquantError], int] = {
    UsageError: 2,
    CheckpointError: 3,
    DoesNotFitError: 4,
    InvalidRunError: 5,
    EndpointError: 6,
    CommandError: 6,
}

app = typer.Typer(
    name="ossquant",
    help="gpt-oss models in 4 bits, on hardware you own.",
    rich_markup_mode=None,  # rich help costs 0.07 s at every --help
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)
app.command("fit")(fit.fit)
app.command("quantize")(quantize.quantize)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("serve-command")(serve_command.serve_command)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("warmup")(warmup.warmup)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("eval")(evaluate.evaluate)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ossquant {version('ossquant')}")
        raise typer.Exit


@app.callback()
def _ossquant(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command; a failure becomes one sentence on stderr and an exit code."""
    try:
        app()
    except OssquantError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.hint:
            typer.echo(f"  try: {error.hint}", err=True)
        sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        typer.echo("error: the disk is full, the answer is not whole", err=True)
        sys.exit(EXIT_CODES[DoesNotFitError])
