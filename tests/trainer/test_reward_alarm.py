"""The alarm: it fires on a planted reward, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest

from rl_trainer.reward_alarm import AlarmConfig, RewardAlarm

CONFIG = AlarmConfig(window=10, rise=0.05, fall=0.1, steady=0.5)
UP, DOWN = np.linspace(0.2, 0.8, 10), np.linspace(0.8, 0.2, 10)


def warnings(returns: Iterable[float], successes: Iterable[float], config: AlarmConfig = CONFIG) -> list[int]:
    """The iterations at which it fires."""
    alarm = RewardAlarm(config)
    said = [alarm.observe(*one) for one in zip(returns, successes, strict=True)]
    return [number for number, message in enumerate(said) if message]


def test_the_alarm_fires_when_a_planted_reward_rises_while_success_falls() -> None:
    """The plain sum pays for dwelling: success goes, and what is paid grows by the dwelling."""
    noise = np.random.default_rng(0).normal(0, 0.05, (2, 20))
    success = np.append(np.full(10, 0.8), DOWN) + noise[0]
    dwelling = np.append(np.zeros(10), np.linspace(0, 3, 10))
    fired = warnings(success + dwelling + noise[1], success)
    assert fired and min(fired) >= 11 and 19 in fired


def test_the_alarm_is_silent_when_both_rise_both_fall_or_only_success_rises() -> None:
    assert warnings(UP, UP) == warnings(DOWN, DOWN) == warnings(DOWN, UP) == []
    assert warnings(UP, DOWN) == [9]


def test_changes_too_small_to_mean_anything_are_silent() -> None:
    assert warnings(UP, 0.5 - 0.09 * np.linspace(0, 1, 10)) == []
    assert warnings(0.04 * np.linspace(0, 1, 10), DOWN) == []
    assert warnings(np.full(10, 0.5), DOWN) == warnings(UP, np.full(10, 0.5)) == []


def test_one_outlier_that_tilts_the_line_is_no_trend() -> None:
    flat = np.array([0.5, 0.51] * 5)
    spike = np.array([*flat[:9], 5.0])
    assert np.polyfit(np.linspace(0, 1, 10), spike, 1)[0] > CONFIG.rise
    assert warnings(spike, DOWN) == []


def test_noise_round_no_trend_is_silent() -> None:
    """600 iterations of 32 episodes at a success rate of one half, with rewards that go with success."""
    rng = np.random.default_rng(1)
    success = rng.binomial(32, 0.5, 600) / 32
    assert len(warnings(success + rng.normal(0, 0.02, 600), success)) == 0


def test_before_the_window_is_full_the_alarm_is_silent_and_old_iterations_are_forgotten() -> None:
    assert warnings(UP[:9], DOWN[:9]) == []
    calm = np.full(10, 0.2)
    assert warnings([*UP, *calm], [*DOWN, *calm])[-1] < 18


def test_a_restored_alarm_goes_on_where_the_first_stood() -> None:
    first, second = RewardAlarm(CONFIG), RewardAlarm(CONFIG)
    for pair in zip(UP[:9], DOWN[:9], strict=True):
        first.observe(*pair)
    second.load(json.loads(json.dumps(first.state())))
    message = second.observe(UP[9], DOWN[9])
    assert message == first.observe(UP[9], DOWN[9]) and second.state() == first.state()
    assert message and "rose by 0.60 (to 0.80) while success fell by 0.60 (to 0.20)" in message


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        RewardAlarm(CONFIG).observe(float("nan"), 0.5)
    with pytest.raises(ValueError, match="window must be >= 3, got 2"):
        AlarmConfig(window=2)
