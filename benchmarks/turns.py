"""Contenders that take turns on one machine, each in a process of its own, as its users run it."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

REST = 0.05
"""Seconds between turns, in which the threads of the last contender come to rest."""


@dataclass(frozen=True)
class Turn:
    """What one turn took, in seconds of wall and of processor, and what it returned."""

    wall: float
    cpu: float
    out: Any


@dataclass
class Contender:
    """What `make(*arguments)` returns in a fresh process, to be called there in turns."""

    make: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...]

    def __enter__(self) -> Contender:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.make, self.arguments))
        self.process.start()
        other.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()

    def turn(self) -> Turn:
        """One call; EOFError when the process has died, whose own message stands above."""
        self.pipe.send(None)
        return self.pipe.recv()


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: Any) -> None:
    call = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        out = call()
        pipe.send(Turn(time.perf_counter() - wall, time.process_time() - cpu, out))


def medians(contenders: Mapping[str, Contender], rounds: int, cpu: bool) -> dict[str, float]:
    """Seconds a call, by name, after one call each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in range(-1, rounds):
        for name, contender in contenders.items():
            turn = contender.turn()
            if counted >= 0:
                times[name].append(turn.cpu if cpu else turn.wall)
            time.sleep(REST)
    return {name: statistics.median(spent) for name, spent in times.items()}


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options of a benchmark in turns."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for busy machines")
    parser.add_argument(
        "--same-allocator",
        action="store_true",
        help="let the others keep freed memory in the process too, as cmkit does on a CPU",
    )


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""
