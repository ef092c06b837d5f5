"""The queue's law: every rollout counts once or is set aside, whatever becomes of leases, workers and episodes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from policy_server.rollout_queue import ATTEMPTS, HEARD_S, Lease, RolloutQueue
from tests.server.messages import rollout

ALL = ("fake/*",)
LEASE_S = 10.0


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock) -> RolloutQueue:
    return RolloutQueue(lease_s=LEASE_S, now=clock)


def lease(queue: RolloutQueue, worker: str = "w", can_run=ALL, **wish) -> Lease:
    lease = queue.lease(worker, can_run, **wish)
    assert lease is not None
    return lease


def finish(queue: RolloutQueue, lease: Lease) -> None:
    assert queue.claim(lease)
    queue.complete(lease)


def counts(queue: RolloutQueue, run: str = "") -> tuple[int, int, int, int]:
    status = queue.status(run)
    return status.waiting, status.leased, status.done, len(status.set_aside)


def enqueue(queue: RolloutQueue, *tasks: str) -> None:
    """Rollouts r/0, r/1, ... of these tasks."""
    assert queue.enqueue(rollout(f"r/{n}", f"fake/{task}") for n, task in enumerate(tasks)) == len(tasks)


def test_every_rollout_counts_once_or_is_set_aside_whatever_happens(clock):
    for seed in range(150):
        chance, queue = random.Random(seed), RolloutQueue(lease_s=LEASE_S, now=clock)
        work = [rollout(f"r/{n}", f"fake/{n % 4}") for n in range(12)]
        counted, errors, leases = Counter[str](), Counter[str](), list[Lease]()
        names = (f"worker {n}" for n in itertools.count())
        workers = [next(names) for _ in range(3)]
        for step in itertools.count():
            calm = step > 300  # from here on nothing goes wrong any more
            if step % 10 == 0:
                queue.enqueue(work)  # a trainer that is not sure what has arrived
            taken = queue.lease(chance.choice(workers), ALL, holds=[f"fake/{chance.randrange(4)}"])
            leases += [taken] if taken is not None else []
            held = [one.rollout.rollout_id for one in leases if queue.find(one.lease_id)]
            assert max(Counter(held).values(), default=0) <= 1, seed
            clock.now_s += 0 if calm else chance.choice([0, 1, LEASE_S])
            if leases:
                one = leases.pop(chance.randrange(len(leases)))  # its lease may be lost by now
                fate = chance.choice(["ends well"] if calm else ["ends well", "error", "full disk", "renews", "dies"])
                if fate == "ends well" and queue.claim(one):
                    queue.complete(one)
                    counted[one.rollout.rollout_id] += 1
                elif fate == "error" or (fate == "full disk" and queue.claim(one)):
                    queue.fail(one, fate)
                    errors[one.rollout.rollout_id] += 1
                elif fate == "renews":
                    queue.renew(one.lease_id)
                    leases.append(one)
                elif fate == "dies":
                    workers[chance.randrange(3)] = next(names)
            if calm:
                clock.now_s += 1
            if counts(queue)[:2] == (0, 0):
                break
        aside = {one.rollout.rollout_id: one.errors for one in queue.status().set_aside}
        assert set(counted) | set(aside) == {one.rollout_id for one in work}, seed
        assert set(counted.values()) <= {1} and not set(counted) & set(aside), seed
        assert all(len(aside[name]) >= ATTEMPTS for name in aside), seed
        assert queue.enqueue(work) == 0, seed


def test_what_is_known_is_not_enqueued_again(queue):
    enqueue(queue, "a", "b", "c", "d")
    finish(queue, lease(queue))
    lease(queue)
    for _ in range(ATTEMPTS):
        queue.fail(lease(queue, can_run=["fake/c"]), "it fell over")
    assert counts(queue) == (1, 1, 1, 1)
    assert queue.enqueue(rollout(f"r/{n}", "fake/other") for n in range(5)) == 1


def test_rollouts_that_were_counted_before_a_restart_are_done(clock):
    queue = RolloutQueue(done=["r/0"], now=clock)
    assert queue.enqueue([rollout("r/0"), rollout("r/1")]) == 1
    assert counts(queue, "r") == (1, 0, 1, 0)


def test_work_goes_out_in_the_order_it_came(queue):
    enqueue(queue, *"aaaa")
    assert [lease(queue).rollout.rollout_id for _ in range(4)] == ["r/0", "r/1", "r/2", "r/3"]
    assert queue.lease("w", ALL) is None


def test_what_comes_back_has_its_old_place(queue, clock):
    enqueue(queue, *"aaa")
    first = lease(queue)
    clock.now_s += 1
    second = lease(queue)
    queue.fail(second, "it fell over")
    clock.now_s += LEASE_S - 1
    assert queue.find(first.lease_id) is None
    assert [lease(queue).rollout.rollout_id for _ in range(3)] == ["r/0", "r/1", "r/2"]


@pytest.mark.parametrize(
    ("can_run", "given"),
    [
        (["other/*"], None),
        (["fake/10"], "fake/10"),
        (["other/*", "fake/*"], "fake/1"),
        (["fake"], None),
        (["fak/*"], None),
        (["*"], None),
    ],
)
def test_no_worker_is_given_what_it_cannot_run(queue, can_run, given):
    enqueue(queue, "1", "10")
    taken = queue.lease("w", can_run)
    assert (taken.rollout.task if taken else None) == given


@pytest.mark.parametrize(("can_run", "fits"), [("bowl", True), ("bowl/*", False), ("bowl*", False), ("/*", False)])
def test_a_task_of_no_suite_is_one_that_is_named(queue, can_run, fits):
    queue.enqueue([rollout("r/0", "bowl")])
    assert (queue.lease("w", [can_run]) is not None) is fits


class Watched(str):
    compared = 0

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Watched.compared += 1
        return super().__eq__(other)


def test_work_is_found_for_a_worker_without_going_through_all_that_it_can_run(queue):
    enqueue(queue, *map(str, range(50)))
    assert queue.lease("w", [*(Watched(f"other/{n}") for n in range(1000)), "fake/*"]) is not None
    assert Watched.compared == 0


def test_a_worker_gets_what_it_holds_before_what_came_earlier(queue):
    enqueue(queue, *"abb")
    assert lease(queue, "w", holds=["fake/b"]).rollout.task == "fake/b"
    assert lease(queue, "v", holds=["fake/c"]).rollout.task == "fake/a"  # what it holds has no work


def test_a_worker_that_wants_only_what_it_holds_gets_nothing_else(queue):
    enqueue(queue, *"ab")
    assert queue.lease("w", ALL, holds=["fake/c"], only_held=True) is None
    assert queue.lease("w", ALL, only_held=True) is None
    assert lease(queue, "w", holds=["fake/b"], only_held=True).rollout.task == "fake/b"


def test_different_workers_go_to_different_tasks(queue):
    enqueue(queue, *"aaaabbc")
    tasks = [lease(queue, worker).rollout.task for worker in ("u", "v", "w", "x")]
    assert tasks == ["fake/a", "fake/b", "fake/c", "fake/a"]


def test_a_task_that_another_worker_holds_is_left_to_it(queue, clock):
    enqueue(queue, "z")
    finish(queue, lease(queue, "u", holds=["fake/a"]))
    queue.enqueue([rollout("s/0", "fake/a"), rollout("s/1", "fake/b")])
    assert lease(queue, "v").rollout.task == "fake/b"
    queue.enqueue([rollout("s/2", "fake/b")])
    clock.now_s += HEARD_S + 1  # u has gone
    assert lease(queue, "w").rollout.task == "fake/a"


def test_a_lease_lasts_from_when_it_was_renewed(queue, clock):
    enqueue(queue, *"ab")
    kept, lost = lease(queue), lease(queue)
    clock.now_s += LEASE_S - 1
    assert queue.renew(kept.lease_id)
    clock.now_s += 1
    assert queue.find(kept.lease_id) is kept and queue.find(lost.lease_id) is None
    assert not queue.renew(lost.lease_id)
    assert counts(queue) == (1, 1, 0, 0)


def test_an_expired_lease_is_no_error(queue, clock):
    enqueue(queue, "a")
    for _ in range(ATTEMPTS + 1):
        lease(queue)
        clock.now_s += LEASE_S
    assert counts(queue) == (1, 0, 0, 0)


def test_the_third_error_sets_a_rollout_aside_with_all_that_went_wrong(queue):
    enqueue(queue, *"ab")
    for why in ("one", "two", "three"):
        queue.fail(lease(queue, can_run=["fake/a"]), why)
    (aside,) = queue.status().set_aside
    assert aside.rollout.rollout_id == "r/0" and list(aside.errors) == ["one", "two", "three"]
    assert lease(queue).rollout.rollout_id == "r/1"


def test_a_late_episode_counts_while_its_rollout_waits(queue, clock):
    enqueue(queue, "a")
    late = lease(queue)
    clock.now_s += LEASE_S
    finish(queue, late)
    assert queue.lease("w", ALL) is None and counts(queue) == (0, 0, 1, 0)


def test_a_late_episode_counts_and_whoever_has_the_rollout_by_then_loses_it(queue, clock):
    enqueue(queue, "a")
    late = lease(queue, "slow")
    clock.now_s += LEASE_S
    other = lease(queue, "other")
    finish(queue, late)
    assert not queue.renew(other.lease_id) and not queue.claim(other)
    assert counts(queue) == (0, 0, 1, 0)


def test_only_one_of_two_episodes_that_end_together_counts(queue, clock):
    enqueue(queue, "a")
    late = lease(queue)
    clock.now_s += LEASE_S
    other = lease(queue)
    assert queue.claim(other) and not queue.claim(late)  # while the other is being written
    queue.complete(other)
    assert not queue.claim(late) and counts(queue) == (0, 0, 1, 0)


def test_an_episode_that_could_not_be_stored_gives_its_rollout_back(queue, clock):
    enqueue(queue, "a")
    full = lease(queue)
    assert queue.claim(full)
    clock.now_s += LEASE_S  # what is being written does not expire
    assert counts(queue) == (0, 1, 0, 0)
    queue.fail(full, "No space left on device")
    finish(queue, lease(queue))
    assert counts(queue) == (0, 0, 1, 0)


def test_a_late_error_counts_as_one_but_takes_nothing_from_who_has_the_rollout_now(queue, clock):
    enqueue(queue, "a")
    late = []
    for _ in range(ATTEMPTS):
        late.append(lease(queue))
        clock.now_s += LEASE_S
    now = lease(queue)
    for one in late:
        queue.fail(one, "its worker died")
    assert queue.find(now.lease_id) is now and counts(queue) == (0, 1, 0, 0)
    clock.now_s += LEASE_S  # and this one too
    assert counts(queue) == (0, 0, 0, 1)


def test_late_errors_set_aside_a_rollout_that_waits(queue, clock):
    enqueue(queue, "a")
    late = []
    for _ in range(ATTEMPTS):
        late.append(lease(queue))
        clock.now_s += LEASE_S
    assert counts(queue) == (1, 0, 0, 0)
    for one in late:
        queue.fail(one, "its worker died")
    assert counts(queue) == (0, 0, 0, 1) and queue.lease("w", ALL) is None


def test_an_error_after_the_rollout_was_counted_is_nobodys(queue, clock):
    enqueue(queue, "a")
    late = lease(queue)
    clock.now_s += LEASE_S
    finish(queue, lease(queue))
    queue.fail(late, "its worker died")
    assert counts(queue) == (0, 0, 1, 0)


def test_a_cancel_takes_back_what_has_not_ended_of_one_run(queue):
    enqueue(queue, *"abcd")
    queue.enqueue([rollout("s/0", "fake/a")])
    finish(queue, lease(queue, can_run=["fake/b"]))
    for _ in range(ATTEMPTS):
        queue.fail(lease(queue, can_run=["fake/c"]), "it fell over")
    under_way = lease(queue, can_run=["fake/d"])
    assert queue.cancel("r") == 2
    assert counts(queue, "r") == (0, 0, 1, 0) and counts(queue, "s") == (1, 0, 0, 0)
    assert not queue.renew(under_way.lease_id)
    queue.fail(under_way, "it fell over")
    assert lease(queue).rollout.rollout_id == "s/0"


def test_an_episode_from_before_a_cancel_does_not_count_for_a_rollout_from_after_it(queue):
    enqueue(queue, "a")
    before = lease(queue)
    queue.cancel("r")
    enqueue(queue, "a")
    assert not queue.claim(before)
    finish(queue, lease(queue))


def test_a_rollout_counts_once_even_across_a_cancel(queue):
    enqueue(queue, *"ab")
    finish(queue, lease(queue))
    closing = lease(queue)
    assert queue.claim(closing)
    assert queue.cancel("r") == 0
    queue.complete(closing)
    assert queue.enqueue([rollout("r/0"), rollout("r/1")]) == 0


def test_a_rollout_whose_episode_was_lost_may_be_enqueued_again(queue):
    enqueue(queue, "a")
    finish(queue, lease(queue))
    queue.uncount("r/0")
    assert queue.enqueue([rollout("r/0")]) == 1


def test_workers_are_counted_for_a_minute_after_they_were_heard_of(queue, clock):
    enqueue(queue, *"aa")
    renewing = lease(queue, "renewing")
    queue.lease("idle", ["other/*"])
    clock.now_s += LEASE_S - 1
    assert queue.renew(renewing.lease_id)
    clock.now_s += HEARD_S - LEASE_S + 2
    assert list(queue.status().workers) == ["renewing"]


def test_of_too_many_workers_the_longest_unheard_is_forgotten(queue, monkeypatch):
    monkeypatch.setattr("policy_server.rollout_queue.MAX_WORKERS", 2)
    enqueue(queue, "a")
    renewing = lease(queue, "renewing")
    queue.lease("idle", ["other/*"])
    queue.renew(renewing.lease_id)
    queue.lease("new", ["other/*"])
    assert list(queue.status().workers) == ["new", "renewing"]
