"""One action per tick out of answers of K actions, entered where the arm has got to."""

from __future__ import annotations

import numpy as np
import pytest

from protos.episode_pb2 import Timing
from robot_client.answer import Answer
from robot_client.chunks import BLEND_DECAY, Chunks, ticks_ahead
from robot_client.errors import BadAnswer


def answer(decision: int, capture_time_ns: int, length: int = 4) -> Answer:
    """Action k of decision d is (10 d + k,)."""
    return Answer(
        decision=decision,
        capture_time_ns=capture_time_ns,
        actions_KA=10 * decision + np.arange(length, dtype=np.float32)[:, None],
        token_ids_N=np.zeros(length, np.int32),
        token_logprobs_N=np.zeros(length, np.float32),
        version=1,
        temperature=0.0,
        timing=Timing(),
        arrived_s=0.0,
    )


def follow(chunks: Chunks, ticks: int) -> list[float | None]:
    """What is executed at each tick; None is a hold."""
    executed = []
    for _ in range(ticks):
        planned = chunks.next()
        if planned is None:
            chunks.held()
        else:
            chunks.applied()
        executed.append(None if planned is None else float(planned.action_A[0]))
    return executed


def test_nothing_is_at_hand_before_the_first_answer():
    chunks = Chunks(chunk_length=4)
    assert chunks.wants_observation and chunks.next() is None


def test_in_order_a_chunk_is_entered_at_its_first_action_however_long_the_arm_held():
    chunks = Chunks(chunk_length=4)
    chunks.looked(100)
    assert follow(chunks, 3) == [None] * 3
    chunks.adopt(answer(0, 100))
    assert follow(chunks, 5) == [0, 1, 2, 3, None]
    assert chunks.wants_observation


def test_the_next_answer_is_wanted_when_so_many_actions_remain():
    chunks = Chunks(chunk_length=4, ahead_ticks=2)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    wanted = []
    for _ in range(4):
        wanted.append(chunks.wants_observation)
        follow(chunks, 1)
    assert wanted == [False, False, True, True]


def test_asked_ahead_the_actions_that_are_past_are_skipped():
    chunks = Chunks(chunk_length=4, ahead_ticks=2)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 2)
    chunks.looked(200)
    assert follow(chunks, 1) == [2]
    chunks.adopt(answer(1, 200))
    assert follow(chunks, 3) == [11, 12, 13]


def test_holding_while_an_answer_is_late_makes_no_action_past():
    chunks = Chunks(chunk_length=4, ahead_ticks=1)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 3)
    chunks.looked(200)
    assert follow(chunks, 4) == [3, None, None, None]
    chunks.adopt(answer(1, 200))
    assert follow(chunks, 1) == [11]


def test_a_chunk_that_was_held_is_not_taken_up_again():
    chunks = Chunks(chunk_length=4)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 1)
    chunks.held()
    assert chunks.next() is None and chunks.wants_observation
    assert chunks.since_decision == (0, 2)


def test_a_hold_counts_the_ticks_since_its_decision_was_first_asked_for():
    chunks = Chunks(chunk_length=4)
    places = []
    for decision in range(2):
        for retry in range(3):  # two ticks of holding for each try
            chunks.looked(100 * decision + retry)
            for _ in range(2):
                places.append(chunks.since_decision)
                chunks.held()
        chunks.adopt(answer(decision, 100 * decision + 2))
        follow(chunks, 4)
    places.append(chunks.since_decision)
    assert places == [*[(0, n) for n in range(6)], *[(0, n) for n in range(10, 16)], (1, 10)]


def test_a_retry_may_answer_the_older_observation_and_is_entered_accordingly():
    chunks = Chunks(chunk_length=4, ahead_ticks=3)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 1)
    chunks.looked(200)
    follow(chunks, 1)
    chunks.looked(300)
    follow(chunks, 1)
    chunks.adopt(answer(1, 200))
    assert follow(chunks, 1) == [12]


def test_an_answer_to_an_observation_that_was_never_sent_is_refused():
    chunks = Chunks(chunk_length=4)
    chunks.looked(100)
    with pytest.raises(BadAnswer, match=r"capture_time_ns: .*\[100\], got 99"):
        chunks.adopt(answer(0, 99))


def overlapping(overlap: str) -> Chunks:
    """Chunk 0 has been followed for a tick, and chunk 1 answers an observation taken then."""
    chunks = Chunks(chunk_length=4, ahead_ticks=3, overlap=overlap)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 1)
    chunks.looked(200)
    follow(chunks, 1)
    chunks.adopt(answer(1, 200))
    return chunks


def test_in_order_the_older_chunk_is_executed_to_its_end_and_the_newer_entered_where_the_arm_has_got_to():
    assert follow(overlapping("in_order"), 4) == [2, 3, 13, None]


def test_the_latest_chunk_takes_over_as_it_arrives():
    assert follow(overlapping("latest"), 4) == [11, 12, 13, None]


def test_a_blend_is_the_weighted_mean_of_all_that_have_an_action_and_says_so():
    chunks = overlapping("blend")
    planned = chunks.next()
    old, new = 1.0, np.exp(-BLEND_DECAY)
    assert planned.action_A[0] == pytest.approx((old * 2 + new * 11) / (old + new), rel=1e-6)
    assert planned.blended and (planned.decision, planned.index, planned.capture_time_ns) == (1, 1, 100)
    follow(chunks, 2)
    planned = chunks.next()
    assert planned.action_A[0] == 13 and not planned.blended and planned.capture_time_ns == 200


@pytest.mark.parametrize("overlap", ["in_order", "latest", "blend"])
def test_the_next_answer_is_wanted_when_the_newest_chunk_runs_out(overlap):
    chunks = overlapping(overlap)
    chunks.ahead_ticks = 1
    wanted = []
    for _ in range(3):
        wanted.append(chunks.wants_observation)
        follow(chunks, 1)
    assert wanted == [False, False, True]


@pytest.mark.parametrize(
    ("answer_s", "ticks"),
    [
        ([], 0),
        ([3.0], 0),  # warm-up
        ([3.0, 0.02], 1),
        ([3.0, 0.02, 0.11, 0.04], 3),
        ([3.0, 5.0, *[0.06] * 16], 2),  # long ago
        ([3.0, 9.0], 7),
    ],
)
def test_a_decision_is_asked_for_as_long_before_as_answers_take(answer_s, ticks):
    assert ticks_ahead(answer_s, 0.05, most=7) == ticks


@pytest.mark.parametrize("options", [{"replan_after": 5}, {"ahead_ticks": 4}, {"replan_after": 2, "ahead_ticks": 2}])
def test_more_than_a_chunk_holds_is_refused(options):
    with pytest.raises(ValueError, match="must be in"):
        Chunks(chunk_length=4, **options)


@pytest.mark.parametrize("overlap", ["in_order", "latest", "blend"])
def test_what_was_seen_before_somebody_else_moved_the_arm_is_answered_but_not_followed(overlap):
    chunks = Chunks(chunk_length=4, ahead_ticks=3, overlap=overlap)
    chunks.looked(100)
    chunks.adopt(answer(0, 100))
    follow(chunks, 1)
    chunks.looked(200)
    chunks.taken_over()
    chunks.looked(300)  # the same decision asked again
    chunks.adopt(answer(1, 200))
    assert chunks.next() is None and chunks.wants_observation
    assert chunks.since_decision == (1, 1)
    chunks.looked(400)
    chunks.adopt(answer(2, 400))
    assert follow(chunks, 5) == [20, 21, 22, 23, None]
