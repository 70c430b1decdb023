"""Run: probe an endpoint, warm it up, put each load on it, and sum up what was seen."""

import asyncio
import gc
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from ossquant.bench.asked import Asked, Measured
from ossquant.bench.client import Client
from ossquant.bench.devices import DeviceWatch
from ossquant.bench.endpoint import Endpoint
from ossquant.bench.environment import created, environment
from ossquant.bench.facts import Facts
from ossquant.bench.load import Ask, Session, run_load
from ossquant.bench.prompts import NONCE_TOKENS, Message, Prompt, make_prompts, read_dataset
from ossquant.bench.reading import Raw
from ossquant.bench.result import Result, Scenario, Target
from ossquant.bench.rig import Rig, find_rig, served_plan
from ossquant.bench.scenario import make_scenario
from ossquant.bench.server import Server, Wanted, probe
from ossquant.bench.shape import Shape
from ossquant.bench.trace import Trace, now
from ossquant.bench.watch import ClientWatch

WARM_UP_TOKENS = 16
TELL_SECONDS = 0.25
TOKENS_PER_WORD = 1.4  # of the corpus in gpt-oss's tokenizer, taken where nobody counts prompts

# scenario, requests done, of how many, in flight, failed, pieces received
OnProgress = Callable[[str, int, int, int, int, int], None]


def measure_endpoint(
    endpoint: Endpoint, asked: Asked, *, announce: Callable[[str], None], on_progress: OnProgress
) -> Measured:
    """Measure a server. Ctrl-C keeps what was measured. Raises EndpointError, UsageError."""
    return asyncio.run(_measure(endpoint, asked, announce, on_progress))


async def _measure(
    endpoint: Endpoint, asked: Asked, announce: Callable[[str], None], on_progress: OnProgress
) -> Measured:
    wanted = Wanted(asked.model, asked.output_tokens, asked.reasoning_effort, asked.seed, asked.ignore_eos)
    dataset = _dataset(asked)
    async with Client(endpoint, asked.timeout) as client:
        server = await probe(client, wanted)
        for note in server.notes:
            announce(f"{server.engine}: {note}")
        rig = find_rig(asked.gpu, asked.usd_per_hour, served_plan(server.model, server.engine, asked.format),
                       absent=_absent(endpoint), layered=False)  # fmt: skip
        run = _Run(client, server, wanted, asked, rig, dataset, on_progress)
        scenarios = [scenario async for scenario in run.scenarios()]
    result = Result(
        created=run.created,
        ossquant=version("ossquant"),
        partial=run.interrupted,
        target=Target("endpoint", endpoint.base, server.model, server.engine),
        environment=environment() | {"server": dict(server.details)},
        settings=run.settings(),
        scenarios=tuple(scenarios),
    )
    return Measured(result, run.traces)


def _absent(endpoint: Endpoint) -> str | None:
    return None if endpoint.is_local else "the server is on another machine"


def _dataset(asked: Asked) -> list[Prompt] | None:
    if asked.dataset is None:
        return None
    return read_dataset(asked.dataset, multi_turn=any(shape.turns > 1 for shape in asked.shapes))


class _Run:
    """One run over all scenarios."""

    def __init__(
        self, client: Client, server: Server, wanted: Wanted, asked: Asked, rig: Rig, dataset: list[Prompt] | None,
        on_progress: OnProgress,
    ) -> None:  # fmt: skip
        self.client, self.server, self.wanted, self.asked, self.rig = client, server, wanted, asked, rig
        self.dataset, self.on_progress = dataset, on_progress
        self.created = created()
        self.nonce = secrets.token_hex(4)  # of this run: no earlier one may have left its prompts in a cache
        self.sent = 0
        self.interrupted = False
        self.traces: dict[str, list[Trace]] = {}

    async def scenarios(self) -> Any:
        """Yield a scenario a shape, until Ctrl-C."""
        for shape in self.asked.shapes:
            if self.interrupted:
                return
            if (scenario := await self._scenario(shape)) is not None:
                yield scenario

    async def _scenario(self, shape: Shape) -> Scenario | None:
        if not await self._warm_up(shape):
            return None
        session = self._session(shape, self.asked.dialogues(shape), self._ask(self.wanted))
        prompts = self._prompts(session.dialogues, shape)
        watch = DeviceWatch(self.client.endpoint.port, _absent(self.client.endpoint))
        with watch, _no_garbage():
            async with ClientWatch() as client:
                await self._put(session, prompts, shape, shape.name)
        self.interrupted = not session.complete and not session.given_up
        traces = [raw.trace() for raw in session.answers]
        if not traces and self.interrupted:
            return None
        self.traces[shape.name] = traces
        facts = Facts(
            shape=shape.to_json(),
            seconds=_wall(traces),
            partial=self.interrupted,
            given_up=session.given_up,
            output_tokens=self.asked.output_tokens,
            preamble=self.server.preamble,
            slo=self.asked.slo,
            tokenizer=self.asked.tokenizer,
            client=client.result(),
            drawn=watch.result(),
            usd_per_hour=self.rig.usd_per_hour,
            roof_tokens_per_second=self.rig.roof_tokens_per_second if shape.kind == "single" else None,
            splits=self.server.splits,
            why=self.rig.why if shape.kind == "single" else _without_roof(self.rig.why),
        )
        return make_scenario(shape.name, traces, facts)

    async def _warm_up(self, shape: Shape) -> bool:
        """Open the connections and wake the server's kernels; False if Ctrl-C came."""
        number = self.asked.warm_up * shape.concurrency
        if not number:
            return True
        short = replace(self.wanted, output_tokens=min(WARM_UP_TOKENS, self.wanted.output_tokens))
        session = self._session(shape, number, self._ask(short))
        streams = Shape("closed", concurrency=shape.concurrency)
        await self._put(session, self._prompts(number, shape), streams, f"{shape.name}, warming up")
        self.interrupted = not session.complete and not session.given_up
        return not self.interrupted

    def _session(self, shape: Shape, dialogues: int, ask: Ask) -> Session:
        return Session(ask, lambda *counts: None, dialogues, shape.turns)

    async def _put(self, session: Session, prompts: Sequence[Prompt], shape: Shape, name: str) -> None:
        def on_load(done: int, total: int, in_flight: int, failed: int) -> None:
            self.on_progress(name, done, total, in_flight, failed, self.client.pieces)

        session.on_load = on_load
        session.deadline = now() + self.asked.seconds
        telling = asyncio.create_task(_tell(session))
        try:
            await run_load(session, prompts, shape, self.asked.seed)
        finally:
            telling.cancel()
            session.tell()

    def _ask(self, wanted: Wanted) -> Ask:
        async def ask(messages: Sequence[Message], index: int, intended: float | None, turn: int) -> Raw:
            raw = await self.client.ask(self.server.body(messages, wanted), index, intended, turn)
            return replace(raw, blank=replace(raw.blank, messages=tuple(messages)))

        return ask

    def _prompts(self, number: int, shape: Shape) -> list[Prompt]:
        if self.dataset:
            plain = [self.dataset[(self.sent + index) % len(self.dataset)] for index in range(number)]
        else:
            seed = self.asked.seed + self.sent
            plain = make_prompts(self.asked.source, number, words=self.words(), turns=shape.turns, seed=seed)
        self.sent += number
        return [prompt.with_nonce(f"{self.nonce}{index:05x}") for index, prompt in enumerate(plain, self.sent)]

    def words(self) -> int:
        """How many words of the corpus make a prompt of so many tokens."""
        per_word = self.server.tokens_per_word or TOKENS_PER_WORD
        return max(4, round((self.asked.prompt_tokens - (self.server.preamble or 0) - NONCE_TOKENS) / per_word))

    def settings(self) -> dict[str, Any]:
        """What was asked for, and what the server made of it."""
        asked, server = self.asked, self.server
        return {
            "seed": asked.seed,
            "nonce": self.nonce,
            "prompts": str(asked.dataset) if asked.dataset else asked.source,
            "prompt_tokens": None if asked.dataset else asked.prompt_tokens,
            "output_tokens": asked.output_tokens,
            "reasoning_effort": asked.reasoning_effort,
            "requests": asked.requests,
            "warm_up": asked.warm_up,
            "slo": dict(asked.slo),
            "accepted": list(server.accepted),
            "adapted": list(server.notes),
            "connections": "one a request" if self.client.fresh else "kept",
            "common_tokens": server.preamble,
            "rig": dict(self.rig.described),
        }


def _wall(traces: Sequence[Trace]) -> float:
    """Seconds from the first intended send to the last end."""
    return max(trace.ended for trace in traces) - min(trace.intended for trace in traces) if traces else 0.0


def _without_roof(why: Any) -> dict[str, str]:
    return {name: reason for name, reason in why.items() if name != "roofline_share"}


async def _tell(session: Session) -> None:
    while True:
        session.tell()
        await asyncio.sleep(TELL_SECONDS)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect no garbage while times are taken: a full collection stops every stream for milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
