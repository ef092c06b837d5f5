"""Workers die, hang, raise and retire: the pool replaces them and every job still ends exactly once."""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sim.job_queue import Finished, Job
from sim.pool import Answer, Deadlines, Pool, PoolError, Progress, Retire, Runner

QUICK = Deadlines(start=60.0, build=2.0, step=1.0)


def _kill(signal_number: int) -> None:
    os.kill(os.getpid(), signal_number)


def _raise() -> None:
    raise RuntimeError("a bug in the simulator")


FATES: dict[str, Callable[[], None]] = {
    "fine": lambda: None,
    "die": functools.partial(_kill, signal.SIGKILL),
    "crash": functools.partial(_kill, signal.SIGSEGV),
    "stop": functools.partial(_kill, signal.SIGSTOP),
    "hang": functools.partial(time.sleep, 3600),
    "raise": _raise,
}


def make_runner(folder: Path, slots: int = 3) -> Runner:
    """A runner that interleaves `slots` jobs.  A payload (fate, times) meets its fate that often, then ends well."""
    return functools.partial(_run, folder, slots)


def _run(folder: Path, slots: int, jobs: Iterator[Job], progress: Progress) -> Iterator[Answer]:
    under_way: list[Job] = []
    exhausted = False
    while not exhausted or under_way:
        while not exhausted and len(under_way) < slots:
            job = next(jobs, None)
            exhausted = job is None
            if job is not None:
                under_way.append(job)
        if not under_way:
            return
        progress("step")
        job = under_way.pop(0)
        fate, times = job.payload
        marks = folder / job.key.replace("/", "-")
        met = marks.read_text() if marks.exists() else ""
        marks.write_text(met + "x")
        if len(met) < times and fate == "retire":
            assert not under_way
            raise Retire("memory has grown")
        if len(met) < times and fate == "refuse":
            yield Answer(key=job.key, error="refused")
            continue
        if len(met) < times:
            FATES[fate]()
        yield Answer(key=job.key, value=(job.key, os.getpid()))


def plan(bad: dict[int, tuple[str, int]], n: int = 9) -> list[Job]:
    return [Job(key=f"task{i % 2}/{i}", group=f"task{i % 2}", payload=bad.get(i, ("fine", 0))) for i in range(n)]


def run(folder: Path, jobs: list[Job], **options) -> tuple[dict[str, Finished], Pool]:
    with Pool(functools.partial(make_runner, folder), processes=2, deadlines=QUICK, **options) as pool:
        ended = list(pool.run(jobs))
    assert Counter(item.job.key for item in ended) == Counter(job.key for job in jobs)
    for item in ended:
        assert (item.value is None) == (item.error is not None)
        assert item.value is None or item.value[0] == item.job.key
    return {item.job.key: item for item in ended}, pool


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_jobs_of_all_groups_end_once(tmp_path):
    ended, pool = run(tmp_path, plan({}))
    assert all(item.error is None and item.attempts == 1 for item in ended.values())
    assert pool.losses == []


@pytest.mark.parametrize(
    ("fate", "why"), [("die", "SIGKILL"), ("crash", "SIGSEGV"), ("raise", "a bug in the simulator")]
)
def test_a_worker_that_dies_is_replaced_and_its_jobs_are_done_again(tmp_path, fate, why):
    ended, pool = run(tmp_path, plan({3: (fate, 1)}))
    assert all(item.error is None for item in ended.values())
    (loss,) = pool.losses
    assert why in loss.why and "task1/3" in loss.jobs
    assert not alive(loss.pid)


@pytest.mark.parametrize("fate", ["hang", "stop"])
def test_a_worker_that_stands_still_is_killed_after_its_deadline(tmp_path, fate):
    ended, pool = run(tmp_path, plan({4: (fate, 1)}))
    assert all(item.error is None for item in ended.values())
    (loss,) = pool.losses
    assert "no progress" in loss.why
    assert not alive(loss.pid)


def test_a_job_that_always_kills_its_worker_is_one_error_said_loudly(tmp_path, caplog):
    with caplog.at_level(logging.ERROR, "sim.pool"):
        ended, pool = run(tmp_path, plan({2: ("die", 99)}))
    assert [key for key, item in ended.items() if item.error] == ["task0/2"]
    assert "SIGKILL" in ended["task0/2"].error and ended["task0/2"].attempts == 3
    assert len(pool.losses) == 3
    assert any("ERROR task0/2" in record.message for record in caplog.records)


def test_a_refused_job_is_tried_again_without_losing_the_worker(tmp_path):
    ended, pool = run(tmp_path, plan({1: ("refuse", 1), 5: ("refuse", 99)}))
    assert [key for key, item in ended.items() if item.error] == ["task1/5"]
    assert pool.losses == []


def test_a_group_that_kills_every_worker_is_quarantined(tmp_path):
    jobs = plan({i: ("die", 99) for i in range(0, 40, 2)}, n=40)
    ended, pool = run(tmp_path, jobs)
    assert pool.quarantined == ["task0"]
    assert {item.job.group for item in ended.values() if item.error} == {"task0"}
    assert sum(item.error is None for item in ended.values()) == 20


def test_a_worker_that_retires_is_replaced_without_blame(tmp_path):
    jobs = [Job(key="task0/0", group="task0", payload=("retire", 1))]
    ended, pool = run(tmp_path, jobs)
    assert ended["task0/0"].error is None
    assert pool.losses == []


def test_a_pool_runs_several_lists_with_the_same_workers(tmp_path):
    with Pool(functools.partial(make_runner, tmp_path), processes=1, deadlines=QUICK) as pool:
        pids = pool.pids
        for _ in range(2):
            assert {item.value[1] for item in pool.run(plan({}))} == set(pids)
    assert not any(alive(pid) for pid in pids)


def test_a_run_that_is_left_early_leaves_no_process(tmp_path):
    pool = Pool(functools.partial(make_runner, tmp_path), processes=2, deadlines=QUICK)
    pids = pool.pids
    results = pool.run(plan({}))
    next(results)
    results.close()
    assert not any(alive(pid) for pid in pids)


def _cannot_start() -> Runner:
    raise ImportError("no module named libero")


def test_workers_that_cannot_start_stop_the_pool_with_their_reason():
    with Pool(_cannot_start, processes=2) as pool, pytest.raises(PoolError, match="no module named libero"):
        list(pool.run(plan({})))


def test_the_environment_reaches_the_children_only(tmp_path):
    with Pool(_answer_environment, processes=1, env={"VLA_RL_TEST": "7"}) as pool:
        (ended,) = pool.run([Job(key="a", group="a", payload=None)])
    assert ended.value == "7"
    assert "VLA_RL_TEST" not in os.environ


def _answer_environment() -> Runner:
    return lambda jobs, progress: (Answer(key=job.key, value=os.environ.get("VLA_RL_TEST")) for job in jobs)


ORPHANED = """
import functools, sys, time
from pathlib import Path
from sim.pool import Pool
from tests.sim.test_pool import make_runner, plan
with Pool(functools.partial(make_runner, Path(sys.argv[1])), processes=2) as pool:
    print(*pool.pids, flush=True)
    list(pool.run(plan({number: ("hang", 1) for number in range(9)})))
"""


def test_workers_end_with_a_parent_that_is_killed_whatever_they_wait_for(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    give_up_at = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < give_up_at:
        time.sleep(0.05)  # until both hang in a job
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    parent.kill()
    parent.wait(10)
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left
