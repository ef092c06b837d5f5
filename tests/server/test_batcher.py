"""The queue between network and model, without either."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest, Ticket
from policy_server.engine import Engine
from policy_server.errors import InternalFault, NoNumber, Overloaded, Superseded


def batcher(*, max_batch: int = 4, max_wait_ms: float = 1000, capacity: int = 8, episodes: int = 4) -> Batcher:
    """Odd versions share passes; an even one shares none."""
    return Batcher(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        capacity=capacity,
        expected=lambda: episodes,
        together=lambda versions: all(version % 2 for version in versions),
    )


def answer(logprob: float = -0.5) -> DecodeAnswer:
    return DecodeAnswer(
        actions_KA=np.zeros((1, 2), np.float32),
        token_ids_N=np.zeros(2, np.int32),
        token_logprobs_N=np.full(2, logprob, np.float32),
        vision_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


def put(queue: Batcher, *, version: int = 0, seed: int = 0) -> Ticket:
    ticket = queue.admit()
    queue.submit(ticket, DecodeRequest(prepared=None, version=version, temperature=0, seed=seed, decision=0))
    return ticket


def wait_s(queue: Batcher) -> float:
    began = time.monotonic()
    assert queue.next_batch()
    return time.monotonic() - began


def test_one_robot_alone_does_not_wait():
    queue = batcher(episodes=1)
    put(queue)
    assert wait_s(queue) < 0.5


def test_a_batch_goes_as_soon_as_every_episode_at_work_has_asked():
    queue = batcher(max_batch=8, episodes=3)
    threading.Timer(0.1, lambda: [put(queue), put(queue)]).start()
    put(queue)
    assert len(queue.next_batch()) == 3


def test_a_request_waits_for_others_at_most_max_wait():
    queue = batcher(max_wait_ms=100, episodes=4)
    put(queue)
    assert 0.08 < wait_s(queue) < 0.5


def test_a_full_batch_does_not_wait():
    queue = batcher(max_batch=2, episodes=100)
    put(queue), put(queue), put(queue)
    assert len(queue.next_batch()) == 2


def test_versions_that_can_share_a_pass_do_and_the_oldest_request_leads():
    queue = batcher(episodes=6)
    tickets = [put(queue, version=version) for version in (3, 2, 5, 4, 3, 1)]
    assert queue.next_batch() == [tickets[0], tickets[2], tickets[4], tickets[5]]
    assert [queue.next_batch(), queue.next_batch()] == [[tickets[1]], [tickets[3]]]


def test_a_batch_of_versions_that_share_nothing_holds_one_and_the_oldest_request():
    queue = batcher(episodes=4)
    versions = [6, 8, 6, 8]
    tickets = [put(queue, version=version) for version in versions]
    assert queue.next_batch() == [tickets[0], tickets[2]]
    queue.stop()
    assert queue.next_batch() == [tickets[1], tickets[3]]


def test_a_full_queue_refuses_at_once_with_a_hint():
    queue = batcher(capacity=2)
    put(queue)
    queue.admit()  # being prepared counts
    with pytest.raises(Overloaded, match="2 requests wait, at most 2 may") as refused:
        queue.admit()
    assert refused.value.retry_after_ms > 0


def test_every_way_out_of_the_queue_frees_its_place():
    queue = batcher(capacity=1, episodes=1)
    for _ in range(3):
        queue.withdraw(queue.admit(), Superseded("x"))
        queue.withdraw(put(queue), Superseded("x"))
        put(queue)
        queue.next_batch()
    queue.admit()


def test_a_withdrawn_request_never_reaches_the_model():
    queue = batcher(episodes=1)
    gone, kept, unprepared = put(queue, seed=1), put(queue, seed=2), queue.admit()
    assert queue.withdraw(gone, Superseded("newer"))
    assert queue.withdraw(unprepared, Superseded("newer"))
    queue.submit(unprepared, DecodeRequest(prepared=None, version=0, temperature=0, seed=3, decision=0))
    assert queue.next_batch() == [kept]
    for ticket in (gone, unprepared):
        with pytest.raises(Superseded, match="newer"):
            ticket.answer.result(0)


def test_a_request_in_the_model_cannot_be_withdrawn():
    queue = batcher(episodes=1)
    ticket = put(queue)
    queue.next_batch()
    assert not queue.withdraw(ticket, Superseded("newer"))
    assert not ticket.answer.done()


def test_who_gives_up_waiting_takes_no_answer_from_the_model():
    queue = batcher(episodes=2)
    tickets = [put(queue), put(queue)]
    batch = queue.next_batch()
    assert not tickets[0].answer.cancel()
    queue.resolve(batch, [answer(), answer()], started_s=time.monotonic())
    assert all(ticket.answer.result(0) for ticket in tickets)


def test_an_answer_that_is_no_number_is_refused_and_its_neighbours_is_not():
    queue = batcher(episodes=2)
    tickets = [put(queue, version=1), put(queue, version=3)]
    queue.resolve(queue.next_batch(), [answer(float("nan")), answer()], started_s=time.monotonic())
    with pytest.raises(NoNumber, match="version 1 does not compute"):
        tickets[0].answer.result(0)
    assert tickets[1].answer.result(0).version == 3


def test_a_pass_with_too_few_answers_refuses_all_and_the_engine_goes_on():
    queue = batcher(episodes=1)
    engine = Engine(queue, lambda requests, lane: [answer()] * requests[0].seed, lanes=1, observe=lambda *_: None)
    engine.start()
    with pytest.raises(InternalFault):
        put(queue, seed=0).answer.result(10)
    assert put(queue, seed=1).answer.result(10)
    queue.stop()
    engine.join()


def test_after_stop_what_is_queued_is_still_served_and_then_nothing():
    queue = batcher()
    put(queue)
    queue.stop()
    assert len(queue.next_batch()) == 1
    assert queue.next_batch() == []
