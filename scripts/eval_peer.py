#!/usr/bin/env python3
"""Hold the figures of `ossquant eval` against those that llama-perplexity --kl-divergence prints.

    scripts/eval_peer.py BASE.gguf OTHER.gguf TEXT.txt --llama-perplexity build/bin/llama-perplexity

llama-perplexity keeps the base's logits in 16 bits. The first column is what it prints, the second our figures of
those very logits, the third our figures of the base's logits as they are. Needs llama-cpp-python.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ossquant.bench.gguf_candidate import GgufCandidate
from ossquant.bench.quality import Estimate, Scores, join, score, summarize
from ossquant.bench.text import Text

WINDOW = 512
# what llama-perplexity calls a figure, and what we do
NAMES = {
    "Mean PPL(Q)": "ppl",
    "Mean PPL(base)": "ppl_reference",
    "Mean ln(PPL(Q)/PPL(base))": "ln_ppl_ratio",
    "Mean PPL(Q)/PPL(base)": "ppl_ratio",
    "Mean    KLD": "kld_mean",
    "Maximum KLD": "kld_max",
    "99.9%   KLD": "kld_p99_9",
    "99.0%   KLD": "kld_p99",
    "Median  KLD": "kld_median",
    "Mean    Δp": "delta_p_mean",
    "RMS Δp": "delta_p_rms",
    "Same top p": "same_top",
}


def peer(program: Path, model: Path, text: Path, logits: Path, *more: str) -> str:
    """Run llama-perplexity; what it prints."""
    command = [program, "-m", model, "-f", text, "-c", str(WINDOW), "-b", str(WINDOW), "--no-warmup",
               "--kl-divergence-base", logits, *more]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout + done.stderr


def printed(said: str) -> dict[str, tuple[float, float | None]]:
    """The figures and errors that llama-perplexity printed, by our names."""
    found = {}
    for line in said.splitlines():
        name, colon, figures = line.rpartition(":")
        numbers = re.findall(r"-?\d+\.\d+", figures)
        for theirs, ours in NAMES.items():
            if colon and name.strip().endswith(theirs) and numbers:
                found[ours] = (float(numbers[0]), float(numbers[1]) if len(numbers) > 1 else None)
    return found


def read_base(path: Path) -> tuple[list[Text], list[torch.Tensor]]:
    """The texts and the 16-bit log-probabilities (positions, vocab) of each, as llama-perplexity has stored them."""
    raw = path.read_bytes()
    if raw[:8] != b"_logits_":
        raise SystemExit(f"{path}: not what llama-perplexity writes")
    window, vocab, chunks = np.frombuffer(raw, np.int32, 3, 8).tolist()
    tokens = np.frombuffer(raw, np.int32, window * chunks, 20).reshape(chunks, window)
    rows, width = window - 1 - window // 2, 2 * ((vocab + 1) // 2) + 4
    stored = np.frombuffer(raw, np.uint16, rows * width * chunks, 20 + tokens.nbytes).reshape(chunks, rows, width)
    scale, low = (stored[..., 2 * at : 2 * at + 2].copy().view(np.float32) for at in (0, 1))
    logs = scale * stored[..., 4 : 4 + vocab] + low
    texts = [Text(tuple(ids), window // 2 + 1) for ids in tokens.tolist()]
    return texts, [torch.from_numpy(each) for each in logs]


def computed(path: Path, texts: Sequence[Text]) -> torch.Tensor:
    """The logits of a GGUF file where scored tokens are predicted."""
    model = GgufCandidate(path.name, path, on_host=True)
    model.load(WINDOW)
    return torch.cat(list(model.logits(texts, None)))


def ours(base: torch.Tensor, other: torch.Tensor, texts: Sequence[Text], *, as_stored: bool) -> dict[str, Estimate]:
    """Our figures; as_stored: of log-probabilities that are not normalized again, and no less than -16."""
    tokens = torch.tensor([token for text in texts for token in text.token_ids[text.begin :]])
    units = np.repeat(np.arange(len(texts)), [text.scored for text in texts])
    if not as_stored:
        return summarize(score(base, other, tokens), units)
    return summarize(join([_stored(*row) for row in _rows(base, other, tokens)]), units)


def _rows(*columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(column.split(64) for column in columns), strict=True)


def _stored(base: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor) -> Scores:
    """Scores with P as it is stored, where the sum runs over tokens of more than e**-16, as llama-perplexity's does."""
    found = score(base, other, tokens)
    ln_p, ln_q = base.double(), other.double().log_softmax(dim=-1)
    kld = torch.where(ln_p > -16, ln_p.exp() * (ln_p - ln_q), 0.0).sum(dim=-1)
    at = tokens.unsqueeze(-1)
    p, q = (ln.gather(-1, at).squeeze(-1) for ln in (ln_p, ln_q))
    columns = {"kld": kld, "nll_reference": -p, "delta_p": q.exp() - p.exp()}
    return replace(found, **{name: column.numpy() for name, column in columns.items()})


def main() -> None:
    """Run both and print their figures side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "other", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--llama-perplexity", type=Path, default=Path("llama-perplexity"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "base.kld"
        peer(arguments.llama_perplexity, arguments.base, arguments.text, logits)
        theirs = printed(peer(arguments.llama_perplexity, arguments.other, arguments.text, logits, "--kl-divergence"))
        texts, stored = read_base(logits)
    other = computed(arguments.other, texts)
    same = ours(torch.cat(stored), other, texts, as_stored=True)
    exact = ours(computed(arguments.base, texts), other, texts, as_stored=False)
    print(f"{len(other)} tokens of {len(texts)} windows of {WINDOW}; ± takes tokens as independent")
    print(f"{'':13}{'llama-perplexity':>23}{'ours, its base logits':>23}{'ours':>23}")
    for name, (value, error) in theirs.items():
        cells = [_cell(value, error), *(_cell(each[name].value, each[name].se_tokens) for each in (same, exact))]
        print(f"{name:13}" + "".join(f"{cell:>23}" for cell in cells))


def _cell(value: float, error: float | None) -> str:
    return f"{value:.6f}" + ("" if error is None else f" ± {error:.6f}")


if __name__ == "__main__":
    main()
