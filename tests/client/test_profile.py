"""A profile is read whole, or refused by the name of what is wrong in it."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

from robot_client import arms
from robot_client.errors import BadProfile, UnknownArm
from robot_client.profile import Profile, read_profile
from robot_client.real_arm import arm_spec

LEAST = """
arm = "franka"
[hardware]
host = "172.16.0.2"
[home]
joints_rad = [0.0, -0.8, 0.0]
[workspace]
low_m = [0.2, -0.3, 0.0]
high_m = [0.7, 0.3, 0.5]
"""


def read(tmp_path, text: str) -> Profile:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    return read_profile(path)


def test_the_least_profile_has_every_limit_on(tmp_path):
    profile = read(tmp_path, LEAST)
    limits = arm_spec(profile, ("front",)).limits
    assert profile.hardware == {"host": "172.16.0.2"} and profile.home.joints_rad == (0.0, -0.8, 0.0)
    assert limits.workspace is not None and limits.slow_start_ticks == 40
    assert limits.low == (-1.0,) * 6 + (0.0,) and limits.high == (1.0,) * 7
    # 0.25 m/s is 12.5 mm a tick of 1/20 s, where an action of 1 is 10 mm; 1 rad/s is 0.05 rad, where it is 0.05.
    assert limits.longest_move == pytest.approx(1.25) and limits.longest_turn == pytest.approx(1.0)


def test_every_entry_can_be_stated(tmp_path):
    profile = read(
        tmp_path,
        LEAST
        + """
[scale]
metres = 0.05
radians = 0.5
[frame]
base_m = [-0.6, 0, 0.9]
tool_rad = [0, 0, 1.5708]
[gripper]
binary = false
[motion]
speed_m_s = 0.1
joints_low_rad = [-1, -1, -1]
joints_high_rad = [1, 1, 1]
""",
    )
    assert profile.scale.metres == 0.05 and profile.gripper.binary is False
    np.testing.assert_allclose(profile.frame.base.position_m, [-0.6, 0, 0.9])
    assert profile.motion.speed_m_s == 0.1 and profile.motion.joints_high_rad == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('arm = "franka"', "", r"the profile must state \['arm'\]"),
        ("[hardware]", "speed = 1\n[hardware]", r"the profile has entries \[.*'slow_start_s'.*\], got \['speed'\]"),
        (
            "joints_rad = [0.0, -0.8, 0.0]",
            'joints_rad = "home"',
            r"home\.joints_rad must be a list of numbers, got 'home'",
        ),
        (
            "low_m = [0.2, -0.3, 0.0]",
            "low_m = [0.2, -0.3]",
            r"workspace\.low_m must be three numbers, got \[0\.2, -0\.3\]",
        ),
        ("low_m = [0.2, -0.3, 0.0]", "low_m = [0.2, 0.4, 0.0]", r"workspace: low_m must be below high_m"),
        ("[home]", "[home]\nspeed = 2.0", r"home: .*speed in \(0, 1\].*got 1\.0, 2\.0"),
        ("[home]", "[scale]\nmetres = -1\n[home]", r"scale: metres must be above 0 and finite, got -1"),
        ("[home]", "[gripper]\nbinary = 1\n[home]", r"gripper\.binary must be true or false, got 1"),
        (
            "[home]",
            "[gripper]\nbinary = false\nhigh = 0.8\n[home]",
            r"home\.opening must be within the gripper's 0\.0 to 0\.8, got 1\.0",
        ),
        ("[home]", "[home", r"lab\.toml: .*line"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_name_of_the_entry(tmp_path, before, after, message):
    with pytest.raises(BadProfile, match=message):
        read(tmp_path, LEAST.replace(before, after))


def test_a_missing_profile_is_refused_by_name(tmp_path):
    with pytest.raises(BadProfile, match=r"nowhere\.toml"):
        read_profile(tmp_path / "nowhere.toml")


def test_no_number_may_be_without_bounds(tmp_path):
    with pytest.raises(BadProfile, match="motion: speed_m_s must be above 0 and finite, got inf"):
        read(tmp_path, LEAST + "[motion]\nspeed_m_s = inf\n")


@pytest.mark.parametrize("path", sorted(Path("docs/profiles").glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_suits_the_arm_it_is_named_after(path):
    profile = read_profile(path)
    assert profile.arm == path.stem
    try:
        module = sys.modules[arms.load(profile.arm).__module__]
    except UnknownArm as error:
        pytest.skip(str(error))
    motion = profile.motion
    inside = zip(motion.joints_low_rad, profile.home.joints_rad, motion.joints_high_rad, strict=True)
    assert all(low < at < high for low, at, high in inside)
    (hardware,) = [each for name, each in vars(module).items() if name.lower() == f"{path.stem}hardware"]
    inspect.signature(hardware).bind(**profile.hardware)
