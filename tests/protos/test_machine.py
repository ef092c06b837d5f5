"""Limits of memory, from files as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protos.machine import cores, memory_gb, memory_limits

UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("own", "files", "limits"),
    [
        # A job of SLURM: the limit is its own group's, or that of one around it.
        (
            "0::/slurm/job_7/step_0\n",
            {"slurm/job_7/memory.max": "1000", "slurm/job_7/step_0/memory.max": "max"},
            [1000],
        ),
        ("0::/a/b\n", {"a/b/memory.max": "500\n", "a/memory.max": "2000\n"}, [500, 2000]),
        # A container sees its own group as the outermost, whatever the path says.
        ("0::/docker/1f\n", {"memory.max": "3000"}, [3000]),
        ("4:memory:/job\n1:cpu:/\n0::/\n", {"memory/job/memory.limit_in_bytes": str(UNLIMITED)}, [UNLIMITED]),
        ("0::/\n", {}, []),
    ],
)
def test_every_group_around_a_process_limits_it(tmp_path: Path, own: str, files: dict[str, str], limits: list) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [*memory_limits(tmp_path / "own", tmp_path)] == limits


def test_where_nothing_says_anything_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert [*memory_limits(tmp_path / "nothing", tmp_path)] == []
    assert 0 < memory_gb() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def test_cores_are_those_that_a_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
