"""Load: who asks when. Closed loops wait for their answers, open ones send by the clock."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ossquant.bench.prompts import Message, Prompt
from ossquant.bench.reading import Raw
from ossquant.bench.shape import Shape
from ossquant.bench.trace import now

GIVE_UP = 20  # failures in a row, with none answered in between: the server is gone
RAMP_SECONDS = 0.01  # from one stream's start to the next: all at once would time their common arrival

# messages, index, intended time (None: now), turn → answer
Ask = Callable[[Sequence[Message], int, float | None, int], Awaitable[Raw]]
# requests done, of how many, in flight, failed
OnLoad = Callable[[int, int, int, int], None]


@dataclass
class Session:
    """A load as it runs: answers so far, and whether it came to its end. dialogues have so many turns each."""

    ask: Ask
    on_load: OnLoad
    dialogues: int
    turns: int
    deadline: float = math.inf
    answers: list[Raw] = field(default_factory=list)
    complete: bool = False
    given_up: bool = False
    _in_flight: int = 0
    _failed: int = 0
    _failed_in_a_row: int = 0
    _next: int = 0

    def indices(self) -> Iterator[int]:
        """The dialogues that are still to be held, each once, among all who ask."""
        while self._next < self.dialogues and not self.given_up and now() < self.deadline:
            self._next += 1
            yield self._next - 1

    async def send(self, messages: Sequence[Message], index: int, intended: float | None = None, turn: int = 0) -> Raw:
        """Send one, and count how it went."""
        self._in_flight += 1
        try:
            raw = await self.ask(messages, index, intended, turn)
        finally:
            self._in_flight -= 1
        self.answers.append(raw)
        self._failed += raw.failed
        self._failed_in_a_row = self._failed_in_a_row + 1 if raw.failed else 0
        self.given_up = self.given_up or self._failed_in_a_row >= GIVE_UP
        return raw

    def tell(self) -> None:
        """Say how far it is."""
        self.on_load(len(self.answers), self.dialogues * self.turns, self._in_flight, self._failed)


async def run_load(session: Session, prompts: Sequence[Prompt], shape: Shape, seed: int) -> None:
    """Send the prompts in a shape. Ctrl-C, a cancellation, leaves what was answered in the session."""
    try:
        async with asyncio.TaskGroup() as group:
            if shape.rate is not None:
                group.create_task(_open(session, prompts, arrivals(shape.rate, session.dialogues, seed)))
            else:
                for stream in range(shape.concurrency):
                    group.create_task(_stream(session, prompts, stream))
        session.complete = not session.given_up
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()  # the run goes on to its end, with what it has


def arrivals(rate: float, number: int, seed: int) -> list[float]:
    """Seconds at which requests arrive that know nothing of each other: exponential gaps, the first after one."""
    chance = random.Random(f"arrivals/{seed}")  # noqa: S311  no secret
    times, at = [], 0.0
    for _ in range(number):
        at += chance.expovariate(rate)
        times.append(at)
    return times


async def _stream(session: Session, prompts: Sequence[Prompt], stream: int) -> None:
    """One who waits for each answer before asking again."""
    await asyncio.sleep(stream * RAMP_SECONDS)
    for index in session.indices():
        await _dialogue(session, prompts[index], index)


async def _dialogue(session: Session, prompt: Prompt, index: int) -> None:
    """Ask turn by turn; of the answers only what was final goes back, as harmony wants it."""
    messages = list(prompt.lead)
    for turn, text in enumerate(prompt.turns[: session.turns]):
        messages.append({"role": "user", "content": text})
        raw = await session.send(messages, index, turn=turn)
        if turn + 1 == len(prompt.turns) or turn + 1 == session.turns:
            return
        trace = raw.trace()
        if not trace.ok:
            return
        messages.append({"role": "assistant", "content": trace.text("final") or "…"})


async def _open(session: Session, prompts: Sequence[Prompt], times: Sequence[float]) -> None:
    """Send at the given times, however many are still unanswered."""
    started = now()
    async with asyncio.TaskGroup() as group:
        for index, at in zip(session.indices(), times, strict=False):
            await asyncio.sleep(max(0.0, started + at - now()))
            messages = [*prompts[index].lead, {"role": "user", "content": prompts[index].turns[0]}]
            group.create_task(session.send(messages, index, started + at))
