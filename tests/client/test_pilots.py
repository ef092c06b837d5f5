"""Devices together: gestures become what a policy's action would be, a stop stays, and each is found by its name."""

from __future__ import annotations

import numpy as np
import pytest

from protos import episode_pb2
from robot_client import pilots
from robot_client.arm import ArmState, Limits
from robot_client.drivers import run
from robot_client.errors import PilotError
from robot_client.observer import Observer
from robot_client.pilot import FULL, Gesture, Together, beyond
from robot_client.safety import SafetyGate
from tests.client.conftest import rollout_of
from tests.client.fake_arm import LIMITS, FakeArm, spec_of

LEFT = Gesture(drive_6=np.array([0, 1, 0, 0, 0, 0]))
UP = Gesture(drive_6=np.array([0, 0, 1, 0, 0, 0]))
STILL = Gesture(drive_6=np.zeros(6))
GRIP = Gesture(drive_6=np.zeros(6), grips=True)
NOTHING = Gesture()


class FakeDevice:
    """Its gesture is what the test says; what is pressed is told once."""

    def __init__(self, name: str = ""):
        self.now = NOTHING
        self.pressed = NOTHING
        self.lost = ""
        self.closed = False
        opened.append(self)

    def gesture(self) -> Gesture:
        if self.lost:
            raise PilotError(self.lost)
        told, self.pressed = self.pressed, NOTHING
        return self.now if told is NOTHING else told

    def close(self) -> None:
        self.closed = True


opened: list[FakeDevice] = []


class DeviceWithoutItsSdk:
    def __init__(self):
        import no_such_sdk  # noqa: F401


@pytest.fixture
def devices() -> list[FakeDevice]:
    return [FakeDevice(), FakeDevice()]


@pytest.fixture
def pilot(devices) -> Together:
    return Together(spec_of(), devices)


# What a person drives.


def test_nobody_drives_and_the_policy_acts(pilot):
    wish = pilot.wish()
    assert wish.action_A is None and wish.outcome is None and not wish.stopped


def test_full_deflection_is_a_fraction_of_what_the_arms_limits_let_through(devices):
    limits = Limits(
        low=(-1.0, -0.5, -1.0, -1.0, -1.0, -0.2, 0.0), high=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), longest_move=0.8
    )
    devices[0].now = Gesture(drive_6=np.array([1, -1, 0.5, 1, 0, -1]))
    action_A = Together(spec_of(limits=limits), devices).wish().action_A
    assert action_A.dtype == np.float32
    np.testing.assert_allclose(action_A, np.array([0.8, -0.5, 0.4, 1, 0, -0.2, 1 / FULL]) * FULL, rtol=1e-6)


def test_pushed_all_ways_at_once_the_speed_limit_clips_nothing(devices):
    spec = spec_of(limits=Limits(low=LIMITS.low, high=LIMITS.high, longest_move=0.6, longest_turn=0.3))
    devices[0].now = Gesture(drive_6=np.ones(6))
    gate = SafetyGate(spec, policy_low_A=np.full(7, -1), policy_high_A=np.ones(7))
    state = ArmState(tick=0, state_S=np.zeros(8))
    assert gate.admit_person(Together(spec, devices).wish().action_A, state).reason == ""


def test_of_two_that_drive_the_first_does(pilot, devices):
    devices[1].now = LEFT
    assert pilot.wish().action_A[1] == FULL
    devices[0].now = UP
    np.testing.assert_array_equal(pilot.wish().action_A, [0, 0, FULL, 0, 0, 0, 1])


def test_an_arm_with_other_actions_is_refused(devices):
    with pytest.raises(PilotError, match=r"a person drives \['x', .*'gripper'\], fake expects \['joint'\]"):
        Together(spec_of(action_names=("joint",)), devices)


@pytest.mark.parametrize(
    ("deflection", "driven"), [(0, 0), (0.2, 0), (-0.2, 0), (0.6, 0.5), (-0.6, -0.5), (1, 1), (-1, -1), (1.2, 1)]
)
def test_a_dead_zone_drives_nothing_and_what_is_beyond_begins_gently(deflection, driven):
    assert beyond(np.array(deflection), 0.2) == pytest.approx(driven)


# What stops and what lets go.


@pytest.mark.parametrize("which", [0, 1])
def test_a_stop_of_any_device_stays_until_any_lets_go(pilot, devices, which):
    devices[0].now = LEFT
    devices[which].pressed = Gesture(stops="the button")
    for _ in range(3):
        wish = pilot.wish()
        assert wish.stopped == "the button" and wish.action_A is None
    devices[1 - which].pressed = Gesture(lets_go=True)
    assert not pilot.wish().stopped
    assert pilot.wish().action_A is not None


def test_nothing_is_let_go_while_something_stops(pilot, devices):
    devices[0].now = Gesture(stops="the button is down")
    devices[1].now = Gesture(lets_go=True)
    assert pilot.wish().stopped == pilot.wish().stopped == "the button is down"
    devices[0].now, devices[1].now = NOTHING, NOTHING
    assert pilot.wish().stopped == "the button is down"
    devices[1].now = Gesture(lets_go=True)
    assert not pilot.wish().stopped


def test_every_reason_to_stop_is_told(pilot, devices):
    devices[0].now, devices[1].lost = Gesture(stops="the button is down"), "the plug is out"
    assert pilot.wish().stopped == "the button is down; the plug is out"


def test_a_device_that_is_lost_stops_and_when_it_is_back_somebody_must_let_go(pilot, devices):
    devices[0].now, devices[0].lost = LEFT, "the plug is out"
    assert pilot.wish().stopped == "the plug is out"
    devices[1].pressed = Gesture(lets_go=True)
    assert pilot.wish().stopped == "the plug is out"
    devices[0].lost = ""
    assert pilot.wish().stopped == "the plug is out"
    devices[1].pressed = Gesture(lets_go=True)
    assert pilot.wish().action_A is not None


def test_stops_and_their_end_are_logged_once(pilot, devices, caplog):
    for pressed in (Gesture(stops="the button"), NOTHING, Gesture(lets_go=True), NOTHING):
        devices[0].pressed = pressed
        pilot.wish()
    assert [each.getMessage() for each in caplog.records] == ["stopped: the button", "let go: the arm may move again"]


@pytest.mark.parametrize("which", [0, 1])
def test_any_device_says_the_outcome_once_also_of_a_stopped_arm(pilot, devices, which):
    devices[which].pressed = Gesture(outcome="failure", stops="enough")
    wish = pilot.wish()
    assert wish.outcome == "failure" and wish.stopped == "enough"
    assert pilot.wish().outcome is None


# In an episode.


class Press(Observer):
    """Changes a device's gesture behind some ticks."""

    def __init__(self, device: FakeDevice, by_tick: dict[int, Gesture]):
        self.device = device
        self.by_tick = by_tick

    def on_tick(self, state, tick):
        self.device.now = self.by_tick.get(state.tick, self.device.now)


def run_one(client, pilot, *watchers: Observer, max_ticks: int = 12):
    arm = FakeArm()
    observers = [pilot, *watchers]
    [result] = run(arm, [rollout_of(max_ticks=max_ticks)], client, pilot=pilot, observers=lambda _: observers)
    return arm, result


def test_why_it_was_stopped_is_in_the_record(client, policy, pilot, devices):
    run_one(client, pilot, Press(devices[0], {1: Gesture(stops="the button")}))
    ticks = policy.only_episode.ticks
    assert {tick.reason for tick in ticks[:2]} == {""}
    assert {(tick.source, tick.reason) for tick in ticks[2:]} == {(episode_pb2.SOURCE_HOLD, "stopped: the button")}


@pytest.mark.parametrize("left_open", [True, False])
def test_a_takeover_leaves_the_gripper_as_the_policy_had_it_until_the_person_grips(
    client, policy, pilot, devices, left_open
):
    policy.action_of = lambda decision: np.array([0.1, 0, 0, 0, 0, 0, 1.0 * left_open])
    _, result = run_one(client, pilot, Press(devices[0], {1: LEFT, 3: GRIP, 4: STILL, 6: GRIP, 7: STILL}))
    gripper = [tick.action[6] for tick in policy.only_episode.ticks]
    assert result.human == 10
    assert [g > 0.9 for g in gripper] == [left_open] * 4 + [not left_open] * 3 + [left_open] * 5


def test_what_was_pressed_before_an_episode_is_not_about_it_but_a_stop_stays(client, policy, pilot, devices):
    devices[0].pressed = Gesture(outcome="success", stops="the button", drive_6=np.zeros(6), grips=True)
    arm, result = run_one(client, pilot)
    assert (result.outcome, result.ticks, result.holds) == ("error", 12, 12) and not arm.applied


# By name.


@pytest.fixture
def installed(offer):
    """A package that offers devices, as far as Python's own machinery can tell."""
    offer(
        f"[{pilots.PILOTS.group}]\n"
        "fake = tests.client.test_pilots:FakeDevice\n"
        "stop = robot_client.pilots.serial_stop:SerialStop\n"
        "absent = tests.client.no_such_module:Device\n"
        "bare = tests.client.test_pilots:DeviceWithoutItsSdk\n"
    )
    opened.clear()


def test_a_description_says_kind_and_device(installed):
    pytest.importorskip("serial")
    device = pilots.parse("stop:loop://")
    device.close()
    assert type(device).__name__ == "SerialStop"


def test_several_are_one_pilot_that_owns_them(installed):
    pilot = pilots.together(["fake", "fake:second"], spec_of())
    opened[1].now = LEFT
    assert len(opened) == 2 and pilot.wish().action_A is not None
    pilot.close()
    assert [device.closed for device in opened] == [True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lever", r"pilot must be one of \[.*'bare', 'fake'.*\], got 'lever'"),
        ("", r"pilot must be one of \[.*\], got ''"),
        ("absent", r"pilot 'absent' needs a package that is not installed: .*no_such_module"),
        ("bare", r"not installed: No module named 'no_such_sdk'; .*'vla-rl\[bare\]'"),
        ("bare:left", r"pilot 'bare:left': .*argument"),
        ("stop", r"pilot 'stop': .*missing.*'device'"),
    ],
)
def test_a_description_that_makes_no_device_is_refused_and_leaves_none_open(installed, text, message):
    with pytest.raises(PilotError, match=message):
        pilots.together(["fake", text], spec_of())
    assert [device.closed for device in opened] == [True]


def test_an_arm_that_nobody_can_drive_leaves_no_device_open(installed):
    with pytest.raises(PilotError, match="fake expects"):
        pilots.together(["fake"], spec_of(action_names=("joint",)))
    assert [device.closed for device in opened] == [True]
