#!/usr/bin/env python3
"""Time `ossquant export --to gguf` beside `cp` of the same files and, if given, beside llama.cpp's own converter.

    scripts/make_checkpoint.py 20b 20b
    scripts/bench_export.py 20b --rounds 2
    scripts/bench_export.py 20b-slice --converter llama.cpp/convert_hf_to_gguf.py

In turns, after dropping the page cache where the system lets us. The converter runs on its own gguf-py, with this
Python's torch and transformers. It knows tokenizers by a hash, and is told that ours splits text as gpt-oss' does.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench_quantize import OSSQUANT, Run, print_jobs, time_command

CONVERT = """
import runpy, sys
converter, sys.argv = sys.argv[1], sys.argv[1:]
folder = converter.rpartition("/")[0] or "."
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
runpy.run_path(converter, run_name="__main__")
"""


def time_exports(source: Path, converter: Path | None, rounds: int) -> dict[str, list[Run]]:
    """Copy, export and convert in turns; each run by what it was."""
    output = source.with_name(f"{source.name}.timed")
    commands = {
        "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(output)],
        "export --to gguf": [OSSQUANT, "export", str(source), str(output)],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".py") as driver:
        driver.write(CONVERT)
        driver.flush()
        if converter:
            options = ["--outtype", "q8_0", "--outfile", str(output / "converted.gguf")]
            commands["llama.cpp's converter"] = [sys.executable, driver.name, str(converter), str(source), *options]
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                if "converter" in name:
                    output.mkdir()
                runs[name].append(time_command(command))
                shutil.rmtree(output)
    return runs


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    arguments = parser.parse_args()
    print_jobs(time_exports(arguments.checkpoint, arguments.converter, arguments.rounds))


if __name__ == "__main__":
    main()
