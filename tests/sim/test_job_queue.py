"""The queue's law: every job ends exactly once, and one bad job takes no neighbour with it."""

from __future__ import annotations

import random

import pytest

from sim.job_queue import Job, JobQueue


def jobs(**groups: int) -> list[Job]:
    return [Job(key=f"{group}{i}", group=group, payload=None) for group, n in groups.items() for i in range(n)]


def drain(queue: JobQueue, worker: int, group: str | None = None) -> list[str]:
    keys = []
    while job := queue.take(worker, group):
        keys.append(job.key)
        group = job.group
    return keys


def test_every_job_ends_exactly_once_whatever_workers_do():
    for seed in range(200):
        chance = random.Random(seed)
        queue, ended, names = JobQueue(jobs(a=7, b=3, c=5), attempts=2), [], [0, 1]
        while queue.unfinished:
            slot = chance.randrange(2)
            worker, held = names[slot], queue.held(names[slot])
            fate = chance.random()
            if fate < 0.1:
                ended += queue.lose(worker, "killed")
                names[slot] = max(names) + 1
            elif fate < 0.2 and held:
                ended += queue.fail(worker, chance.choice(held), "refused")
            elif fate < 0.6 and held:
                ended.append(queue.finish(worker, chance.choice(held), None))
            else:
                queue.take(worker, queue._group.get(worker) if held else None)
        assert sorted(item.job.key for item in ended) == sorted(job.key for job in jobs(a=7, b=3, c=5)), seed


def test_a_worker_is_given_one_group_at_a_time_the_largest_free_one_first():
    queue = JobQueue(jobs(b=3, a=1, c=6))
    assert queue.take(0).group == "c"
    assert queue.take(1).group == "b"
    assert drain(queue, 0, "c") == [f"c{i}" for i in range(1, 6)]


def test_a_second_worker_joins_a_group_only_while_enough_of_it_waits():
    queue = JobQueue(jobs(a=6), worth_joining=4)
    assert queue.take(0).key == "a0"
    assert queue.take(1).key == "a1"
    assert queue.take(2).key == "a2"
    assert queue.take(3) is None


def test_suspects_are_tried_again_alone():
    queue = JobQueue(jobs(a=3))
    assert drain(queue, 0) == ["a0", "a1", "a2"]
    assert queue.lose(0, "killed") == []
    for key in ("a0", "a1", "a2"):
        assert drain(queue, 1) == [key]
        assert queue.finish(1, key, None).attempts == 2


def test_nothing_is_handed_out_beside_a_suspect():
    queue = JobQueue(jobs(a=6))
    held = [queue.take(0).key, queue.take(0, "a").key]
    beside = queue.take(1)
    queue.lose(0, "killed")
    assert queue.take(2).key in held
    assert queue.take(2, "a") is None  # a2.. wait, and so does the other suspect
    assert queue.take(1, "a").key not in (*held, beside.key)  # whoever holds a fresh job gets a fresh one


def test_failures_with_successes_between_them_do_not_quarantine():
    queue = JobQueue(jobs(a=20), attempts=3)
    for worker in range(20):
        job = queue.take(worker)
        queue.lose(worker, "killed")
        assert queue.take(worker + 100).key == job.key
        queue.finish(worker + 100, job.key, None)
    assert queue.quarantined == [] and queue.unfinished == 0


def test_a_job_that_kills_its_worker_ends_as_an_error_and_its_neighbours_do_not():
    queue, ended = JobQueue(jobs(a=5), attempts=3), []
    for worker in range(100):
        while not any(key == "a2" for key in queue.held(worker)) and (job := queue.take(worker)):
            if job.key != "a2" and len(queue.held(worker)) == 1 and worker:
                ended.append(queue.finish(worker, job.key, "fine"))
        ended += queue.lose(worker, "killed") if queue.held(worker) else []
    assert {item.job.key: item.error for item in ended} == {
        "a2": "killed",
        "a0": None,
        "a1": None,
        "a3": None,
        "a4": None,
    }
    assert queue.quarantined == []


def test_a_group_that_only_fails_is_quarantined_and_the_others_go_on():
    queue, ended, worker = JobQueue(jobs(bad=50, good=2), attempts=3), [], 0
    while queue.unfinished:
        job = queue.take(worker)
        if job.group == "good":
            ended.append(queue.finish(worker, job.key, "fine"))
        else:
            ended += queue.lose(worker, "cannot be built")
            worker += 1
    assert worker == 4
    assert queue.quarantined == ["bad"]
    assert sum(item.error is not None for item in ended) == 50
    assert sum("quarantined" in (item.error or "") for item in ended) == 49  # one had its three attempts before


def test_a_job_is_only_returned_by_the_worker_that_holds_it():
    queue = JobQueue(jobs(a=1))
    queue.take(0)
    with pytest.raises(KeyError, match="worker 1"):
        queue.finish(1, "a0", None)


def test_keys_are_unique():
    with pytest.raises(ValueError, match="unique"):
        JobQueue(jobs(a=1) + jobs(a=1))
