"""What a user has to know of an engine's server: where it listens, from what version on, what it loads."""

import re
import shlex

from ossquant.engine import LOOPBACK, Engine
from ossquant.errors import UsageError
from ossquant.fit import ENGINE_FORMATS, GGUF, GGUF_ENGINES, MIXED, FitVerdict, loads_stored, stored_format
from ossquant.plan import Plan
from ossquant.units import GIB, size, size_both

PORTS = {"llama.cpp": 8080, "ollama": 11434, "vllm": 8000, "mlx": 8080, "transformers": 8000}  # their own defaults
# From what version on the lines of `advice` work as they are counted
_MINIMUM = {
    "llama.cpp": "b6325",  # flash attention where it can be (pull request 15434, 2025-08-30); gpt-oss since b6096
    "ollama": "0.30",  # llama-server inside; 0.11.5 to 0.13 take a GGUF of gpt-oss too
    "vllm": "0.10.2",  # the tool parser `openai` (vllm-project/recipes 83, 2025-10-06)
    "mlx": "0.32",  # mlx-lm's, tried; 2026-11-26
    "transformers": "5.23",  # tried, 2026-11-26
}
_MINIMUM_INT4 = "0.32"  # of vLLM; the one that has loaded our names, 2026-11-22
_PROMPT_CACHE = 8 * GIB  # llama-server's --cache-ram
_SERVED_BY_TRANSFORMERS = ("mxfp4", "bf16")


def program(engine: Engine) -> str:
    """The program, or the package, whose version counts."""
    return {"llama.cpp": "llama-server", "ollama": "Ollama", "vllm": "vLLM", "mlx": "mlx-lm"}.get(
        engine.name, engine.name
    )


def minimum_version(verdict: FitVerdict) -> str:
    """The oldest version of the engine that the line is meant for."""
    int4 = verdict.candidate.engine.name == "vllm" and verdict.candidate.format == "int4"
    return _MINIMUM_INT4 if int4 else _MINIMUM[verdict.candidate.engine.name]


def loads(engine: Engine, plan: Plan) -> bool:
    """Whether an engine's own server loads a checkpoint as it is stored."""
    if engine.name == "transformers":
        return stored_format(plan) in _SERVED_BY_TRANSFORMERS
    return loads_stored(engine, plan)


def refusal(source: str, plan: Plan, engine: str | None) -> UsageError:
    """Say that an engine, or with None any, does not serve a checkpoint as it is stored, and what does and helps."""
    name, able = stored_format(plan), [each for each in ENGINE_FORMATS if loads(Engine(each), plan)]
    form = f"a {name} checkpoint" if name in (GGUF, MIXED) else f"a checkpoint in {name}"
    who = f"{engine} does not load" if engine else "no server loads"
    others = f"{' or '.join(able)} does" if able else "ossquant run or chat do"
    return UsageError(f"{who} {form}", hint=f"{others}; for {engine or 'a server'}, {_export(source, name, engine)}")


def _export(source: str, name: str, engine: str | None) -> str:
    target = "gguf" if engine in GGUF_ENGINES else "mxfp4"  # what the engine loads best
    if name in ("mxfp4", "bf16"):
        return f"ossquant export {shlex.quote(source)} OUTPUT --to {target}"
    return f"from the published or bf16 checkpoint: ossquant export CHECKPOINT OUTPUT --to {target}"


def notes(verdict: FitVerdict, host: str = LOOPBACK) -> list[str]:
    """What to know before the line is typed, a sentence each."""
    found = (*_NOTES[verdict.candidate.engine.name](verdict), _reachable(host))
    return [sentence for sentence in found if sentence]


def _llama_server(verdict: FitVerdict) -> list[str]:
    host, needed = verdict.machine.host_memory, verdict.estimate.host_total
    if host is not None and not verdict.machine.device.unified_memory and needed + _PROMPT_CACHE <= host:
        return []
    return [
        f"llama-server keeps prompts in up to {size_both(_PROMPT_CACHE)} of host memory beside this; --cache-ram 0 "
        "turns that off."
    ]


def _ollama(verdict: FitVerdict) -> list[str]:
    found = ["an Ollama that runs already, as a service or as the app, keeps its own settings: stop it first."]
    if verdict.candidate.path:
        found.append(
            f"ollama create copies the GGUF into its own store: {size(verdict.candidate.plan.nbytes)} of disk."
        )
    return found


def _vllm(verdict: FitVerdict) -> list[str]:
    return [
        "before 0.32 vLLM fetches a vocabulary when it starts: offline, TIKTOKEN_ENCODINGS_BASE must name a folder "
        "with o200k_base.tiktoken."
    ]


def _mlx(verdict: FitVerdict) -> list[str]:
    return [
        f"mlx_lm.server bounds no context: {verdict.workload.max_model_len:,} tokens are what is counted here.",
        "mlx_lm.server does not parse harmony, and stops an answer after 512 tokens unless max_tokens says more.",
    ]


def _transformers(verdict: FitVerdict) -> list[str]:
    return ["transformers serve does not parse harmony: its answers hold the analysis, too.",
            "it needs more packages: pip install 'transformers[serving]'."]  # fmt: skip


_NOTES = {"llama.cpp": _llama_server, "ollama": _ollama, "vllm": _vllm, "mlx": _mlx, "transformers": _transformers}


def _reachable(host: str) -> str:
    if host == "localhost" or host == "::1" or re.fullmatch(r"127(\.\d{1,3}){3}", host):
        return ""
    return f"whoever reaches {host} reaches the server, and no key is asked."
