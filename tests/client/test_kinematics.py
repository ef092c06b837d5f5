"""Where the tool of an SO arm is, and the joints that bring it where it is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import robot_client.arms
from robot_client.pose import Pose

pytest.importorskip("pinocchio", reason="kinematics needs Pinocchio (the package pin)")

from robot_client.kinematics import Kinematics

pytestmark = pytest.mark.arm

FOLDER = Path(robot_client.arms.__file__).parent
MODELS = ("so100", "so101")
BENT_J = np.array([0.2, -0.3, 0.4, 0.3, -0.5])
"""Far from every limit."""
LEVEL_J = np.zeros(5)
"""The gripper level, straight ahead."""
M_PER_RAD = 0.01
EXACT_M = 1e-5


@pytest.fixture(params=MODELS)
def kinematics(request):
    return Kinematics(FOLDER / f"{request.param}.urdf", m_per_rad=M_PER_RAD)


def missing_6(kinematics, joints_J, wanted: Pose) -> np.ndarray:
    return kinematics.pose(joints_J).change_to(wanted)


def cost_m2(kinematics, joints_J, wanted: Pose) -> float:
    weighted_6 = missing_6(kinematics, joints_J, wanted) * ([1.0] * 3 + [M_PER_RAD] * 3)
    return float(weighted_6 @ weighted_6)


@pytest.mark.parametrize(
    ("model", "ahead_m", "up_m"),
    [
        # Sums of the links: pan, lift, elbow, flex, roll, tool.
        ("so101", 0.0388 + 0.0304 + 0.0280 + 0.1349 + 0.0611 + 0.0981, 0.0624 + 0.0542 + 0.1126 + 0.0052 - 0.0079),
        ("so100", 0.0452 + 0.0306 + 0.0280 + 0.1349 + 0.0601 + 0.0991, 0.0165 + 0.1025 + 0.1126 + 0.0052 - 0.0079),
    ],
)
def test_at_zero_the_gripper_is_level_and_straight_ahead(model, ahead_m, up_m):
    pose = Kinematics(FOLDER / f"{model}.urdf").pose(LEVEL_J)
    np.testing.assert_allclose(pose.position_m, [ahead_m, 0, up_m], atol=2e-4)
    np.testing.assert_allclose(pose.rotation[:, 2], [1, 0, 0], atol=1e-9)


def test_a_positive_angle_turns_right_reaches_ahead_points_down_and_rolls_left(kinematics):
    for joint, direction in enumerate([(0, -1, 0), (1, 0, 0), (0, 0, -1), (0, 0, -1)]):
        joints_J = LEVEL_J.copy()
        joints_J[joint] = 0.1
        moved_m = kinematics.pose(joints_J).position_m - kinematics.pose(LEVEL_J).position_m
        assert moved_m @ direction > 0.004, kinematics.names[joint]
    rolled = kinematics.pose(LEVEL_J).change_to(kinematics.pose(np.array([0, 0, 0, 0, 0.1])))
    np.testing.assert_allclose(rolled[3:], [-0.1, 0, 0], atol=1e-9)


def test_the_inverse_undoes_the_forward_way(kinematics):
    generator = np.random.default_rng(0)
    for _ in range(50):
        joints_J = BENT_J + generator.uniform(-0.5, 0.5, 5)
        found_J = kinematics.joints_for(kinematics.pose(joints_J), joints_J + generator.uniform(-0.2, 0.2, 5))
        np.testing.assert_allclose(found_J, joints_J, atol=1e-3)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("distance_m", [-0.02, -0.001, 0.001, 0.02])
def test_the_position_is_exact_along_every_axis(kinematics, axis, distance_m):
    """Though the rotation cannot be kept sideways; 0.02 mm at most are given up for it."""
    wanted = kinematics.pose(LEVEL_J).moved(distance_m * np.eye(6)[axis])
    missing = missing_6(kinematics, kinematics.joints_for(wanted, LEVEL_J), wanted)
    np.testing.assert_allclose(missing[:3], 0, atol=2e-5)
    if axis != 1:
        np.testing.assert_allclose(missing[3:], 0, atol=2e-3)


@pytest.mark.parametrize("axis", ["about x", "about y"])
def test_roll_and_pitch_are_exact_where_the_gripper_is_level(kinematics, axis):
    """But for 0.01 degrees of yaw: the tool is 8 mm beside the axis that it rolls about, which the pan makes up for."""
    change_6 = np.radians(0.5) * np.eye(6)[3 if axis == "about x" else 4]
    wanted = kinematics.pose(LEVEL_J).moved(change_6)
    missing = missing_6(kinematics, kinematics.joints_for(wanted, LEVEL_J), wanted)
    np.testing.assert_allclose(missing[:3], 0, atol=EXACT_M)
    np.testing.assert_allclose(missing[3:], 0, atol=3e-4)


def test_yaw_alone_is_what_five_joints_cannot_do(kinematics):
    wanted = kinematics.pose(LEVEL_J).moved(np.radians(0.5) * np.eye(6)[5])
    missing = missing_6(kinematics, kinematics.joints_for(wanted, LEVEL_J), wanted)
    np.testing.assert_allclose(missing[:3], 0, atol=EXACT_M)
    np.testing.assert_allclose(np.degrees(missing[3:]), [0, 0, 0.5], atol=0.02)


def test_limits_are_kept_whatever_is_wanted(kinematics):
    kinematics.narrow(np.array([1.0, 1.2, 1.3, 1.4, 0.8]))
    generator = np.random.default_rng(1)
    joints_J = BENT_J
    for _ in range(100):
        wanted = Pose.of(generator.uniform(-0.5, 0.5, 3), generator.uniform(-3, 3, 3))
        joints_J = kinematics.joints_for(wanted, joints_J)
        assert (kinematics.low_J <= joints_J).all() and (joints_J <= kinematics.high_J).all()


@pytest.mark.parametrize("away_m", [(0.5, 0, 0), (0, 0, 0.6), (-0.2, 0.3, -0.4)])
def test_out_of_reach_nothing_in_the_neighbourhood_is_nearer(kinematics, away_m):
    wanted = kinematics.pose(BENT_J).moved(np.array([*away_m, 0, 0, 0]))
    found_J = BENT_J
    for _ in range(5):
        found_J = kinematics.joints_for(wanted, found_J)
    found_m2 = cost_m2(kinematics, found_J, wanted)
    generator = np.random.default_rng(2)
    for size_rad in [0.001, 0.01, 0.1]:
        for _ in range(200):
            other_J = np.clip(found_J + generator.normal(0, size_rad, 5), kinematics.low_J, kinematics.high_J)
            assert cost_m2(kinematics, other_J, wanted) > found_m2 - 1e-6


def test_no_step_is_longer_than_allowed_out_of_reach_and_back(kinematics):
    """Through the straight arm, where a Jacobian alone asks for endless speed."""
    start, joints_J = kinematics.pose(BENT_J), BENT_J
    ways_m = np.concatenate([np.linspace(0, 0.4, 200), np.linspace(0.4, 0, 200), np.zeros(20)])
    for way_m in ways_m:
        before_J = joints_J
        joints_J = kinematics.joints_for(start.moved(np.array([way_m, 0, 0, 0, 0, 0])), joints_J, step_rad=0.04)
        assert np.abs(joints_J - before_J).max() <= 0.04 + 1e-12
    np.testing.assert_allclose(missing_6(kinematics, joints_J, start)[:3], 0, atol=EXACT_M)
    np.testing.assert_allclose(joints_J, BENT_J, atol=0.01)


def test_joints_beyond_their_limits_come_back_step_by_step(kinematics):
    near_J = BENT_J.copy()
    near_J[3] = kinematics.high_J[3] + 0.1
    found_J = kinematics.joints_for(kinematics.pose(near_J), near_J, step_rad=0.04)
    assert found_J[3] == pytest.approx(kinematics.high_J[3] + 0.06)


def test_a_weight_that_weighs_nothing_is_refused():
    with pytest.raises(ValueError, match="m_per_rad must be above 0, got -1"):
        Kinematics(FOLDER / "so101.urdf", m_per_rad=-1)
