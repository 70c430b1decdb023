#!/usr/bin/env python3
"""Write dialogues as vLLM's chat endpoint puts them to gpt-oss; runs in vLLM's environment.

vllm_prompts.py DIALOGUES.json OUTPUT.json

vLLM renders and parses harmony by its own copy of o200k_harmony, whatever tokenizer a checkpoint brings, with a system
message that tells the date (VLLM_SYSTEM_START_DATE). Each dialogue gets its `prompt` and `answer` as token ids.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.parser.harmony_utils import (
    build_harmony_preamble,
    extract_instructions_from_messages,
    get_encoding,
    parse_chat_inputs_to_harmony_messages,
    render_for_completion,
)


def with_ids(dialogue: dict[str, Any]) -> dict[str, Any]:
    """The dialogue with its token ids."""
    instructions, messages = extract_instructions_from_messages(dialogue["messages"])
    preamble = build_harmony_preamble(instructions=instructions, reasoning_effort=dialogue["reasoning_effort"])
    answer = (
        f"<|channel|>analysis<|message|>{dialogue['analysis']}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{dialogue['final']}<|return|>"
    )
    return dialogue | {
        "prompt": list(render_for_completion([*preamble, *parse_chat_inputs_to_harmony_messages(messages)])),
        "answer": get_encoding().encode(answer, allowed_special="all"),
    }


if __name__ == "__main__":
    given, output = map(Path, sys.argv[1:])
    output.write_text(json.dumps([with_ids(dialogue) for dialogue in json.loads(given.read_text())]))
