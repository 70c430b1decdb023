"""llama-cpp-python: its server, which shows harmony's markers, and logits against transformers in fp32."""

import json
import subprocess
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from servers import llama_build
from servers.case import ROOT, TINY, Check, Fault, Place, demand, environment
from servers.chat import Manners, ask_all
from servers.dialogue import markers, tiny_dialogues
from servers.exports import export, gguf_of, with_rounded_rope
from servers.install import version_of
from servers.process import LOOPBACK, serving

# Seen in 0.3.36: the role "developer" is refused with 500, <|return|> is not counted, a stream tells no usage, and a
# stream's last character is lost if it takes several tokens, as this one does.
MANNERS = Manners(markers, counts_end=False, streams_usage=False, developer="system", drops_last="👋")

F32 = ("--to", "gguf", "--dense", "f32", "--experts", "f32")
MOST_F32 = 1e-4  # of the logits' norm
MOST_MXFP4 = 0.1  # ggml rounds activations to 8 bits beside quantized weights
TOKENS = 500
LIMIT = 300.0  # seconds


def prepare(place: Place) -> str:
    """Build llama.cpp and install the package on it; returns its version."""
    llama_build.binaries(place)
    return version_of(llama_build.python(place), "llama-cpp-python")


def checks(place: Place) -> Iterator[Check]:
    """Its server on the default export; logits of an f32 export with rounded and with published rope, and of others."""
    yield Check("gguf", "words, markers, finish_reason, usage; whole and streamed", partial(_ask, place))
    yield Check("gguf, all f32", f"logits, rope truncate true: at most {MOST_F32:g} off, same top-1",
                partial(_rounded, place))  # fmt: skip
    yield Check("gguf, all f32", "logits, rope truncate false as published: same top-1", partial(_published, place))
    yield Check("gguf", f"logits, rope truncate true: at most {MOST_MXFP4:g} off", partial(_default, place))


def _ask(place: Place) -> dict[str, Any]:
    file, python = gguf_of(export(place, "llama-0", "--to", "gguf")), llama_build.python(place)

    def command(port: int) -> list[object]:
        options = ["--host", LOOPBACK, "--port", port, "--n_ctx", 2048, "--n_threads", 1]
        return [python, "-m", "llama_cpp.server", "--model", file, *options]

    log = place.folder("logs") / "llama-cpp-python.log"
    with serving(command, log, ready="/v1/models", **llama_build.libraries(place)) as server:
        return ask_all(server, MANNERS, tiny_dialogues())


def _rounded(place: Place) -> dict[str, Any]:
    file = gguf_of(export(place, "f32-truncate", *F32, source=with_rounded_rope(place)))
    found = _distance(place, file, truncate=True)
    demand(found["relative_error"] <= MOST_F32, f"logits differ by {found['relative_error']:.2e}")
    demand(found["top_1"] == 1, f"top-1 agrees on {found['top_1']:.2%} of {found['tokens']} tokens")
    return found


def _published(place: Place) -> dict[str, Any]:
    found = _distance(place, gguf_of(export(place, "f32", *F32)), truncate=False)
    demand(found["top_1"] == 1, f"top-1 agrees on {found['top_1']:.2%} of {found['tokens']} tokens")
    return found


def _default(place: Place) -> dict[str, Any]:
    found = _distance(place, gguf_of(export(place, "llama-0", "--to", "gguf")), truncate=True)
    demand(found["relative_error"] <= MOST_MXFP4, f"logits differ by {found['relative_error']:.2e}")
    return found


def _distance(place: Place, file: Path, truncate: bool) -> dict[str, Any]:
    """How far the logits of a GGUF are from transformers' fp32 ones: relative Frobenius error and equal argmax."""
    import numpy as np

    tokens, output = _tokens(), place.folder("logits") / f"{file.stem}.npy"
    given = place.folder("logits") / "tokens.json"
    given.write_text(json.dumps(tokens))
    script = [llama_build.python(place), ROOT / "scripts/servers/llama_logits.py", file, given, output]
    done = subprocess.run(
        [str(word) for word in script], capture_output=True, text=True, timeout=LIMIT, check=False,
        env=environment(**llama_build.libraries(place)),
    )  # fmt: skip
    if done.returncode:
        raise Fault(f"llama_logits.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    theirs, ours = np.load(output), _reference(truncate)
    return {
        "tokens": len(tokens),
        "relative_error": float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)),
        "top_1": float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
        "truncate": truncate,
    }


@cache
def _tokens() -> tuple[int, ...]:
    """Whole dialogues one after the other, the longest first: more than the sliding window."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids: list[int] = []
    for dialogue in sorted(tiny_dialogues(), key=lambda dialogue: -dialogue.answer_tokens):
        ids += tokenizer.apply_chat_template([*dialogue.messages], add_generation_prompt=True, return_dict=False)
        ids += tokenizer.encode(markers(dialogue)[1] + "<|return|>", add_special_tokens=False)
    return tuple(ids[:TOKENS])


@cache
def _reference(truncate: bool) -> Any:
    """transformers' logits (tokens, vocabulary) of the published weights in fp32, eager attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(TINY)
    config.rope_parameters["truncate"] = truncate
    model = AutoModelForCausalLM.from_pretrained(
        TINY, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([_tokens()])).logits[0].numpy()
