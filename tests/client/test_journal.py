"""The log tells every hold and clip that begins, and does not drown in them."""

from __future__ import annotations

import numpy as np
import pytest

from protos import episode_pb2
from robot_client.arm import ArmState
from robot_client.journal import QUIET_TICKS, Journal
from tests.client.conftest import rollout_of

STATE = ArmState(tick=0, state_S=np.zeros(0, np.float32))


@pytest.fixture
def told(caplog):
    """What is logged of ticks with these reasons."""

    def lines(reasons: list[str], source=episode_pb2.SOURCE_HOLD) -> list[str]:
        journal = Journal()
        journal.on_start(rollout_of(), "a")
        for reason in reasons:
            journal.on_tick(STATE, episode_pb2.Tick(source=source, reason=reason))
        return caplog.messages

    return lines


def test_a_hold_that_lasts_is_told_once_whatever_its_figures(told):
    assert told(["", *(f"observation too old: {n}.00 s" for n in range(50))]) == [
        "tick 1: hold: observation too old: 0.00 s"
    ]


def test_a_second_reason_is_told_when_it_joins(told):
    assert told(["no action at hand", "no action at hand; no answer in 1 s"]) == [
        "tick 0: hold: no action at hand",
        "tick 1: hold: no action at hand; no answer in 1 s",
    ]


@pytest.mark.parametrize(("between", "lines"), [(QUIET_TICKS - 1, 1), (QUIET_TICKS, 2)])
def test_a_clip_is_told_again_once_it_had_been_quiet(told, between, lines):
    clip = "speed: x clipped from 1 to 0.5"
    assert told([clip, *[""] * between, clip], episode_pb2.SOURCE_POLICY) == [
        f"tick {n * (between + 1)}: clip: {clip}" for n in range(lines)
    ]


def test_a_tick_without_a_reason_is_not_told(told):
    assert told([""] * 30, episode_pb2.SOURCE_POLICY) == []
