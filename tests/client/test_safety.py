"""The gate holds what nobody can vouch for, clips what the arm must not do, and always says why."""

from __future__ import annotations

import re

import numpy as np
import pytest

from robot_client.arm import STATE_NAMES, ArmState, Limits
from robot_client.chunks import Planned
from robot_client.safety import SafetyGate
from tests.client.fake_arm import boxed, spec_of

POLICY_LOW_A = np.array([-2.0] * 6 + [-1.0], np.float32)
POLICY_HIGH_A = np.array([2.0] * 6 + [1.0], np.float32)
NOW_NS = 10**12
STATE = ArmState(tick=0, state_S=np.zeros(len(STATE_NAMES), np.float32))


def gate_of(limits: Limits | None = None, **options) -> SafetyGate:
    arm = spec_of() if limits is None else spec_of(limits=limits)
    return SafetyGate(arm, policy_low_A=POLICY_LOW_A, policy_high_A=POLICY_HIGH_A, **options)


def planned(*action: float, age_s: float = 0.0) -> Planned:
    return Planned(
        decision=0, index=0, action_A=np.array(action, np.float32), capture_time_ns=NOW_NS - round(age_s * 1e9)
    )


def at(x_m: float, **more) -> ArmState:
    return ArmState(tick=0, state_S=np.array([x_m, 0, 0, 0, 0, 0, 0, 0], np.float32), **more)


STILL = (0.0,) * 6 + (1.0,)


def test_an_action_within_all_limits_passes_unchanged_and_without_a_reason():
    action = planned(0.5, -1.0, 1.0, 0, 0, 0, 0.3)
    verdict = gate_of().admit(action, STATE, NOW_NS)
    np.testing.assert_array_equal(verdict.action_A, action.action_A)
    assert verdict.reason == ""


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (None, "no action at hand"),
        (planned(0, 0, 0), r"wrong width: got \(3,\), expected \(7,\)"),
        (planned(0, np.nan, 0, 0, 0, 0, 1), "not finite: y is nan"),
        (planned(0, 0, 0, 0, 0, np.inf, 1), "not finite: yaw is inf"),
        (planned(2.5, 0, 0, 0, 0, 0, 1), "outside the policy's own range: x is 2.5"),
        (planned(0, 0, 0, 0, 0, 0, -1.2), "outside the policy's own range: gripper is -1.2"),
        (planned(*STILL, age_s=1.01), "observation too old: 1.01 s, limit 1 s"),
    ],
)
def test_what_cannot_be_vouched_for_is_held(action, reason):
    verdict = gate_of().admit(action, STATE, NOW_NS)
    assert verdict.action_A is None
    assert re.fullmatch(reason, verdict.reason)


def test_an_observation_at_its_age_limit_is_still_followed():
    assert gate_of().admit(planned(*STILL, age_s=1.0), STATE, NOW_NS).action_A is not None


def test_a_clock_that_stands_still_has_no_age_limit():
    assert gate_of(max_age_s=0).admit(planned(*STILL, age_s=3600), STATE, NOW_NS).action_A is not None


def test_steps_beyond_the_arms_limits_are_clipped_to_them():
    verdict = gate_of().admit(planned(1.5, 0, -2, 0, 0, 0, 1), STATE, NOW_NS)
    np.testing.assert_array_equal(verdict.action_A, np.array([1, 0, -1, 0, 0, 0, 1], np.float32))
    assert verdict.reason == "limit: x clipped from 1.5 to 1; limit: z clipped from -2 to -1"


def test_a_gripper_command_out_of_range_is_clipped():
    verdict = gate_of().admit(planned(0, 0, 0, 0, 0, 0, -0.25), STATE, NOW_NS)
    assert verdict.action_A[6] == 0 and verdict.reason == "limit: gripper clipped from -0.25 to 0"


@pytest.mark.parametrize(
    ("x_m", "asked", "sent"),
    [
        (0.00, 0.5, 0.5),  # ends inside
        (0.08, 0.8, 0.4),  # 4 cm asked, 2 cm of room
        (0.10, 0.1, 0.0),  # at the wall
        (0.15, 0.5, 0.0),  # outside: not further out
        (0.15, -0.5, -0.5),  # outside: may come back
        (0.15, -0.1, -0.1),  # but nothing is added to what was asked
        (-0.09, -1.0, -0.2),
    ],
)
def test_no_move_leaves_the_workspace_and_none_is_invented(x_m, asked, sent):
    gate = gate_of(boxed(-0.1, 0.1, metres_per_unit=0.05))
    verdict = gate.admit(planned(asked, 0, 0, 0, 0, 0, 1), at(x_m), NOW_NS)
    assert verdict.action_A[0] == pytest.approx(sent, abs=1e-5)
    assert ("workspace: x clipped" in verdict.reason) == (asked != sent)


def test_the_workspace_is_judged_after_the_step_limit():
    gate = gate_of(boxed(-0.1, 0.1, metres_per_unit=0.05))
    verdict = gate.admit(planned(2.0, 0, 0, 0, 0, 0, 1), at(0.08), NOW_NS)
    assert verdict.action_A[0] == pytest.approx(0.4, abs=1e-5)
    assert verdict.reason.startswith("limit: x clipped from 2 to 1; workspace: x clipped from 1 to 0.4")


def test_a_workspace_for_an_arm_without_position_is_refused():
    arm = spec_of(limits=boxed(-0.1, 0.1, metres_per_unit=0.05), state_names=("joint_1", "joint_2"))
    with pytest.raises(ValueError, match=r"needs the state entries .*eef_x.* got .*joint_1"):
        SafetyGate(arm, policy_low_A=POLICY_LOW_A, policy_high_A=POLICY_HIGH_A)


def test_identical_capture_times_are_a_frozen_camera_until_a_new_one_comes():
    gate = gate_of(frozen_after=3)
    verdicts = []
    for capture_ns in (1, 2, 2, 2, 2, 3):
        gate.looked(capture_ns)
        verdicts.append(gate.admit(planned(*STILL), STATE, NOW_NS))
    held = [verdict.action_A is None for verdict in verdicts]
    assert held == [False, False, False, True, True, False]
    assert verdicts[4].reason == "camera frozen: 4 observations with one capture time"


@pytest.mark.parametrize(("low", "high"), [((0.0, 1.0), (1.0, 1.0)), ((0.0,), (1.0, 1.0)), ((np.nan,), (1.0,))])
def test_limits_that_allow_nothing_are_refused(low, high):
    with pytest.raises(ValueError, match="low < high in every dimension"):
        Limits(low=low, high=high)


def fast_gate(**options) -> SafetyGate:
    return gate_of(Limits(low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7, longest_move=0.5, longest_turn=0.1, **options))


def test_too_fast_a_move_is_shortened_and_keeps_its_direction():
    verdict = fast_gate().admit(planned(0.6, 0.8, 0, 0, 0, 0, 1), STATE, NOW_NS)
    np.testing.assert_allclose(verdict.action_A, [0.3, 0.4, 0, 0, 0, 0, 1], atol=1e-6)
    assert verdict.reason == "speed: x clipped from 0.6 to 0.3; speed: y clipped from 0.8 to 0.4"


def test_a_turn_has_a_speed_limit_of_its_own():
    verdict = fast_gate().admit(planned(0.5, 0, 0, 0, 0, -0.4, 1), STATE, NOW_NS)
    np.testing.assert_allclose(verdict.action_A, [0.5, 0, 0, 0, 0, -0.1, 1], atol=1e-6)


@pytest.mark.parametrize(("tick", "allowed"), [(0, 0.05), (10, 0.275), (20, 0.5), (500, 0.5)])
def test_an_episode_begins_slowly(tick, allowed):
    state = ArmState(tick=tick, state_S=STATE.state_S)
    verdict = fast_gate(slow_start_ticks=20).admit(planned(1, 0, 0, 0, 0, 0, 1), state, NOW_NS)
    assert verdict.action_A[0] == pytest.approx(allowed, abs=1e-6)


def test_an_arm_on_its_way_is_judged_by_where_it_is_led():
    gate = gate_of(boxed(-0.1, 0.1, metres_per_unit=0.05))
    verdict = gate.admit(planned(1, 0, 0, 0, 0, 0, 1), at(0.0, goal_m=np.array([0.08, 0, 0])), NOW_NS)
    assert verdict.action_A[0] == pytest.approx(0.4, abs=1e-5)


def test_an_arm_in_trouble_is_held_and_says_which():
    state = at(0.0, trouble="held up", blind="front: no frame for 0.4 s")
    verdict = gate_of().admit(planned(*STILL), state, NOW_NS)
    assert verdict.action_A is None and verdict.reason == "held up; front: no frame for 0.4 s"


def test_a_person_is_held_in_the_arms_own_trouble_alone():
    still_A, blind = np.array(STILL, np.float32), "front: no frame for 0.4 s"
    assert gate_of().admit_person(still_A, at(0.0, blind=blind)).action_A is not None
    verdict = gate_of().admit_person(still_A, at(0.0, trouble="held up", blind=blind))
    assert verdict.action_A is None and verdict.reason == "held up"


def test_an_observation_from_the_future_is_held():
    verdict = gate_of().admit(planned(*STILL, age_s=-0.2), STATE, NOW_NS)
    assert verdict.action_A is None and verdict.reason == "observation from the future: 0.20 s, limit 0.05 s"


def test_a_speed_limit_for_an_arm_without_those_axes_is_refused():
    joints = ("joint_1", "joint_2")
    arm = spec_of(limits=Limits(low=(-1.0, -1.0), high=(1.0, 1.0), longest_move=0.5), action_names=joints)
    with pytest.raises(ValueError, match=r"a speed limit needs the actions .*'x'.* got .*joint_1"):
        SafetyGate(arm, policy_low_A=POLICY_LOW_A[:2], policy_high_A=POLICY_HIGH_A[:2])


def test_a_person_is_kept_within_the_same_limits():
    verdict = fast_gate().admit_person(np.array([1, 0, 0, 0, 0, 0, 1], np.float32), STATE)
    assert verdict.action_A[0] == pytest.approx(0.5) and verdict.reason.startswith("speed: x clipped")


def test_a_persons_number_that_is_not_finite_is_held():
    verdict = fast_gate().admit_person(np.array([np.nan, 0, 0, 0, 0, 0, 1], np.float32), STATE)
    assert verdict.action_A is None and verdict.reason == "not finite: x is nan"
