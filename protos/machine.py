"""What there is of the machine for all our processes on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""Of a group's controllers, as /proc/self/cgroup has them (of version 2 it has none), the file with their limit."""


def memory_gb() -> float:
    """What the machine has or, where that is less, what this process's container or job may use, GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *memory_limits()]) / 2**30


def memory_limits(own: Path = OWN_CGROUPS, groups: Path = CGROUPS) -> Iterator[int]:
    """Bytes that each control group around this process allows; none where there is no limit.

    own: a line `ID:CONTROLLERS:PATH` for each hierarchy.  groups: where they are mounted; in a container, whose mount
    begins at its own group, PATH may not be there, and the outermost group is the container's.
    """
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if (limit := LIMITS.get(controllers)) is None:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for around in (group, *group.parents):
            file = groups / controllers / around / limit
            if file.is_file() and (said := file.read_text().strip()) != "max":
                yield int(said)


def cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
