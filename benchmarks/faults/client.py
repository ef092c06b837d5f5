"""The client of benchmarks/faults: robot_client as it is, in a process of its own that tells what it sees and does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import psutil

from protos import episode_pb2
from robot_client.answer import Answer
from robot_client.arm import ArmState, Task
from robot_client.camera import Camera, Frame, FrameSource
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.errors import CameraError
from robot_client.hardware import Hardware
from robot_client.observer import Observer
from robot_client.profile import Profile
from robot_client.real_arm import RealArm
from robot_client.rollout import EpisodeResult, Rollout

END_S = 60.0

Kind = Literal["move", "hold", "tick", "answer", "over", "frame", "lost"]
"""move, hold: the arm has been told so.  tick: the same, as it is recorded.  frame, lost: of the camera."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that the client saw or did."""

    kind: Kind
    at_s: float
    """On time.monotonic(), which all processes share."""
    wall_s: float
    """What the wall clock says to the client."""
    reason: str = ""
    source: int = 0
    index: int = 0
    """Of a tick's action in its chunk."""
    stamp_s: float = 0.0
    """Capture time of a frame, or of the observation that is answered."""
    reach: float = 0.0
    """How far an answer would move the arm along x, y or z, in the policy's units."""
    alike: int = 0
    """How many frames in a row have been the same."""

    @property
    def is_led(self) -> bool:
        """A tick at which the arm followed the policy."""
        return self.kind == "tick" and self.source == episode_pb2.SOURCE_POLICY


class ClientProcess:
    """Runs an episode without end at each next_episode(); all its events are in `events`."""

    def __init__(
        self,
        make: Callable[..., Hardware],
        profile: Profile,
        source: Callable[[], FrameSource],
        server: str,
        environment: Mapping[str, str],
    ):
        self.events: list[Event] = []
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_drive, args=(theirs, make, profile, source, server), name="client")
        with _environment(environment):
            self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, name="events", daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def servo_pid(self) -> int:
        """Of the servo, which is the client's child."""
        (servo,) = [child for child in psutil.Process(self.pid).children() if "spawn_main" in str(child.cmdline())]
        return servo.pid

    def next_episode(self) -> None:
        self._link.send(("next_episode",))

    def recover(self) -> None:
        """A person clears the arm's fault."""
        self._link.send(("recover",))

    def shift_stamps(self, seconds: float) -> None:
        """The camera's capture times, from now on."""
        self._link.send(("shift_stamps", seconds))

    def since(self, at_s: float, *kinds: Kind) -> list[Event]:
        return [event for event in list(self.events) if event.at_s >= at_s and event.kind in kinds]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGINT)
        self._process.join(END_S)
        self._process.kill()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.events.append(self._link.recv())


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """For the children that are started meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# In the process.


class Teller:
    """Sends events, from any thread."""

    def __init__(self, link: Connection):
        self._link = link
        self._lock = threading.Lock()

    def __call__(self, kind: Kind, **what: Any) -> None:
        event = Event(kind=kind, at_s=time.monotonic(), wall_s=time.time(), **what)
        with self._lock, contextlib.suppress(OSError):
            self._link.send(event)


def _drive(
    link: Connection, make: Callable[..., Hardware], profile: Profile, source: Callable[[], FrameSource], server: str
) -> None:
    """The process, until it is interrupted."""
    tell, words = Teller(link), queue.SimpleQueue[None]()
    told_source = ToldSource(source(), tell)

    def obey() -> None:
        orders = {
            "next_episode": lambda: words.put(None),
            "recover": arm.recover,
            "shift_stamps": told_source.shift,
        }
        with contextlib.suppress(EOFError, OSError):
            while True:
                order, *arguments = link.recv()
                orders[order](*arguments)

    def rollouts() -> Iterator[Rollout]:
        while True:
            words.get()
            yield Rollout(task=Task(name="circle", instruction="circle"))

    with contextlib.suppress(KeyboardInterrupt), PolicyClient(server, stream=True) as client:
        arm = ToldArm(make, profile, {"agentview": Camera("agentview", told_source)})
        arm.tell = tell
        threading.Thread(target=obey, daemon=True).start()
        watch = ToldEpisode(tell)
        with contextlib.closing(arm):
            arm.recover()  # as the person does who sets the arm up: a gripper that is not active yet moves its fingers
            for _ in run(arm, rollouts(), client, EpisodeConfig(ahead_ticks=None), observers=lambda _: [watch]):
                pass


class ToldArm(RealArm):
    tell: Teller

    def apply(self, action_A: np.ndarray) -> np.ndarray | None:
        sent_A = super().apply(action_A)
        self.tell("move")
        return sent_A

    def hold(self) -> np.ndarray:
        try:
            return super().hold()
        finally:
            self.tell("hold")


class ToldEpisode(Observer):
    def __init__(self, tell: Teller):
        self._tell = tell

    def on_answer(self, answer: Answer) -> None:
        self._tell("answer", stamp_s=answer.capture_time_ns / 1e9, reach=float(np.abs(answer.actions_KA[:, :3]).max()))

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._tell("tick", reason=tick.reason, source=tick.source, index=tick.index)

    def on_end(self, result: EpisodeResult) -> None:
        self._tell("over", reason=result.message)


class ToldSource:
    """A source whose stamps can be shifted."""

    def __init__(self, source: FrameSource, tell: Teller):
        self.fps = source.fps
        self._source, self._tell = source, tell
        self._image, self._alike, self._shift_ns = np.empty(0), 0, 0

    def shift(self, seconds: float) -> None:
        self._shift_ns = round(1e9 * seconds)

    def open(self) -> None:
        self._source.open()
        self.fps = self._source.fps

    def close(self) -> None:
        self._source.close()

    def read(self, timeout_s: float) -> Frame:
        try:
            frame = self._source.read(timeout_s)
        except CameraError as error:
            self._tell("lost", reason=str(error))
            raise
        self._alike = self._alike + 1 if np.array_equal(self._image, frame.image) else 1
        self._image = frame.image
        shifted = replace(frame, capture_time_ns=frame.capture_time_ns + self._shift_ns)
        self._tell("frame", stamp_s=shifted.capture_time_ns / 1e9, alike=self._alike)
        return shifted
