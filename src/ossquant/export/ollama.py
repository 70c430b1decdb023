"""Ollama's recipe beside a GGUF file: what to load, how to sample, and from which version on."""

# From 0.30 on Ollama runs llama.cpp's server. 0.11.5 to 0.13 take such files, too, but do not know REQUIRES; earlier
# versions know the architecture under another name. Source: Ollama's issues 11714 and 11816 and its docs, 2026-11-26
MINIMUM_VERSION = "0.30.0"


def modelfile(file: str) -> bytes:
    """The Modelfile of a model in one file of this name, which lies beside it.

    Which versions of Ollama take several files its documents do not say. Sampling is what OpenAI recommends:
    temperature 1, all tokens. The template is the file's own.
    """
    lines = [
        f"FROM ./{file}",
        f"REQUIRES {MINIMUM_VERSION}",
        "PARAMETER temperature 1",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1",
    ]
    return "\n".join(lines).encode() + b"\n"
