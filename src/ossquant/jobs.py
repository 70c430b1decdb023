"""Pieces of work for a few threads, each accounted for in bytes of the source.

Pieces go whole through one thread: read, code, write. So memory is bounded by threads times a piece, whatever the
model, and the disk and the cores work at once.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

MAX_THREADS = 8  # past this the disk, not the codec, sets the pace

# bytes of the source done so far, of how many
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A piece of work for one thread, and the source bytes it accounts for."""

    nbytes: int
    run: Callable[[], None]


def nothing() -> None:
    """Do the work of a piece that is done."""


def run_jobs(jobs: Iterable[Job], total: int, progress: Progress | None, cores: int = 0) -> None:
    """Run jobs on a few threads, for so many cores or the machine's, never more in flight than twice the threads.

    total is the bytes of all jobs. The first failure ends the run and is raised.
    """
    threads = min(cores or os.cpu_count() or 1, MAX_THREADS) + 1  # one more, so that a core works while another waits
    done = 0
    pending: dict[Future[None], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="job") as pool:
        try:
            for job in jobs:
                if len(pending) >= 2 * threads:
                    done = _collect(pending, done, total, progress)
                pending[pool.submit(job.run)] = job.nbytes
            while pending:
                done = _collect(pending, done, total, progress)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _collect(pending: dict[Future[None], int], done: int, total: int, progress: Progress | None) -> int:
    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        done += pending.pop(future)
        future.result()
    if progress:
        progress(min(done, total), total)
    return done
