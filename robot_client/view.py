"""Episodes in the Rerun viewer, while they run: in a window, as files, or at a viewer that runs elsewhere.

Each episode is a recording of its own, named by its id; all of them share one layout.  Timelines: `tick`, counted from
the start of the episode, and `time`, the wall clock when the episode told it.

    camera/NAME          what the policy saw at each decision, as JPEG
    action/executed      what was sent to the arm, a series for each number
    action/planned       what the policy had meant for that tick; nothing where it did not act
    state                the arm's state before each tick, a series for each entry
    source, version      who acts (policy, blend, hold, human), and the weights that answer
    latency_ms           of each answer: from the capture of its observation to its arrival, and the server's parts
    arm/path             where the end effector went, in the colour of who moved it
    arm/workspace        the box that it must not leave
    log                  clips and holds with their reasons, the instruction, how the episode ended

Rerun's calls wait where a viewer reads too slowly, and for good where it is gone: they are made in a process of their
own, and the thread that drives the arm only leaves what it knows in a queue.
"""

from __future__ import annotations

import colorsys
import contextlib
import logging
import multiprocessing
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from protos import episode_pb2
from protos.image import encode_jpeg
from robot_client.answer import Answer
from robot_client.arm import ArmSpec, ArmState, Observation
from robot_client.errors import RobotError
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout
from robot_client.safety import POSITION_STATE
from robot_client.spec import PolicySpec

log = logging.getLogger(__name__)

WINDOW = "spawn"
"""The target that opens a viewer on this machine's screen."""
START_S = 60.0
"""How long Rerun may take to be loaded and, for a window, to open it."""
WAITING = 300
"""So many observations, answers and ticks may wait to be shown: ten seconds of an arm at 20 Hz."""
LINGER_S = 20.0
"""At the end, how long what still waits may take to be shown."""
SOURCES = {
    "policy": (76, 175, 80),
    "blend": (38, 166, 154),
    "hold": (255, 167, 38),
    "human": (66, 165, 245),
    "expert": (171, 71, 188),
}
"""Who acts -> colour (RGB)."""
PARTS = ("queue", "prepare", "vision", "prefill", "decode")
"""Of the server's time for an answer, as in its Timing."""


class CannotView(RobotError):
    """There is no viewer to be had, or no place for its files; raised before anything moves."""


class View(Observer):
    """Shows one episode after another.

    target: "spawn", a window on this machine; rerun+http://HOST:PORT/proxy, a viewer that listens there, now or later;
        anything else, a folder that takes a file for each episode, <episode id>.rrd.
    policy and arm: who answers and who moves.

    A viewer that does not keep up, or is gone, loses the rest of the episode, which is logged, and never delays the
    arm.  Raises CannotView.
    """

    def __init__(self, target: str, policy: PolicySpec, arm: ArmSpec):
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_draw, args=(theirs, target, policy, arm), name="view", daemon=True)
        self._process.start()
        theirs.close()
        if trouble := self._trouble_at_start():
            self._process.kill()
            raise CannotView(f"cannot view in {target!r}: {trouble}")
        self._waiting: queue.Queue[tuple[int, str, tuple] | None] = queue.Queue(WAITING)
        self._showing = False
        threading.Thread(target=self._pass_on, name="view", daemon=True).start()

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self._showing = True
        self._show("on_start", rollout, episode_id)

    def on_observation(self, observation: Observation) -> None:
        self._show("on_observation", observation)

    def on_answer(self, answer: Answer) -> None:
        self._show("on_answer", answer)

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._show("on_tick", state, tick)

    def on_final_observation(self, observation: Observation) -> None:
        self._show("on_final_observation", observation)

    def on_end(self, result: EpisodeResult) -> None:
        self._show("on_end", result)
        self._showing = False

    def close(self) -> None:
        """Lets what waits be shown, as long as that may take, and lets go of the viewer; a window stays open."""
        if self._process.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=LINGER_S)
                self._process.join(LINGER_S)
        if self._process.is_alive():
            log.warning("the viewer has not taken everything: the end is not shown")
            self._process.kill()
            self._process.join(LINGER_S)

    def _show(self, name: str, *arguments: Any) -> None:
        if not self._showing:
            return
        try:
            self._waiting.put_nowait((time.time_ns(), name, arguments))
        except queue.Full:
            self._showing = False
            log.warning("the viewer does not keep up: the rest of this episode is not shown")

    def _pass_on(self) -> None:
        """The thread that sends what waits to the process."""
        try:
            while (told := self._waiting.get()) is not None:
                self._link.send(told)
        except OSError:
            log.warning("the viewer's process is gone: nothing more is shown")
        self._link.close()

    def _trouble_at_start(self) -> str:
        try:
            return self._link.recv() if self._link.poll(START_S) else f"it is not ready after {START_S:g} s"
        except EOFError:
            return "its process is gone"


def _draw(link: Connection, target: str, policy: PolicySpec, arm: ArmSpec) -> None:
    """The process: says what keeps it from drawing, if anything, and draws until the link breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the client too, which closes the link in good order
    try:
        drawing = _Drawing(target, policy, arm)
    except ImportError as error:
        link.send(f"a package is not installed: {error}; it comes with: pip install 'vla-rl[view]'")
        return
    except (OSError, RuntimeError, ValueError) as error:
        link.send(str(error))
        return
    link.send("")
    with contextlib.suppress(EOFError, OSError):
        while True:
            told_ns, name, arguments = link.recv()
            drawing.told_ns = told_ns
            getattr(drawing, name)(*arguments)
    drawing.close()


class _Drawing(Observer):
    """Episodes as recordings of Rerun.

    told_ns: when the episode told what comes next, on time.time_ns().
    """

    def __init__(self, target: str, policy: PolicySpec, arm: ArmSpec):
        self.told_ns = 0
        self._rerun: Any = import_module("rerun")  # an extra, and slow to load: only in this process
        self._policy = policy
        self._arm = arm
        self._folder = None if target == WINDOW or "://" in target else Path(target)
        self._url = target if "://" in target else None  # None is where a window listens
        self._position = [arm.state_names.index(name) for name in POSITION_STATE if name in arm.state_names]
        self._recording: Any = None
        self._layout = self._blueprint()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._rerun.GrpcSink(self._url)  # raises for what is no address of a viewer
        if target == WINDOW:  # which outlives us; where one is open already, that one is used
            subprocess.Popen([sys.executable, "-m", "rerun_cli", "--expect-data-soon"], start_new_session=True)

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self.close()
        self._ticks = 0
        self._source = self._version = ""
        self._at_m: np.ndarray | None = None
        self._planned: dict[int, np.ndarray] = {}
        self._name = f"{rollout.task.name} {episode_id}"
        self._recording = self._rerun.RecordingStream(self._application, recording_id=episode_id)
        self._recording.set_log_time_enabled(False)
        self._recording.set_sinks(self._sink(episode_id), default_blueprint=self._layout)
        self._recording.send_recording_name(self._name)
        self._log_legends()
        self._say(rollout.task.instruction)

    def on_observation(self, observation: Observation) -> None:
        for name, pixels_HW3 in self._policy.read_of(observation, self._arm).images.items():
            image = self._rerun.EncodedImage(contents=encode_jpeg(pixels_HW3), media_type="image/jpeg")
            self._log(f"camera/{name}", image)

    def on_answer(self, answer: Answer) -> None:
        self._planned[answer.decision] = answer.actions_KA
        total_ms = 1e3 * answer.arrived_s - 1e-6 * answer.capture_time_ns  # time.monotonic() and monotonic_ns() agree
        parts_ms = [getattr(answer.timing, f"{part}_ms") for part in PARTS]
        self._plot("latency_ms", [total_ms, *parts_ms])
        if str(answer.version) != self._version:
            self._version = str(answer.version)
            self._enter("version", self._version)

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._plot("state", state.state_S)
        self._draw_step_to(state)
        source = episode_pb2.Source.Name(tick.source).removeprefix("SOURCE_").lower()
        if source != self._source:
            self._source = source
            self._enter("source", source)
        self._plot("action/executed", tick.action)
        self._plot("action/planned", self._planned_for(tick))
        if source == "hold":
            self._say(f"hold: {tick.reason}", level="WARN")
        elif tick.reason:
            self._say(f"clip: {tick.reason}")
        self._ticks += 1

    def on_final_observation(self, observation: Observation) -> None:
        self.on_observation(observation)

    def on_end(self, result: EpisodeResult) -> None:
        said = f"{result.outcome}: {result.message}" if result.message else result.outcome
        self._say(said, level="ERROR" if result.outcome == "error" else "INFO")
        self._recording.send_recording_name(f"{self._name}: {result.outcome}")
        self.close()

    def close(self) -> None:
        """Ends the recording under way, if any: its file is complete."""
        if self._recording is not None:
            self._recording.disconnect()
            self._recording = None

    @property
    def _application(self) -> str:
        """What shares a layout in Rerun: the recordings of one arm."""
        return f"vla-rl {self._arm.name}"

    def _sink(self, episode_id: str) -> Any:
        if self._folder is None:
            return self._rerun.GrpcSink(self._url)
        return self._rerun.FileSink(self._folder / f"{episode_id}.rrd")

    def _plot(self, path: str, values: Sequence[float] | np.ndarray) -> None:
        self._log(path, self._rerun.Scalars(values))

    def _enter(self, path: str, state: str) -> None:
        self._log(path, self._rerun.StateChange(state=state))

    def _say(self, text: str, *, level: str = "INFO") -> None:
        self._log("log", self._rerun.TextLog(text, level=level))

    def _draw_step_to(self, state: ArmState) -> None:
        if len(self._position) < len(POSITION_STATE):
            return
        at_m = state.state_S[self._position]
        if self._at_m is not None:
            step = self._rerun.LineStrips3D([[self._at_m, at_m]], colors=[SOURCES[self._source]])
            self._log("arm/path", step)
        self._at_m = at_m

    def _log(self, path: str, what: Any, *, static: bool = False) -> None:
        self._recording.set_time("tick", sequence=self._ticks)
        self._recording.set_time("time", timestamp=np.datetime64(self.told_ns, "ns"))
        self._recording.log(path, what, static=static)

    def _log_legends(self) -> None:
        """What holds throughout an episode: the names of the series, the colours of the sources, the box."""
        rr, actions = self._rerun, self._arm.action_names
        hues = [colorsys.hsv_to_rgb(a / len(actions), 0.6, 1.0) for a in range(len(actions))]
        executed = rr.SeriesLines(names=actions, colors=hues)
        planned = rr.SeriesLines(
            names=[f"{name} planned" for name in actions], colors=hues, widths=[0.5] * len(actions)
        )
        self._log("action/executed", executed, static=True)
        self._log("action/planned", planned, static=True)
        self._log("state", rr.SeriesLines(names=self._arm.state_names), static=True)
        self._log("latency_ms", rr.SeriesLines(names=["capture to answer", *PARTS]), static=True)
        self._log("source", rr.StateConfiguration(values=list(SOURCES), colors=list(SOURCES.values())), static=True)
        if box := self._arm.limits.workspace:
            sizes_m = np.subtract(box.high_m, box.low_m)
            walls = rr.Boxes3D(mins=[box.low_m], sizes=[sizes_m], colors=[(128, 128, 128)], fill_mode="MajorWireframe")
            self._log("arm/workspace", walls, static=True)

    def _planned_for(self, tick: episode_pb2.Tick) -> np.ndarray:
        """(A,), what the newest chunk with a part in that tick had for it; NaN where the policy did not act."""
        if tick.source in (episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_BLEND):
            return self._planned[tick.decision][tick.index]
        return np.full(len(tick.action), np.nan)

    def _blueprint(self) -> Any:
        """The layout: what is seen on the left, what is done on the right."""
        rrb = self._rerun.blueprint
        seen = [rrb.Spatial2DView(origin=f"camera/{name}", name=name) for name in self._policy.image_names]
        so_far = [
            rrb.VisibleTimeRange(
                timeline, start=rrb.TimeRangeBoundary.infinite(), end=rrb.TimeRangeBoundary.cursor_relative()
            )
            for timeline in ("tick", "time")
        ]
        return rrb.Blueprint(
            rrb.Horizontal(
                rrb.Vertical(*seen, rrb.Spatial3DView(origin="arm", name="end effector", time_ranges=so_far)),
                rrb.Vertical(
                    rrb.StateTimelineView(origin="/", contents=["source", "version"], name="who acts"),
                    rrb.TimeSeriesView(origin="action"),
                    rrb.TimeSeriesView(origin="state"),
                    rrb.TimeSeriesView(origin="latency_ms"),
                    rrb.TextLogView(origin="log"),
                    row_shares=[2, 4, 4, 3, 3],
                ),
                column_shares=[2, 3],
            ),
            rrb.TimePanel(timeline="tick", state="collapsed"),
            rrb.SelectionPanel(state="collapsed"),
        )
