"""A GGUF file as a candidate, computed by llama.cpp through llama-cpp-python; it is fed token ids, never text."""

import os
import re
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from ossquant.bench.candidate import SPEED_PROMPT, SPEED_RUNS, SPEED_TOKENS, Facts, Sampling, not_finite
from ossquant.bench.hidden import BLOCK_ROWS, Progress
from ossquant.bench.measure import SEED
from ossquant.bench.text import Text
from ossquant.errors import CheckpointError, MissingExtraError, UsageError

TOKENS = "tokenizer.ggml.tokens"
_CALLBACKS: list[Any] = []
LOG_LEVEL_ERROR = 4  # ggml.h, 2026-11
_SPLIT = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")
_WRONG = (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError)  # what a damaged file makes of a reader


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a name means: itself, or the only one (or first part) in a folder without safetensors.

    None if it means none. Raises UsageError for a folder with several.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"no file {name}", hint="give a .gguf file or a checkpoint")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(each for each in path.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", each.name))
    if len(found) > 1:
        raise UsageError(f"{name} holds {len(found)} GGUF models", hint=f"name one, such as {found[0]}")
    return found[0] if found else None


class GgufCandidate:
    """A GGUF file, or all of its parts when given the first; on_host keeps it off accelerators."""

    def __init__(self, name: str, path: Path, *, on_host: bool) -> None:
        self._path, self._on_host = path, on_host
        try:
            readers = [GGUFReader(part) for part in _parts(path)]
            tensors = [tensor for reader in readers for tensor in reader.tensors]
            self._tokens = list(readers[0].fields[TOKENS].contents())
            self.facts = Facts(
                name, "gguf", _format(tensors), sum(int(tensor.n_bytes) for tensor in tensors),
                sum(int(tensor.n_elements) for tensor in tensors), len(self._tokens),
            )  # fmt: skip
        except _WRONG as error:
            raise CheckpointError(f"{path}: no sound GGUF file: {error}", hint="fetch or make it again") from error
        self._library: Any = _library()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None

    def vocabulary(self) -> Mapping[int, str]:
        return dict(enumerate(self._tokens))

    def load(self, context: int) -> None:
        if self._model is not None:
            return
        library = self._library
        log = _start(library)
        options = library.llama_model_default_params()
        if self._on_host:
            options.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(os.fsencode(self._path), options)
        if self._model:
            settings = library.llama_context_default_params()
            settings.n_ctx = context
            settings.n_batch = settings.n_ubatch = BLOCK_ROWS
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            self._context = library.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            self.close()
            raise CheckpointError(f"{self._path}: llama.cpp cannot load it: {' '.join(log)}",
                                  hint="check the file, and the memory that is free")  # fmt: skip
        self._batch = library.llama_batch_init(BLOCK_ROWS, 0, 1)

    @cached_property
    def _vocab_size(self) -> int:
        return len(self._tokens)

    def answer(self, prompt: Sequence[int], sampled: Sampling) -> list[int]:
        random = np.random.default_rng(sampled.seed)
        last = self._prefill(prompt)
        answer: list[int] = []
        while len(answer) < sampled.max_new_tokens:
            if not np.isfinite(last).all():
                raise not_finite(self.facts.name)
            if sampled.temperature:
                last = last / sampled.temperature + random.gumbel(size=last.shape)
            answer.append(int(last.argmax()))
            if answer[-1] in sampled.stops:
                break
            last = self._decode(answer[-1:], len(prompt) + len(answer) - 1, from_row=0)[-1]
        return answer

    def decode_rate(self) -> float:
        prompt = np.random.default_rng(SEED).integers(self._vocab_size, size=SPEED_PROMPT).tolist()
        rates = []
        for _ in range(1 + SPEED_RUNS):
            token = int(self._prefill(prompt).argmax())
            started = time.perf_counter()
            for at in range(SPEED_TOKENS - 1):
                token = int(self._decode([token], SPEED_PROMPT + at, from_row=0)[-1].argmax())
            rates.append((SPEED_TOKENS - 1) / (time.perf_counter() - started))
        return statistics.median(rates[1:])  # the first one warms up

    def logits(self, texts: Sequence[Text], progress: Progress | None) -> Iterator[torch.Tensor]:
        for number, text in enumerate(texts, 1):
            self._forget()
            ids, first = text.token_ids[:-1], text.begin - 1
            for begin in range(0, len(ids), BLOCK_ROWS):
                rows = self._decode(ids[begin : begin + BLOCK_ROWS], begin, from_row=first - begin)
                if len(rows):
                    yield torch.from_numpy(rows)
            if progress:
                progress(number, len(texts))
        self.close()

    def _prefill(self, prompt: Sequence[int]) -> Any:
        """Start over with a prompt; gives the logits after it."""
        self._forget()
        for begin in range(0, len(prompt), BLOCK_ROWS):
            part = prompt[begin : begin + BLOCK_ROWS]
            rows = self._decode(part, begin, from_row=len(prompt) - 1 - begin)
        return rows[-1]

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, token_ids: Sequence[int], position: int, from_row: int) -> Any:
        """Compute up to BLOCK_ROWS tokens that begin at position; gives logits (rows, vocab) from a row on."""
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for row, token in enumerate(token_ids):
            batch.token[row], batch.pos[row] = token, position + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = row >= from_row
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise CheckpointError(f"{self._path}: llama.cpp stops with {code}: {' '.join(_start(self._library))}",
                                  hint="check the memory that is free")  # fmt: skip
        wanted = range(max(0, from_row), len(token_ids))
        rows = [self._library.llama_get_logits_ith(self._context, row) for row in wanted]
        copies = [np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows]
        return np.stack(copies) if copies else np.empty((0, self._vocab_size), np.float32)

    def close(self) -> None:
        if self._batch is not None:
            self._library.llama_batch_free(self._batch)
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = self._batch = None


def _library() -> Any:
    try:
        import llama_cpp
    except (ModuleNotFoundError, OSError, RuntimeError) as error:  # the latter: its shared library does not load
        raise MissingExtraError(
            f"a GGUF file is computed by llama-cpp-python, which is not installed: {error}",
            hint="pip install llama-cpp-python",
        ) from error
    return llama_cpp


@cache
def _start(library: Any) -> deque[str]:
    """Start llama.cpp; gives its last errors, as they come, in place of its log on stderr."""
    errors: deque[str] = deque(maxlen=3)

    def hear(level: int, text: bytes, data: object) -> None:
        if level == LOG_LEVEL_ERROR and text:
            errors.append(text.decode("utf-8", "replace").strip())

    callback = library.llama_log_callback(hear)
    _CALLBACKS.append(callback)  # llama.cpp keeps no reference to it
    library.llama_log_set(callback, None)
    library.llama_backend_init()
    return errors


def _parts(path: Path) -> list[Path]:
    """The parts of a split model, in the names that llama.cpp gives them."""
    split = _SPLIT.fullmatch(path.name)
    if not split:
        return [path]
    return [path.with_name(f"{split[1]}-{number:05}-of-{split[2]}.gguf") for number in range(1, int(split[2]) + 1)]


def _format(tensors: Sequence[Any]) -> str:
    """The formats of its experts and of its attention, as GGUF names them."""
    found = []
    for part in ("ffn_down_exps.weight", "attn_q.weight"):
        kinds = {GGMLQuantizationType(tensor.tensor_type).name for tensor in tensors if tensor.name.endswith(part)}
        found += sorted(kinds)
    return " ".join(dict.fromkeys(found)).lower()
