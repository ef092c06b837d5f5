"""An unmodified openpi-client drives LIBERO through the server's openpi door, beside our own client on the same states.

    python -m benchmarks.openpi_libero [--tasks 0 1 2] [--episodes-per-task 2]

openpi-client is installed into a new environment, with the numpy that it wants, and runs in a process of its own
(benchmarks/openpi_driver.py), which is given observations as openpi's LIBERO example makes them, no more.  The
simulation is here, and so is the client that speaks gRPC; one server answers both, greedily, one after the other.
Every action that is executed must be the same.  Prints a table, writes benchmarks/results/openpi_libero.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.install import environment, run, version_of
from protos import episode_pb2
from protos.openpi_codec import gripper_opening, pack, unpack
from robot_client.arm import ArmState, Outcome
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.observer import Observer
from robot_client.rollout import Rollout
from sim.evaluate import WORKER_ENVIRONMENT, EvaluateConfig, plan
from sim.libero_arm import LiberoArm
from sim.scene import Scene
from sim.suites import find_suite, find_task

RESULT = Path(__file__).parent / "results" / "openpi_libero.json"
DRIVER = Path(__file__).with_name("openpi_driver.py")
CLIENT = ("openpi-client==0.1.2", "typing_extensions")
"""It imports the second one without asking for it."""
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class OpenpiLiberoConfig:
    """Compare openpi-client with ours in LIBERO, action by action."""

    suite: str = "libero_object"
    tasks: tuple[int, ...] = ()
    """Indices of the suite's tasks; none given: all."""
    episodes_per_task: int = 2
    """Of the held-out states, the first so many."""
    model: str = "nano"
    """As for `python -m policy_server serve`."""
    python: str = sys.executable
    """The interpreter that openpi-client's environment is made of; numpy 1 has wheels up to Python 3.12."""


@dataclass(kw_only=True)
class Trace:
    """What one client did in one episode."""

    outcome: Outcome = "error"
    executed: list[list[float]] = field(default_factory=list)
    """As the arm says it did them."""
    round_trip_s: list[float] = field(default_factory=list)


class Robot:
    """openpi-client, in its own process."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.metadata = self._receive()

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        data = pack(observation)
        assert self._process.stdin is not None
        self._process.stdin.write(LENGTH.pack(len(data)) + data)
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        head = self._process.stdout.read(LENGTH.size)
        if not head:
            raise SystemExit(f"openpi-client ended with code {self._process.wait()}; it said why above")
        return unpack(self._process.stdout.read(*LENGTH.unpack(head)))


class Executed(Observer):
    """Keeps the actions of an episode."""

    def __init__(self, trace: Trace):
        self._trace = trace

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._trace.executed.append(list(tick.action))


def main(config: OpenpiLiberoConfig) -> int:
    os.environ.update(WORKER_ENVIRONMENT)
    suite = find_suite(config.suite)
    evaluation = EvaluateConfig(
        suite=config.suite, tasks=config.tasks, protocol="held_out", episodes_per_task=config.episodes_per_task
    )
    pairs: dict[str, tuple[Trace, Trace]] = {}
    with server(config.model) as (address, openpi_address), driver(config.python, openpi_address) as robot:
        print(f"openpi-client 0.1.2 with numpy {robot.metadata['numpy']}; ours with numpy {np.__version__}", flush=True)
        with PolicyClient(address, stream=True) as client:
            spec = client.spec()
            sizes = {image.name: (image.height, image.width) for image in spec.message.images}
            scene = None
            for rollout in plan(evaluation, suite, spec.message.live_version):
                if scene is None or scene.task.id != rollout.task.name:
                    scene = Scene(find_task(rollout.task.name))
                arm = LiberoArm(scene=scene, image_sizes=sizes)
                name = f"{rollout.task.name}:{rollout.task.initial_state}"
                pairs[name] = by_grpc(arm, rollout, client), by_openpi(arm, rollout, robot)
                print(f"{name}: {compared(*pairs[name])}", flush=True)
    return report(pairs, robot.metadata)


def by_grpc(arm: LiberoArm, rollout: Rollout, client: PolicyClient) -> Trace:
    trace = Trace()
    (result,) = run_lockstep([arm], [rollout], client, observers=lambda _: [Executed(trace)])
    trace.outcome, trace.round_trip_s = result.outcome, list(result.answer_s)
    return trace


def by_openpi(arm: LiberoArm, rollout: Rollout, robot: Robot) -> Trace:
    """As openpi's example does: a chunk is executed, then the next one is asked for."""
    trace, task = Trace(outcome="failure"), rollout.task
    arm.reset(task)
    while True:
        seen = arm.observe()
        answer = robot.infer(
            {
                "observation/image": seen.images["agentview"],
                "observation/state": seen.state_S.astype(np.float64),
                "prompt": task.instruction,
            }
        )
        trace.round_trip_s.append(answer["round_trip_s"])
        for action_A in answer["actions"]:
            opening = gripper_opening(action_A[6:])
            trace.executed.append(arm.apply(np.append(action_A[:6], opening)).tolist())
            if outcome := arm.state().outcome:
                trace.outcome = outcome
                return trace
            if len(trace.executed) == task.max_ticks:
                return trace


def compared(ours: Trace, theirs: Trace) -> str:
    if ours.executed == theirs.executed and ours.outcome == theirs.outcome:
        return f"{ours.outcome} by both, {len(ours.executed)} ticks equal"
    pairs = zip(ours.executed, theirs.executed, strict=False)
    first = next((tick for tick, (mine, other) in enumerate(pairs) if mine != other), "end")
    return f"DIFFERS from tick {first} on: {ours.outcome} by gRPC, {theirs.outcome} by openpi"


def report(pairs: dict[str, tuple[Trace, Trace]], metadata: dict[str, Any]) -> int:
    """Prints and keeps the figures; 1 when an episode differs."""
    different = sum("DIFFERS" in compared(*pair) for pair in pairs.values())
    rows = {name: row([pair[side] for pair in pairs.values()]) for side, name in enumerate(("gRPC", "openpi-client"))}
    print("| | success | ticks | decisions | round trip p50, ms | p99, ms |\n|---|---|---|---|---|---|")
    for name, figures in rows.items():
        cells = [f"{figures[key]:.1f}" for key in ("p50_ms", "p99_ms")]
        counts = f"{figures['successes']}/{figures['episodes']} | {figures['ticks']} | {figures['decisions']}"
        print(f"| {name} | {counts} | {' | '.join(cells)} |")
    print(f"{len(pairs) - different} of {len(pairs)} episodes are equal, tick by tick")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    figures = {"numpy": metadata["numpy"], "model": metadata["model"], "episodes": len(pairs), "different": different}
    outcomes = {name: [pair[0].outcome, pair[1].outcome, len(pair[1].executed)] for name, pair in pairs.items()}
    RESULT.write_text(json.dumps({**figures, "clients": rows, "outcomes": outcomes}, indent=1) + "\n")
    return int(different > 0)


def row(traces: list[Trace]) -> dict[str, float]:
    p50_ms, p99_ms = 1e3 * np.percentile([taken_s for trace in traces for taken_s in trace.round_trip_s], [50, 99])
    return {
        "episodes": len(traces),
        "successes": sum(trace.outcome == "success" for trace in traces),
        "ticks": sum(len(trace.executed) for trace in traces),
        "decisions": sum(len(trace.round_trip_s) for trace in traces),
        "p50_ms": round(p50_ms, 2),
        "p99_ms": round(p99_ms, 2),
    }


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, str]]:
    """The addresses of a child's two doors."""
    line = [sys.executable, "-m", "policy_server", "serve", "--model", model, "--port", "0", "--openpi-port", "0"]
    process = subprocess.Popen([*line, "--max-batch", "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split() + process.stdout.readline().split()
        if len(words) != 7:
            raise SystemExit(f"no server: {' '.join(line)} says why")
        yield words[1], words[6]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def openpi_environment(python: str) -> Iterator[Path]:
    """The interpreter of a new environment with openpi-client."""
    with environment(python) as there:
        print(f"installing {' '.join(CLIENT)} on Python {version_of(there)}", flush=True)
        run(sys.executable, "-m", "pip", "--python", str(there), "install", "--quiet", *CLIENT)
        yield there


@contextlib.contextmanager
def driver(python: str, address: str) -> Iterator[Robot]:
    """openpi-client in a new environment, at work."""
    host, _, port = address.partition(":")
    with openpi_environment(python) as there:
        process = subprocess.Popen([there, DRIVER, host, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        try:
            yield Robot(process)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(OpenpiLiberoConfig, description=__doc__)))
