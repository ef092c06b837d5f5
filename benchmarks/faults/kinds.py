"""The faults: how each begins and ends, what its stated detection limit is, and what the client has to say."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.faults.client import Event, Kind
from benchmarks.faults.lab import CHUNK, UR, CameraTrouble, Lab, Manners
from tests.client.ur_simulator import PLAYING

TICK_S = 0.05
EXPIRE_TICKS = 2
"""Of the profiles."""
CAMERA_AGE_S, CAMERA_ALIKE = 0.3, 5
"""Limits of Camera: how old the newest frame may be, and how many in a row alike."""
LATELY_S = 1.0
TOO_FAR = 0.9
"""An answer that reaches so far is one of those that are out of range; one that was under way before is not."""

Recovery = Literal["the same episode goes on", "the next episode", "a person's word, then the next episode"]


class NotShown(Exception):
    """What was to be measured has not come about."""


def told_to_hold(lab: Lab, began_s: float, ended_s: float) -> float | None:
    """When the client first told the arm to hold, and not to move for a chunk afterwards; None: never."""
    moves_s = [move.at_s for move in lab.client.since(began_s, "move")]
    for hold in lab.client.since(began_s, "hold"):
        if hold.at_s < ended_s and not any(0 < at_s - hold.at_s < CHUNK * TICK_S for at_s in moves_s):
            return hold.at_s
    return None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind.  Times are on time.monotonic()."""

    name: str
    limit: str
    """The stated detection limit, in words."""
    begin: Callable[[Lab], object]
    end: Callable[[Lab], object]
    limit_s: Callable[[Lab, float], float]
    """When the limit was reached, for a fault that began then."""
    reason: str
    """What the client has to say, as a regular expression."""
    held_s: Callable[[Lab, float, float], float | None] = told_to_hold
    """When the arm was made to hold, for a fault that began and ended then; None: only its motion shows it."""
    arms: tuple[str, ...] = ("ur", "franka")
    """Whose simulator shows it."""
    recovery: Recovery = "the same episode goes on"
    through_network: bool = False


# When a limit is reached.  Each of these may raise NotShown.


def used_up(lab: Lab, began_s: float) -> float:
    """The tick of the last action of the last chunk is over."""
    held_s = told_to_hold(lab, began_s, math.inf)
    if held_s is None:
        raise NotShown("the client has never held")
    led = [tick for tick in lab.client.since(began_s - LATELY_S, "tick") if tick.is_led and tick.at_s < held_s]
    return led[-1].at_s + (CHUNK - led[-1].index) * TICK_S


def tampered(lab: Lab, began_s: float) -> float:
    return lab.policy.behave("well")


def first(kind: Kind, is_it: Callable[[Event], bool], lab: Lab, began_s: float) -> float:
    for event in lab.client.since(began_s, kind):
        if is_it(event):
            return event.at_s
    raise NotShown(f"the limit was not reached: of the client's events, no {kind} is such a one")


def anything(event: Event) -> bool:
    return True


def last_frame_too_old(lab: Lab, began_s: float) -> float:
    lost_s = first("lost", anything, lab, began_s)
    frames = lab.client.since(began_s - LATELY_S, "frame")
    return max(frame.stamp_s for frame in frames if frame.at_s < lost_s) + CAMERA_AGE_S


def last_command_expired(lab: Lab, began_s: float) -> float:
    moves_s = [move.at_s for move in lab.client.since(began_s - LATELY_S, "move")]
    return max(at_s for at_s in moves_s if at_s < began_s + TICK_S) + EXPIRE_TICKS * TICK_S


def watchdog(lab: Lab, began_s: float) -> float:
    return began_s + 1 / lab.hardware["watchdog_hz"]


# When the arm was made to hold by somebody else than the client.


def nobody(lab: Lab, began_s: float, ended_s: float) -> None:
    return None


def program_ended(lab: Lab, began_s: float, ended_s: float) -> float:
    """By the controller."""
    for at_s, state in lab.witness.states(began_s, ended_s):
        if state["runtime"] != PLAYING:
            return at_s
    raise NotShown("the controller's program has not ended")


# How a fault begins and ends.


def behave(manners: Manners, lab: Lab) -> None:
    lab.policy.behave(manners)


def begin(trouble: CameraTrouble, lab: Lab) -> None:
    lab.camera.begin(trouble)


def end(trouble: CameraTrouble, lab: Lab) -> None:
    lab.camera.end(trouble)


def shift_stamps(seconds: float, lab: Lab) -> None:
    lab.client.shift_stamps(seconds)


def signal_client(what: signal.Signals, lab: Lab) -> None:
    os.kill(lab.client.pid, what)


def signal_servo(what: signal.Signals, lab: Lab) -> None:
    os.kill(lab.client.servo_pid, what)


def protective_stop(lab: Lab) -> None:
    assert isinstance(lab.robot, UR)
    lab.robot.do("protective_stop")


def nothing(lab: Lab) -> None:
    return


USED_UP = "the actions at hand are used up"
FAULTS = [
    Fault(
        name="server killed",
        limit=USED_UP,
        begin=lambda lab: lab.policy.kill(),
        end=lambda lab: lab.policy.start(),
        limit_s=used_up,
        reason="no action at hand; .*UNAVAILABLE",
        recovery="the next episode",
    ),
    Fault(
        name="network black-holed",
        limit=USED_UP,
        begin=lambda lab: lab.network.swallow(),
        end=lambda lab: lab.network.let_through(),
        limit_s=used_up,
        reason="no action at hand; no answer in 1 s",
        through_network=True,
    ),
    Fault(
        name="late replies",
        limit=USED_UP,
        begin=partial(behave, "late"),
        end=partial(behave, "well"),
        limit_s=used_up,
        reason="no action at hand; no answer in 1 s",
    ),
    Fault(
        name="reordered replies",
        limit=USED_UP,
        begin=partial(behave, "reordered"),
        end=partial(behave, "well"),
        limit_s=used_up,
        reason="no action at hand; no answer in 1 s",
    ),
    Fault(
        name="NaN action",
        limit="the answer is there",
        begin=partial(behave, "NaN"),
        end=partial(behave, "well"),
        limit_s=tampered,
        reason="actions are not what their tokens stand for.*got nan",
        recovery="the next episode",
    ),
    Fault(
        name="action out of the policy's range",
        limit="the answer is there",
        begin=partial(behave, "out of range"),
        end=partial(behave, "well"),
        limit_s=partial(first, "answer", lambda answer: answer.reach > TOO_FAR),
        reason="outside the policy's own range: y is 0.9",
    ),
    Fault(
        name="camera frozen",
        limit=f"{CAMERA_ALIKE} frames alike",
        begin=partial(begin, "frozen"),
        end=partial(end, "frozen"),
        limit_s=partial(first, "frame", lambda frame: frame.alike >= CAMERA_ALIKE),
        reason="camera agentview: frozen: ",
    ),
    Fault(
        name="camera silent",
        limit=f"the newest frame is {CAMERA_AGE_S} s old",
        begin=partial(begin, "stalled"),
        end=partial(end, "stalled"),
        limit_s=last_frame_too_old,
        reason=r"camera agentview: no frame for .* \(limit 0\.3 s\)",
    ),
    Fault(
        name="camera unplugged",
        limit="its driver says so",
        begin=partial(begin, "unplugged"),
        end=partial(end, "unplugged"),
        limit_s=partial(first, "lost", anything),
        reason="camera agentview: lost: .* is unplugged",
    ),
    Fault(
        name="capture times jump ahead by 10 s",
        limit="an answer to such a frame is there",
        begin=partial(shift_stamps, 10.0),
        end=partial(shift_stamps, 0.0),
        limit_s=partial(first, "answer", lambda answer: answer.stamp_s > answer.at_s),
        reason=r"observation from the future: .* limit 0\.05 s",
    ),
    Fault(
        name="capture times jump back by 10 s",
        limit="such a frame is there",
        begin=partial(shift_stamps, -10.0),
        end=partial(shift_stamps, 0.0),
        limit_s=partial(first, "frame", lambda frame: frame.stamp_s < frame.at_s - 5.0),
        reason=r"camera agentview: no frame for .* \(limit 0\.3 s\)",
    ),
    Fault(
        name="client stopped (SIGSTOP)",
        limit=f"the last command expires, {EXPIRE_TICKS} ticks after it was given",
        begin=partial(signal_client, signal.SIGSTOP),
        end=partial(signal_client, signal.SIGCONT),
        limit_s=last_command_expired,
        held_s=nobody,
        reason="no word from the client: its last command expired",
    ),
    Fault(
        name="servo stopped (SIGSTOP)",
        limit="the controller's watchdog, as its profile says",
        begin=partial(signal_servo, signal.SIGSTOP),
        end=partial(signal_servo, signal.SIGCONT),
        limit_s=watchdog,
        held_s=program_ended,
        reason="the servo process has not answered for 1 s",
        arms=("ur",),
        recovery="a person's word, then the next episode",
    ),
    Fault(
        name="arm fault (protective stop)",
        limit="the robot stops by itself",
        begin=protective_stop,
        end=nothing,
        limit_s=lambda lab, began_s: began_s,
        reason="ArmError: ur: (safety mode PROTECTIVE_STOP|the controller has refused servoL)",
        arms=("ur",),
        recovery="a person's word, then the next episode",
    ),
]
