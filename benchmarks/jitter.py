"""The client's rhythm beside a busy server on two cores, against the same work paced by sleeping.

    python -m benchmarks.jitter [--seconds 600] [--arm-rates-hz 50 100] [--others 4]

A RealArm follows nano at 20 Hz over gRPC, its servo in a process of its own at the arm's rate.  Beside it, in processes
of their own: the same arm and the same tick, then time.sleep(1 / 20); the same servo's step, then time.sleep(1 / rate);
the server, and others that ask it without pause.  All begin and end together, and on the same two cores.

The robot is one that is at once where it is told to be, and its camera shows noise: the simulated UR controller of the
tests would compute for a twelfth of a core, for each of two arms.  A vendor's SDK and its threads are not in here.

Jitter: by how much two successive ticks are farther apart, or nearer, than the period.  Missed: how many more periods
passed than ticks began.  Prints a table, writes benchmarks/results/jitter.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro

from benchmarks.serving import BenchmarkConfig, Server, cpu_s, server
from robot_client.arm import ArmState, Task
from robot_client.arms.kinematic import KinematicArm
from robot_client.camera import Camera
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep, run_real_time
from robot_client.episode import Episode, EpisodeConfig
from robot_client.hardware import Reading
from robot_client.pose import Pose
from robot_client.profile import Box, Home, Profile
from robot_client.real_arm import RealArm
from robot_client.rollout import EpisodeResult, Rollout
from robot_client.servo import MotionLimits, Servo
from tests.client.fake_camera import FakeSource
from tests.client.fake_hardware import JOINTS, FakeHardware

RESULT = Path(__file__).parent / "results" / "jitter.json"
RATE_HZ = 20.0
ROLLOUT = Rollout(task=Task(name="bowl", instruction="pick up the bowl"))
OTHERS_ROLLOUT = replace(ROLLOUT, task=replace(ROLLOUT.task, max_ticks=40))
FOLLOW = EpisodeConfig(ahead_ticks=None)
VGA = (480, 640, 3)


@dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Measure the rhythm of the client's loop and of its servo."""

    seconds: float = 600.0
    """For each of the arm's rates."""
    arm_rates_hz: tuple[float, ...] = (50.0, 100.0)
    """Of the servo."""
    others: int = 4
    """Lockstep clients that keep the server busy, each a process."""
    cores: int = 2
    """Everything runs on the first so many."""


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How evenly a loop went."""

    rate_hz: float
    jitter_p50_ms: float
    jitter_p99_ms: float
    jitter_max_ms: float
    missed: int
    ticks: int

    @classmethod
    def of(cls, began_s: Sequence[float], rate_hz: float) -> Rhythm:
        """began_s: when each tick began."""
        passed_s, intervals_s = began_s[-1] - began_s[0], np.diff(began_s)
        p50_ms, p99_ms, max_ms = np.percentile(1e3 * np.abs(intervals_s - 1 / rate_hz), [50, 99, 100])
        return cls(
            rate_hz=len(intervals_s) / passed_s,
            jitter_p50_ms=p50_ms,
            jitter_p99_ms=p99_ms,
            jitter_max_ms=max_ms,
            missed=max(0, round(passed_s * rate_hz) - len(intervals_s)),
            ticks=len(began_s),
        )


class TimedArm(RealArm):
    """Remembers when each tick began, for its state is what a tick asks first; ends the episode at until_s."""

    def __init__(self, *arguments, **options):
        self.began_s: list[float] = []
        self.until_s = math.inf
        super().__init__(*arguments, **options)

    def state(self) -> ArmState:
        self.began_s.append(time.monotonic())
        state = super().state()
        return replace(state, outcome="failure") if self.began_s[-1] > self.until_s else state


class TimedHardware(FakeHardware):
    """Remembers when each step of the servo began, and leaves it in a file; it remembers nothing else."""

    def __init__(self, *, rate_hz: float, times: str = ""):
        super().__init__(rate_hz=rate_hz)
        self.began_s: list[float] = []
        self._times = times

    def read(self) -> Reading:
        self.began_s.append(time.monotonic())
        return super().read()

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        self.pose = pose

    def close(self) -> None:
        if self._times:
            np.save(self._times, self.began_s)


def main(config: JitterConfig) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.cores])  # inherited by all that is started
    with server(BenchmarkConfig(), max_batch=16) as policy, contextlib.ExitStack() as stack:
        others = [stack.enter_context(beside(ask_without_pause, policy.address)) for _ in range(config.others)]
        rows = []
        for rate_hz in config.arm_rates_hz:
            rows.append(measure(policy, others, rate_hz, config.seconds))
            print_row(rows[-1])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"config": asdict(config), "rows": rows}, indent=1) + "\n")


@contextlib.contextmanager
def beside(loop: Callable, *arguments: object) -> Iterator[Connection]:
    """A process that runs loop(connection, *arguments): it says when it is ready, and ends when the link is closed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=loop, args=(there, *arguments))  # not a daemon: an arm's servo is its child
    process.start()
    there.close()
    try:
        here.recv()
        yield here
    finally:
        here.close()
        process.join()


def measure(policy: Server, others: Sequence[Connection], rate_hz: float, seconds: float) -> dict:
    """All four loops at one of the arm's rates."""
    with (
        TemporaryDirectory() as folder,
        beside(sleepy_loop, policy.address, rate_hz) as sleepy_client,
        beside(sleepy_servo, rate_hz) as sleepy_arm,
    ):
        times = Path(folder) / "times.npy"
        with contextlib.closing(arm_of(rate_hz, times)) as arm, PolicyClient(policy.address, stream=True) as client:
            decisions(others)  # begins a new count
            server_before_s, began_s = cpu_s(policy.pid), time.monotonic()
            arm.until_s = began_s + seconds
            for loop in (sleepy_client, sleepy_arm):
                loop.send(arm.until_s)
            (result,) = run_real_time(arm, [ROLLOUT], client, FOLLOW)
            require_whole(result)
            passed_s, server_s = time.monotonic() - began_s, cpu_s(policy.pid) - server_before_s
            row = {
                "arm_rate_hz": rate_hz,
                "server_cores": server_s / passed_s,
                "others_decisions_per_s": decisions(others) / passed_s,
                "answer_p50_ms": 1e3 * float(np.median(result.answer_s)),
                "held": result.holds,
                "loop_says": str(result.cadence),
                "servo_says": str(arm.cadence()),
            }
        steps_s = np.load(times)
        rhythms = {
            "loop": Rhythm.of(arm.began_s, RATE_HZ),
            "loop, sleeping": Rhythm.of(sleepy_client.recv(), RATE_HZ),
            "servo": Rhythm.of(steps_s[(steps_s > arm.began_s[0]) & (steps_s < arm.began_s[-1])], rate_hz),
            "servo, sleeping": Rhythm.of(sleepy_arm.recv(), rate_hz),
        }
    return row | {"rhythms": {name: asdict(rhythm) for name, rhythm in rhythms.items()}}


def arm_of(rate_hz: float, times: Path | None = None) -> TimedArm:
    """An arm with a camera, at home; its servo leaves the times of its steps in a file when the arm is closed."""
    profile = Profile(
        arm="timed",
        hardware={"rate_hz": rate_hz, "times": str(times or "")},
        home=Home(joints_rad=tuple(JOINTS)),
        workspace=Box(low_m=(0.3, -0.2, 0.1), high_m=(0.7, 0.2, 0.5)),
        tick_rate_hz=RATE_HZ,
    )
    source = FakeSource(fps=30.0)
    source.image = np.zeros(VGA, np.uint8)
    return TimedArm(TimedHardware, profile, {"agentview": Camera("agentview", source)})


def sleepy_loop(link: Connection, address: str, rate_hz: float) -> None:
    """What the client does in a tick, and then a sleep."""
    with contextlib.closing(arm_of(rate_hz)) as arm, PolicyClient(address, stream=True) as client:
        episode = Episode(arm, ROLLOUT, client, client.spec(), FOLLOW)
        episode.start()
        link.send("ready")
        arm.until_s = link.recv()
        while not episode.over:
            episode.tick()
            time.sleep(1 / RATE_HZ)
        require_whole(episode.end())
        link.send(arm.began_s)


def require_whole(result: EpisodeResult) -> None:
    """What was cut short is no measurement."""
    if result.outcome == "error":
        raise SystemExit(f"the episode was cut short: {result.message}")


def sleepy_servo(link: Connection, rate_hz: float) -> None:
    """What the servo does in a period, goals at the client's rate included, and then a sleep."""
    hardware = TimedHardware(rate_hz=rate_hz)
    servo = Servo(hardware, MotionLimits(), tick_s=1 / RATE_HZ)
    link.send("ready")
    until_s = link.recv()
    hardware.began_s.clear()
    for period in itertools.count():
        if time.monotonic() > until_s:
            break
        if period % round(rate_hz / RATE_HZ) == 0:
            servo.go(np.array([1e-4, 0, 0, 0, 0, 0]), 1.0, time.monotonic() + 1)
        servo.step()
        time.sleep(1 / rate_hz)
    link.send(hardware.began_s)


def ask_without_pause(link: Connection, address: str) -> None:
    """A simulated arm that never waits for anything but its answer; tells how many it got whenever it is asked."""
    answered = 0
    link.send("ready")
    with contextlib.suppress(EOFError), PolicyClient(address) as client:
        for result in run_lockstep([KinematicArm(lockstep=True)], itertools.repeat(OTHERS_ROLLOUT), client):
            answered += result.decisions
            if link.poll():
                link.recv()
                link.send(answered)
                answered = 0


def decisions(others: Sequence[Connection]) -> int:
    """How many the others got since the last call."""
    for link in others:
        link.send("how many?")
    return sum(link.recv() for link in others)


def print_row(row: dict) -> None:
    print(
        f"arm at {row['arm_rate_hz']:g} Hz; server: {row['server_cores']:.2f} of a core, "
        f"{row['others_decisions_per_s']:.1f} answers a second to the others, the arm's own in "
        f"{row['answer_p50_ms']:.0f} ms (median); {row['held']} ticks held"
    )
    print(f"  {'':<16}{'Hz':>8}{'jitter p50 ms':>15}{'p99':>8}{'worst':>8}{'missed':>8}{'of':>8}")
    for name, rhythm in row["rhythms"].items():
        print(
            f"  {name:<16}{rhythm['rate_hz']:>8.2f}{rhythm['jitter_p50_ms']:>15.2f}{rhythm['jitter_p99_ms']:>8.2f}"
            f"{rhythm['jitter_max_ms']:>8.1f}{rhythm['missed']:>8}{rhythm['ticks']:>8}"
        )
    print(f"  the loop's own report: {row['loop_says']}\n  the servo's: {row['servo_says']}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(JitterConfig, description=__doc__))
