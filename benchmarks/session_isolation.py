"""What sessions do to a robot that is in none: its tokens, and how long it waits for them.

    python -m benchmarks.session_isolation [--minutes 10] [--json FILE]

One server with --deterministic, four simulated arms at 20 Hz, and a plain robot that asks five times a second, sampled,
about frames of LIBERO, with the same seeds in every part:

    alone      the arms play with the base
    sessions   two arms practise in a session each; one session's trainer is killed three times and resumed, the other's
               makes adapters of random numbers, which go on trial
    alone      once more

Half of its episodes alone each time, all of them with sessions.  Its tokens and log-probabilities must be the same, bit
for bit, and its 99th percentile with sessions within 1.2 of that alone.  The trainers yield to the others: a lab's
would have a machine, or a device, of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.session_kills import Trainer
from benchmarks.sessions import SUITE, TASKS, Start, lab, spoil
from protos import episode_pb2
from rl_trainer.run_state import load_state
from rl_trainer.session import STATE, SessionRun
from rl_trainer.session_client import SessionClient
from rl_trainer.session_config import At, GateConfig, SessionConfig
from robot_client.arm import ArmState, Observation
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.observer import Observer
from robot_client.rollout import Rollout
from sim.libero_arm import TICK_RATE_HZ, SimulatedTask, arm_spec, build_arm
from sim.suites import find_suite

SESSIONS = ("healthy", "random")
ARMS_EACH = 2
"""In each of the sessions; as many play beside the plain robot alone."""
FRAMES = 20
ASKED_HZ = 5.0
BEYOND = 1.2
SERVE = ("--deterministic", "--max-batch", "8")
"""Every pass is padded to so many."""
KILLS = 3
YIELD = 15
"""Niceness of the trainers."""
TEMPERATURE = 0.5
Asked = tuple[list[str], list[float]]
"""A hash of each answer's tokens and log-probabilities, and the seconds that it took."""
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class IsolationConfig:
    """Measure a plain robot beside two sessions, and without them."""

    minutes: float = 10.0
    """with sessions, and without"""
    seed: int = 0
    """of the moments of the kills"""
    json: Path = Path(__file__).parent / "results" / "session_isolation.json"


class Pace(Observer):
    """Keeps an arm in lockstep from going faster than a real one."""

    def __init__(self) -> None:
        self._next_s = time.monotonic()

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._next_s = max(self._next_s + 1 / TICK_RATE_HZ, time.monotonic() - 1)
        time.sleep(max(0.0, self._next_s - time.monotonic()))


def play(address: str, session: str, number: int) -> None:
    """An arm that plays episode after episode, in a session or with the base; a process of its own."""
    task = find_suite(SUITE).tasks[TASKS[number % len(TASKS)]]
    states = itertools.cycle(find_suite(SUITE).states("train"))
    rollouts = (
        Rollout(
            task=SimulatedTask(
                name=task.id, instruction=task.instruction, initial_state=state, max_ticks=task.max_ticks, coarse=True
            ),
            purpose="train",
            temperature=TEMPERATURE,
            session_id=session,
        )
        for state in states
    )
    with PolicyClient(address) as client:
        [image] = client.spec().message.images
        arm = build_arm(task_id=task.id, camera=image.name, size_px=image.height)
        for _ in run_lockstep([arm], rollouts, client, observers=lambda _: [Pace()]):
            pass


def train_random(config: SessionConfig) -> None:
    """The trainer that goes wrong; a process of its own."""
    os.nice(YIELD)
    with closing(SessionRun(config)) as run:
        spoil(run, "random")
        run.go()


@contextlib.contextmanager
def arms(address: str, sessions: tuple[str, ...]) -> Iterator[None]:
    """The arms of a part."""
    names = [name for name in sessions for _ in range(ARMS_EACH)]
    players = [CONTEXT.Process(target=play, args=(address, name, n), daemon=True) for n, name in enumerate(names)]
    for player in players:
        player.start()
    try:
        yield
        assert all(player.is_alive() for player in players), "an arm ended"
    finally:
        for player in players:
            player.kill()
            player.join()


class Plain:
    """The robot that is in no session."""

    def __init__(self, address: str):
        self._client = PolicyClient(address, stream=True)
        [image] = self._client.spec().message.images
        task = find_suite(SUITE).tasks[TASKS[0]]
        arm = build_arm(task_id=task.id, camera=image.name, size_px=image.height)
        self._arm = arm_spec(task, (image.name,))
        self._seen: list[Observation] = []
        for state in find_suite(SUITE).states("train")[:FRAMES]:
            goal = SimulatedTask(name=task.id, instruction=task.instruction, initial_state=state, max_ticks=1)
            arm.reset(goal)
            self._seen.append(self._client.spec().read_of(arm.observe(), self._arm))
        self._goal = goal

    def ask(self, episodes: range) -> Asked:
        """These episodes, by their seeds, in rhythm."""
        answers, took_s, begin_s = list[str](), list[float](), time.monotonic()
        for seed in episodes:
            rollout = Rollout(task=self._goal, temperature=1.0, seed=seed, version=0)
            episode_id = self._client.start_episode(rollout, self._arm).episode_id
            for decision, seen in enumerate(self._seen):
                time.sleep(max(0.0, begin_s + len(answers) / ASKED_HZ - time.monotonic()))
                asked_s = time.perf_counter()
                answer = self._client.act(episode_id, decision, replace(seen, capture_time_ns=time.monotonic_ns()))
                took_s.append(time.perf_counter() - asked_s)
                said = answer.token_ids_N.tobytes() + answer.token_logprobs_N.tobytes()
                answers.append(hashlib.sha256(said).hexdigest())
            self._client.end_episode(episode_id, "failure")
        return answers, took_s


def main(config: IsolationConfig) -> int:
    """0 where the laws hold."""
    with tempfile.TemporaryDirectory() as name, lab(Start(model="nano"), "", serve=SERVE) as here:
        folder, at = Path(name), here.at
        with closing(SessionClient(at.run_server)) as client:
            plain, half = Plain(at.server), round(30 * config.minutes * ASKED_HZ / FRAMES)
            with arms(at.server, ("", "")):
                before = plain.ask(range(half))
            with trainers(config, at, folder), arms(at.server, SESSIONS):
                during = plain.ask(range(2 * half))
                sessions = {name: client.get(name, with_episodes=True) for name in SESSIONS}
            with arms(at.server, ("", "")):
                after = plain.ask(range(half, 2 * half))
    figures = compared(before, during, after) | {
        "minutes": config.minutes,
        "sessions": {
            name: {"episodes": len(one.episodes), **Counter(event.what for event in one.log)}
            for name, one in sessions.items()
        },
    }
    config.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return int(not (figures["same"] and figures["p99_ratio"] <= BEYOND))


def compared(before: Asked, during: Asked, after: Asked) -> dict[str, Any]:
    """Answers with the same seed and frame, and their times in ms."""
    alone, alone_s, with_s = [*before[0], *after[0]], [*before[1], *after[1]], during[1]
    times = {
        name: {f"p{q}": round(1e3 * float(np.percentile(took_s, q)), 2) for q in (50, 90, 99)} | {"n": len(took_s)}
        for name, took_s in (("alone_ms", alone_s), ("with_sessions_ms", with_s))
    }
    return {
        "same": alone == during[0],
        **times,
        "p99_ratio": round(times["with_sessions_ms"]["p99"] / times["alone_ms"]["p99"], 3),
    }


@contextlib.contextmanager
def trainers(config: IsolationConfig, at: At, folder: Path) -> Iterator[None]:
    """Of both sessions, once both are there; the first is killed and resumed at random moments."""
    rng = random.Random(config.seed)
    moments = sorted(rng.uniform(0.1, 0.9) * 60 * config.minutes for _ in range(KILLS))
    often = SessionConfig(out=folder / "random", at=at, update_every=8, offer_every=1, gate=GateConfig(envelope=0.9))
    spoilt = CONTEXT.Process(target=train_random, args=(often,), daemon=True)
    killer = CONTEXT.Process(target=train_and_kill, args=(at, folder / "healthy", moments))
    spoilt.start()
    killer.start()
    try:
        for name in SESSIONS:
            while not (folder / name / STATE).exists():
                time.sleep(0.1)
        yield
        fields, _ = load_state(folder / "healthy" / STATE)
        print(f"the healthy session's trainer made {fields['counts'].get('updates', 0)} updates", flush=True)
    finally:
        killer.terminate()
        spoilt.kill()
        killer.join()
        spoilt.join()


def train_and_kill(at: At, out: Path, moments: list[float]) -> None:
    """A trainer that is killed at these seconds, and resumed; ends with this process."""
    trainer, began_s = Trainer(at, out, "--update-every", "8", "--offer-every", "1", niceness=YIELD), time.monotonic()
    for moment_s in moments:
        time.sleep(max(0.0, began_s + moment_s - time.monotonic()))
        trainer.kill()
    trainer.process.wait()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(IsolationConfig, description=__doc__)))
