#!/usr/bin/env python3
"""Run llama.cpp's convert_hf_to_gguf.py on the tiny model.

The converter knows a pre-tokenizer by what a vocabulary makes of one sentence, which says nothing for a vocabulary of
640 tokens. The tiny model's split is gpt-oss' own, which the converter calls "gpt-4o"; that is all that is told here.
"""

import convert_hf_to_gguf
from conversion.base import TextModel

if __name__ == "__main__":
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
    convert_hf_to_gguf.main()
