"""Poses and rotation vectors, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from robot_client.pose import Pose, rotation, rotation_vector, same_turn_near


@pytest.mark.parametrize(
    "vector", [(0, 0, 0), (0.3, -0.2, 0.9), (0, 0, 3.0), (1e-5, 0, 0), (np.pi, 0, 0), (0, -2.2, 2.2)]
)
def test_a_rotation_vector_is_the_inverse_of_rotation(vector):
    np.testing.assert_allclose(rotation_vector(rotation(np.array(vector, float))), vector, atol=1e-7)


def test_at_half_a_turn_the_axis_is_kept_up_to_its_sign():
    vector = np.pi * np.array([0.6, 0.0, -0.8])
    found = rotation_vector(rotation(vector))
    np.testing.assert_allclose(np.abs(found @ vector), np.pi**2, atol=1e-6)


def test_a_rotation_vector_is_no_longer_than_half_a_turn():
    np.testing.assert_allclose(rotation_vector(rotation(np.array([0, 0, 4.0]))), [0, 0, 4.0 - 2 * np.pi], atol=1e-9)


def test_frames_chain():
    """A tool 10 cm in front of a flange which is turned a quarter to the left lies 10 cm to the left."""
    flange, tool = Pose.of((0.5, 0, 0.3), (0, 0, np.pi / 2)), Pose.of((0.1, 0, 0))
    np.testing.assert_allclose((flange @ tool).position_m, [0.5, 0.1, 0.3], atol=1e-12)


def test_a_pose_and_its_inverse_cancel():
    pose = Pose.of((0.5, -0.2, 0.3), (0.4, 1.0, -0.7))
    back = pose @ pose.inverse
    np.testing.assert_allclose(back.position_m, 0, atol=1e-12)
    np.testing.assert_allclose(back.rotation, np.eye(3), atol=1e-12)


def test_a_move_turns_about_the_outer_axes_and_its_own_origin():
    pose = Pose.of((0.5, 0, 0.3), (np.pi, 0, 0)).moved(np.array([0, 0, 0.1, 0, 0, np.pi / 2]))
    np.testing.assert_allclose(pose.position_m, [0.5, 0, 0.4])
    np.testing.assert_allclose(pose.rotation @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_the_change_to_a_pose_leads_there():
    here, there = Pose.of((0.5, 0, 0.3), (3.0, 0.2, 0)), Pose.of((0.4, 0.1, 0.3), (2.9, -0.3, 0.4))
    arrived = here.moved(here.change_to(there))
    np.testing.assert_allclose(arrived.position_m, there.position_m, atol=1e-12)
    np.testing.assert_allclose(arrived.rotation, there.rotation, atol=1e-12)


def test_a_turn_is_told_the_way_round_that_is_near():
    turn = np.array([3.0, 0.1, 0.0])
    other = same_turn_near(turn, -turn)
    np.testing.assert_allclose(rotation(other), rotation(turn), atol=1e-12)
    assert np.dot(other, turn) < 0 and np.array_equal(same_turn_near(turn, turn), turn)
    assert np.array_equal(same_turn_near(np.zeros(3), turn), np.zeros(3))
