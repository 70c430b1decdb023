"""What may happen to a model between loading and decoding, without a word to the decoder or the kernels."""

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record

pytest.importorskip("triton", reason="Triton is not on this platform")

from ossquant import load_model
from ossquant.errors import UsageError
from ossquant.runtime import decoder, expert_kernels
from ossquant.runtime.cuda_graphs import Capture, Compute
from ossquant.runtime.decode_kernels import chosen_experts
from ossquant.runtime.decoder import ATTRIBUTE, Cache, Decoder, decoding
from ossquant.runtime.fixed_cache import FixedCache
from ossquant.runtime.generate import continue_prompt


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program."""
    monkeypatch.setattr(expert_kernels, "ROWS", 256)
    monkeypatch.setattr(decoder, "LEAST_SPAN", 32)


@pytest.fixture
def model(trained: Path) -> Any:
    return load_model(trained, scheme="hybrid", dtype="float32")[0]


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is freed is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(0, 600, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def continued(model: Any, tokens: int, new: int, cache: Cache) -> list[int]:
    """Exactly so many tokens after a prompt."""
    found = continue_prompt(model, prompt(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False, cache=cache)
    return found[0, tokens:].tolist()


def use(model: Any, capture: Capture) -> Decoder:
    for layer in model.model.layers:
        layer.mlp.experts.chosen = chosen_experts(layer.mlp.experts)
    setattr(model, ATTRIBUTE, Decoder(model, 512, capture))
    return getattr(model, ATTRIBUTE)


def takes(experts: Any) -> bool:
    parameters = experts.matrices() if hasattr(experts, "matrices") else experts.stacks()
    with torch.no_grad():
        return experts.chosen.takes(torch.zeros(1, 192), parameters)


@pytest.mark.parametrize("scheme", ("hybrid", "nf4"))
def test_weights_moved_before_the_first_call(scheme: str, trained: Path) -> None:
    """The addresses are those of when they were written down, not of the first call."""
    experts = load_model(trained, scheme=scheme, dtype="float32")[0].model.layers[0].mlp.experts
    experts.chosen = chosen_experts(experts)
    for parameter in experts.parameters():
        parameter.data = parameter.data.clone()
    assert not takes(experts)


@pytest.mark.parametrize("scheme", ("hybrid", "nf4"))
def test_a_copied_layer_does_not_read_the_original(scheme: str, trained: Path) -> None:
    """A deep copy's kernels have the original's addresses, where other weights or none may be."""
    experts = load_model(trained, scheme=scheme, dtype="float32")[0].model.layers[0].mlp.experts
    experts.chosen = chosen_experts(experts)
    assert not takes(copy.deepcopy(experts))


def test_moved_statistics(trained: Path) -> None:
    """bitsandbytes' scales are no parameters; they may lie elsewhere while codes and biases do not."""
    experts = load_model(trained, scheme="nf4", dtype="float32")[0].model.layers[0].mlp.experts
    experts.chosen = chosen_experts(experts)
    assert takes(experts)
    state = experts.down_projs[0].weight.quant_state
    state.absmax = state.absmax.clone()
    assert not takes(experts)


def test_hooks_of_an_expert_are_called(trained: Path) -> None:
    """A hook that changes what an expert gives does so for few tokens as for many."""
    experts = load_model(trained, scheme="nf4", dtype="float32")[0].model.layers[0].mlp.experts
    experts.chosen = chosen_experts(experts)
    for projection in experts.down_projs:
        projection.register_forward_hook(lambda module, args, output: output * 0)
    with torch.no_grad():
        found = experts(torch.randn(2, 192), torch.tensor([[0, 1, 2, 3]] * 2), torch.full((2, 4), 0.25))
    assert not found.any()


def test_another_dtype(model: Any) -> None:
    """model.to(torch.bfloat16), which saving asks for, does not break decoding."""
    continued(model, 5, 2, "static")
    model.to(torch.bfloat16)
    assert continued(model, 9, 3, "static") == continued(model, 9, 3, "dynamic")


def test_a_copied_model_outlives_the_original(trained: Path) -> None:
    """A deep copy decodes by itself, or says that it cannot."""
    model, _ = load_model(trained, scheme="nf4", dtype="float32")
    copied = copy.deepcopy(model)
    expected = continued(copied, 9, 3, "dynamic")
    del model
    gc.collect()
    assert continued(copied, 9, 3, "auto") == expected


def test_nan_stays_in_its_sequence(model: Any) -> None:
    """What a sequence left in slots that the next one does not reach does not become its answer."""
    continued(model, 30, 2, "static")
    cache = getattr(model, ATTRIBUTE)._cache
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    assert continued(model, 9, 4, "static") == continued(model, 9, 4, "dynamic")


def test_a_replay_that_stores_nothing_is_not_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees that keys and values are stored where the token is: nobody else has stored them there."""

    def only_looks(self: FixedCache, keys: Any, values: Any, layer: int, *args: Any, **others: Any) -> tuple[Any, Any]:
        span = self.window if self.is_sliding(layer) else self.span
        return self.keys[layer][:, :, :span], self.values[layer][:, :, :span]

    def capture(compute: Compute) -> Compute:
        with monkeypatch.context() as patched:
            patched.setattr(FixedCache, "update", only_looks)
            return record(compute)

    use(model, capture)
    assert continued(model, 9, 8, "auto") == continued(model, 9, 8, "dynamic")


def test_an_exchanged_forward_is_an_obstacle(model: Any) -> None:
    """A part whose forward was exchanged would not be called by a graph."""
    found = use(model, record)
    part = model.model.layers[0].self_attn.o_proj
    part.forward = lambda x: type(part).forward(part, x) * -1
    assert found.obstacle(model)


def test_an_exchanged_buffer_is_captured_anew(model: Any) -> None:
    """Rotary frequencies are a buffer: a graph knows their address."""
    use(model, record)
    continued(model, 9, 3, "auto")
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone() * 0.5
    assert continued(model, 9, 6, "auto") == continued(model, 9, 6, "dynamic")


def test_hidden_states_once_asked_for_are_no_obstacle(model: Any) -> None:
    """transformers' hooks that record outputs stay for good; they do nothing unless outputs are asked for."""
    found = use(model, record)
    with torch.no_grad():
        model(prompt(3), output_hidden_states=True)
    assert not found.obstacle(model)


def test_a_larger_cache_takes_the_place_of_the_smaller(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller one's memory is given back before the larger one is made: they are never there together."""
    found: Decoder = getattr(model, ATTRIBUTE)
    smaller = weakref.ref(found._cache.keys[1])
    given_back: list[bool] = []
    make = FixedCache.__init__

    def watched(self: FixedCache, *arguments: Any) -> None:
        given_back.append(smaller() is None)
        make(self, *arguments)

    monkeypatch.setattr(FixedCache, "__init__", watched)
    with decoding(model, 2000, 2010, "static"):
        assert given_back == [True]


def test_room_for_one_token(model: Any) -> None:
    """A model that was loaded for a single token has somewhere else to try a graph, and none before the first slot."""
    captured = use(model, record)
    setattr(model, ATTRIBUTE, Decoder(model, 1, captured.capture))
    assert continued(model, 1, 4, "auto") == continued(model, 1, 4, "dynamic")
    assert getattr(model, ATTRIBUTE).capture
    setattr(model, ATTRIBUTE, Decoder(model, 1, captured.capture))
    getattr(model, ATTRIBUTE).warm_up()
    assert getattr(model, ATTRIBUTE)._replays


def test_no_more_slots_than_planned(model: Any) -> None:
    """The plan counts a slot a token of max_model_len, whether that is a power of two or not."""
    setattr(model, ATTRIBUTE, Decoder(model, 1100, None))
    with decoding(model, 1000, 5000, "static"):
        assert getattr(model, ATTRIBUTE)._cache.capacity <= 1100 + 64


def test_whatever_a_capture_raises(model: Any) -> None:
    """Compilers have errors of their own; tokens are computed plainly then."""

    def capture(compute: Compute) -> Compute:
        raise TypeError("of a compiler")

    use(model, capture)
    assert continued(model, 9, 3, "auto") == continued(model, 9, 3, "dynamic")


def test_a_failed_capture_is_the_last(model: Any) -> None:
    """torch's allocator is not to be trusted with a capture after one that failed."""
    tried = []

    def capture(compute: Compute) -> Compute:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    use(model, capture)
    continued(model, 30, 8, "auto")  # over two spans
    assert len(tried) == 1


def test_no_slot_beyond_the_context(model: Any) -> None:
    """An index out of range leaves a CUDA device unusable: it is refused before."""
    model.config.max_position_embeddings = 64
    setattr(model, ATTRIBUTE, Decoder(model, 64, None))
    with pytest.raises(UsageError):
        continued(model, 60, 10, "static")


def test_the_cache_goes_with_the_model(trained: Path, without_collector: None) -> None:
    """Keys and values are freed with the model, not when the collector comes by."""
    model, _ = load_model(trained, scheme="hybrid", dtype="float32")
    continued(model, 9, 3, "static")
    found = weakref.ref(getattr(model, ATTRIBUTE))
    del model
    assert found() is None
