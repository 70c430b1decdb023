"""Documents: the JSON files that ossquant writes about measurements, told apart by their kind."""

from pathlib import Path
from typing import Any

from ossquant.bench.comparison import Comparison
from ossquant.bench.comparison_reader import comparison_from_json
from ossquant.bench.quality_result import QualityResult, quality_from_json
from ossquant.bench.result import Result
from ossquant.bench.result_reader import from_json
from ossquant.bench.runs import Runs
from ossquant.bench.strict import read_json
from ossquant.errors import UsageError

MOST_FILES = 1000
Document = Result | QualityResult | Comparison


def load_document(path: Path) -> Document:
    """Read a result, an evaluation or a comparison. Raises UsageError for anything else."""
    return document_from_json(read_json(path), str(path))


def document_from_json(raw: Any, name: str) -> Document:
    """Read any of them; name stands for it in errors. Raises UsageError."""
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind == "comparison":
        return comparison_from_json(raw, name)
    return quality_from_json(raw, name) if kind == "eval" else from_json(raw, name)


def measured_from_json(raw: Any, name: str) -> Result:
    """Read a result or an evaluation, either as a result. Raises UsageError."""
    document = document_from_json(raw, name)
    if isinstance(document, Comparison):
        raise UsageError(f"{name} is a comparison, not a result", hint="give a result.json")
    return document.as_result() if isinstance(document, QualityResult) else document


def load_runs(path: Path, name: str) -> Runs:
    """Read a result file, or every .json file of a folder in the order of their names. Raises UsageError."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: no .json file in it", hint="give a result.json, or a folder of them")
    if len(files) > MOST_FILES:
        raise UsageError(f"{path}: more than {MOST_FILES} files")
    return Runs(name, str(path), tuple(measured_from_json(read_json(file), str(file)) for file in files))
