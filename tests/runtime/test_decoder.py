"""Decoding from a fixed cache, plainly and by replaying: the tokens of transformers' own cache, or no replaying."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from recording import record

from ossquant import load_model
from ossquant.errors import UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime import decoder, expert_kernels
from ossquant.runtime.cuda_graphs import Capture, Compute
from ossquant.runtime.decode_kernels import chosen_experts
from ossquant.runtime.decoder import ATTRIBUTE, Cache, Decoder
from ossquant.runtime.fixed_cache import CACHE
from ossquant.runtime.generate import continue_prompt, generate, sampling
from ossquant.runtime.warmup import warm_up

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def loaded(trained: Path) -> tuple[Any, Any]:
    return load_model(trained, scheme="hybrid", dtype="float32")


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Iterator[Any]:
    """A model whose decoder is new."""
    model, _ = loaded
    setattr(model, ATTRIBUTE, Decoder(model, 8192, None))
    yield model
    for layer in model.model.layers:
        layer.mlp.experts.chosen = None


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(0, 600, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def continued(model: Any, tokens: torch.Tensor, new: int, cache: Cache, **options: Any) -> list[int]:
    """Exactly so many tokens after a prompt."""
    options = {"do_sample": False} | options
    found = continue_prompt(model, tokens, max_new_tokens=new, min_new_tokens=new, cache=cache, **options)
    return found[0, tokens.shape[1] :].tolist()


def of(model: Any) -> Decoder:
    return getattr(model, ATTRIBUTE)


@pytest.mark.parametrize(
    ("prompt_tokens", "new"),
    [(1, 20), (20, 150), (127, 4), (128, 4), (PREFILL_CHUNK + 1, 4), (2 * PREFILL_CHUNK - 3, 10), (1300, 4)],
)
def test_tokens_are_those_of_the_dynamic_cache(prompt_tokens: int, new: int, model: Any) -> None:
    """Around the window, a chunk and the slots of a graph: the same tokens; one sequence leaves the next nothing."""
    for tokens in (prompt(prompt_tokens), prompt(prompt_tokens + 1)):
        assert continued(model, tokens, new, "static") == continued(model, tokens, new, "dynamic")


def test_sampled_tokens_are_the_same(model: Any) -> None:
    """With one seed, both caches draw the same."""
    drawn = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(3)
        drawn.append(continued(model, prompt(9), 40, cache, **sampling(model, 1.0)))
    assert drawn[0] == drawn[1]


def test_room_is_made(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that outgrows what was reserved goes on, and what was planned for is all that is reserved."""
    monkeypatch.setattr(decoder, "LEAST_SPAN", 32)
    setattr(model, ATTRIBUTE, Decoder(model, 40, None))
    expected = continued(model, prompt(30), 110, "dynamic")
    with decoder.decoding(model, 30, 140, "static"):
        assert of(model)._cache.capacity == 40
    assert continued(model, prompt(30), 110, "static") == expected
    assert of(model)._cache.capacity == 160


def test_memory_is_that_of_the_plan(model: Any) -> None:
    """Full layers have a slot a token, sliding ones the window, and nothing is reserved for what may never be said."""
    setattr(model, ATTRIBUTE, Decoder(model, 2048, None))
    with decoder.decoding(model, 100, 100_000, "static"):
        slots = [keys.shape[2] for keys in of(model)._cache.keys]
    assert slots == [128, 2048, 128, 2048]


@pytest.fixture
def captured(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Compute]:
    """What is replayed instead of CUDA graphs, for experts by Triton's kernels in its interpreter."""
    pytest.importorskip("triton", reason="Triton is not on this platform")
    monkeypatch.setattr(expert_kernels, "ROWS", 256)  # the interpreter takes its time for each program
    monkeypatch.setattr(decoder, "LEAST_SPAN", 32)
    replays: list[Compute] = []

    def capture(compute: Compute) -> Compute:
        replays.append(record(compute))
        return replays[-1]

    use(model, capture)
    return replays


def use(model: Any, capture: Capture) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.chosen = chosen_experts(layer.mlp.experts)
    setattr(model, ATTRIBUTE, Decoder(model, 512, capture))


def test_replays_give_the_tokens(model: Any, captured: list[Compute]) -> None:
    """Operations recorded once and done again, over the window and from one graph to the next: the same tokens."""
    expected = continued(model, prompt(124), 8, "dynamic")
    assert continued(model, prompt(124), 8, "auto") == expected
    assert len(captured) == 2
    assert list(of(model)._replays.values()) == captured
    assert continued(model, prompt(127), 3, "auto") == continued(model, prompt(127), 3, "dynamic")
    assert len(captured) == 2  # those of before


@pytest.mark.parametrize("scheme", ("nf4", "fp4"))
def test_replays_of_bitsandbytes_experts(scheme: str, trained: Path, captured: list[Compute]) -> None:
    """Attention and experts of bitsandbytes ask the device nothing, and replay to the same answer."""
    model, tokenizer = load_model(trained, scheme=scheme, dtype="float32")
    expected = generate(model, tokenizer, QUESTION, max_new_tokens=6)
    use(model, lambda compute: captured.append(record(compute)) or captured[-1])
    reply = generate(model, tokenizer, QUESTION, max_new_tokens=6)
    assert reply.token_ids == expected.token_ids
    assert captured


def test_warming_up_captures_every_graph(
    loaded: tuple[Any, Any], model: Any, captured: list[Compute], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request after warming up captures nothing, however long it is within what was loaded for."""
    monkeypatch.setattr(decoder, "LEAST_SPAN", 128)
    setattr(model, ATTRIBUTE, Decoder(model, 150, of(model).capture))
    warm_up(*loaded)
    assert sorted(of(model)._replays) == [128, 256, 1024]  # the last is that of the chunk it computes
    before = len(captured)
    assert continued(model, prompt(126), 4, "auto") == continued(model, prompt(126), 4, "dynamic")
    assert len(captured) == before


def test_graphs_of_a_cache_that_was_too_small_are_forgotten(model: Any, captured: list[Compute]) -> None:
    """Once a sequence has outgrown its cache, the next one is not replayed into the old."""
    setattr(model, ATTRIBUTE, Decoder(model, 34, of(model).capture))
    assert continued(model, prompt(31), 6, "auto") == continued(model, prompt(31), 6, "dynamic")
    assert of(model)._cache.capacity == 68
    assert continued(model, prompt(5), 4, "auto") == continued(model, prompt(5), 4, "dynamic")
    assert len(captured) == 4  # of 32 slots, 34, 64, and 32 again


def test_moved_weights_are_captured_anew(model: Any, captured: list[Compute]) -> None:
    """A graph knows addresses: it is not replayed once weights lie elsewhere."""
    continued(model, prompt(5), 2, "auto")
    norm = model.model.norm.weight
    norm.data = norm.data.clone() * 1.5
    assert continued(model, prompt(5), 3, "auto") == continued(model, prompt(5), 3, "dynamic")
    assert len(captured) == 2
    norm.data /= 1.5


def test_what_asks_the_device_is_not_replayed(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Experts that are asked for one by one cannot be captured: it is said, and tokens are right."""
    setattr(model, ATTRIBUTE, Decoder(model, 512, record))
    assert continued(model, prompt(9), 4, "auto") == continued(model, prompt(9), 4, "dynamic")
    assert "decoding without a CUDA graph: RuntimeError: aten::bincount asks the device" in caplog.text


def test_a_replay_of_the_past_is_not_used(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One that gives again what it gave, whatever the token, is found out before it is used."""

    def frozen(compute: Compute) -> Compute:
        logits = compute()
        return lambda: logits

    setattr(model, ATTRIBUTE, Decoder(model, 512, frozen))
    assert continued(model, prompt(140), 6, "auto") == continued(model, prompt(140), 6, "dynamic")
    assert "its logits are off by" in caplog.text


def test_a_changed_model_goes_its_own_way(trained: Path) -> None:
    """With hooks or adapters, static is refused with the reason and auto computes with them."""
    model, tokenizer = load_model(trained, scheme="nf4", dtype="float32")
    setattr(model, ATTRIBUTE, Decoder(model, 512, record))
    calls: list[int] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    generate(model, tokenizer, QUESTION, max_new_tokens=3)
    assert len(calls) == 3
    with pytest.raises(UsageError, match="hooks"):
        generate(model, tokenizer, QUESTION, cache="static")
    hook.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(UsageError, match="exchanged since it was loaded"):
        generate(model, tokenizer, QUESTION, cache="static")
    assert generate(model, tokenizer, QUESTION, max_new_tokens=3).token_ids


def test_several_tokens_after_one_are_refused(model: Any) -> None:
    """A decoded sequence has forgotten what computing several tokens at once would need: an error, no wrong logits."""
    with decoder.decoding(model, 5, 9, "static") as cache, torch.inference_mode():
        model(prompt(5), use_cache=True, **{CACHE: cache})
        model(prompt(1), use_cache=True, **{CACHE: cache})
        with pytest.raises(UsageError, match="one token at a time"):
            model(prompt(2), use_cache=True, **{CACHE: cache})


def test_the_forward_comes_back(model: Any) -> None:
    """After a sequence, and after one that fails, the model's forward is its own."""
    continued(model, prompt(5), 2, "static")
    assert "forward" not in vars(model)
    with pytest.raises(ZeroDivisionError), decoder.decoding(model, 5, 9, "static"):
        assert "forward" in vars(model)
        raise ZeroDivisionError
    assert "forward" not in vars(model)
