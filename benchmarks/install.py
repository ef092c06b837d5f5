"""What the robot's client weighs, how long it takes to start, and on which Pythons it and each robot extra install.

    python -m benchmarks.install [--pythons python3.10 /path/to/python3.12]

A wheel of this tree is installed into a new environment for each Python and extra, and run there: the command line, or
with an extra the module that it is for.  There is no device: that this module loads its vendor's SDK is all that "runs"
means.  Prints tables, writes benchmarks/results/install.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackagePath, distributions
from itertools import islice
from pathlib import Path

import tyro

REPOSITORY = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "install.json"
BASE = "base"
RUNS = {
    BASE: ("-m", "robot_client", "spec", "--help"),
    "franka": ("-c", "import robot_client.arms.franka"),
    "openpi": ("-c", "import robot_client.openpi"),
    "realsense": ("-c", "import robot_client.cameras.realsense"),
    "so100": ("-c", "import robot_client.arms.so100"),
    "ur": ("-c", "import robot_client.arms.ur"),
    "uvc": ("-c", "import robot_client.cameras.uvc"),
    "xarm": ("-c", "import robot_client.arms.xarm"),
    "export": ("-c", "import robot_client.lerobot.writer"),
}
"""Extra -> what must run once it is installed."""
STARTS = {
    "python -c pass": ("-c", "pass"),
    "import robot_client.client": ("-c", "import robot_client.client"),
    "import robot_client.__main__": ("-c", "import robot_client.__main__"),
    "python -m robot_client --help": ("-m", "robot_client", "--help"),
}
"""What is started, to see how long it takes."""
PROFILED = "import robot_client.__main__"
IMPORTED = re.compile(r"import time: +(\d+) \| +\d+ \| +(\w+)")
"""A line of `python -X importtime`: a module's own microseconds, and its top-level package."""
SHOWN = 8
"""So many packages are printed, the largest and the slowest."""


@dataclass(frozen=True, kw_only=True)
class InstallConfig:
    """Measure the installation of the robot's client."""

    pythons: tuple[str, ...] = ("python3.10", "python3.11", "python3.12", "python3.13")
    """Interpreters, by name or path; one that does not run here is said to be missing."""
    extras: tuple[str, ...] = tuple(RUNS)
    """What to install on each; the first is no extra."""
    starts: int = 9
    """How often each command is started, in turns."""


@dataclass(kw_only=True)
class Cell:
    """What came of one environment."""

    installs: bool = False
    runs: bool = False
    complaint: str = ""
    """The last words of what failed."""
    sizes_mb: dict[str, float] = field(default_factory=dict)
    """By distribution, as they lie on disk, compiled modules included."""

    def __str__(self) -> str:
        size = f"{sum(self.sizes_mb.values()):.0f} MB"
        return f"{size}, runs" if self.runs else f"{size}, fails" if self.installs else "no"


Matrix = Mapping[str, Mapping[str, Cell]]
"""Python's version -> extra -> what came of it."""


def main(config: InstallConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(REPOSITORY))
        (wheel,) = Path(folder).glob("*.whl")
        matrix = {
            version: {extra: try_out(python, wheel, extra) for extra in config.extras}
            for version, python in found(config.pythons).items()
        }
        starts = measure_starts(wheel, config.starts)
    print_matrix(matrix)
    print_starts(starts)
    figures = {version: {extra: asdict(cell) for extra, cell in row.items()} for version, row in matrix.items()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"matrix": figures, "starts": starts}, indent=1) + "\n")


def run(python: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Raises CalledProcessError.  Not in the repository, whose packages would hide the installed ones."""
    return subprocess.run([python, *arguments], check=True, capture_output=True, text=True, cwd="/")


def found(pythons: tuple[str, ...]) -> dict[str, str]:
    """Version -> interpreter."""
    versions: dict[str, str] = {}
    for python in pythons:
        try:
            versions[version_of(python)] = python
        except (OSError, subprocess.CalledProcessError):
            print(f"{python} does not run here")
    return versions


def version_of(python: str | Path) -> str:
    return run(python, "-c", "import platform; print(platform.python_version())").stdout.strip()


@contextlib.contextmanager
def environment(python: str) -> Iterator[Path]:
    """The interpreter of a new virtual environment, in which there is nothing, not even pip."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", "--without-pip", folder)
        yield Path(folder) / "bin" / "python"


def install(there: Path, wheel: Path, extra: str = BASE) -> None:
    what = str(wheel) if extra == BASE else f"{wheel}[{extra}]"
    run(sys.executable, "-m", "pip", "--python", str(there), "install", "--quiet", what)


def try_out(python: str, wheel: Path, extra: str) -> Cell:
    """Installs the wheel with the extra, and runs what the extra is for."""
    cell = Cell()
    with environment(python) as there:
        try:
            install(there, wheel, extra)
            cell.installs, cell.sizes_mb = True, sizes_mb(there)
            run(there, *RUNS[extra])
            cell.runs = True
        except subprocess.CalledProcessError as error:
            cell.complaint = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
    print(f"{version_of(python)}, {extra}: {cell} {cell.complaint}", flush=True)
    return cell


def sizes_mb(there: Path) -> dict[str, float]:
    """Distribution -> MB (1e6 bytes) on disk, the largest first."""
    (site,) = there.parents[1].glob("lib/python3.*/site-packages")
    sizes = {
        distribution.name: sum(map(bytes_on_disk, distribution.files or ()))
        for distribution in distributions(path=[str(site)])
    }
    return {name: round(size / 1e6, 2) for name, size in sorted(sizes.items(), key=lambda item: -item[1])}


def bytes_on_disk(file: PackagePath) -> int:
    path = Path(str(file.locate()))
    return path.stat().st_blocks * 512 if path.exists() else 0  # some packages list files that they do not bring


def measure_starts(wheel: Path, times: int) -> dict:
    """Of the base client, on the Python that runs this."""
    with environment(sys.executable) as there:
        install(there, wheel)
        taken_ms: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(times):
            for name, arguments in STARTS.items():
                taken_ms[name].append(start_ms(there, *arguments))
        return {
            "python": version_of(there),
            "median_wall_ms": {
                name: round(statistics.median(ms for ms, _ in taken)) for name, taken in taken_ms.items()
            },
            "median_cpu_ms": {
                name: round(statistics.median(ms for _, ms in taken)) for name, taken in taken_ms.items()
            },
            "import_ms": imports_ms(there, times),
        }


def start_ms(there: Path, *arguments: str) -> tuple[float, float]:
    """Milliseconds that one process took, and that it computed, which others on the machine prolong less."""
    began_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(there, *arguments)
    wall_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * wall_s, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def imports_ms(there: Path, times: int) -> dict[str, float]:
    """Package -> milliseconds that its own modules take when the command line is imported, the slowest first.

    The least of several tries, since others on the machine only ever add.
    """
    tries: list[Counter[str]] = []
    for _ in range(times):
        tries.append(Counter())
        for own_us, package in IMPORTED.findall(run(there, "-X", "importtime", *STARTS[PROFILED]).stderr):
            tries[-1]["standard library" if package in sys.stdlib_module_names else package] += int(own_us)
    least_us = {package: min(spent_us[package] for spent_us in tries) for package in tries[0]}
    return {package: round(us / 1e3, 1) for package, us in sorted(least_us.items(), key=lambda item: -item[1])}


def print_matrix(matrix: Matrix) -> None:
    extras = next(iter(matrix.values()), {})
    print(f"| | {' | '.join(matrix)} |\n{'|---' * (1 + len(matrix))}|")
    for extra in extras:
        print(f"| {extra} | {' | '.join(str(row[extra]) for row in matrix.values())} |")
    for version, row in matrix.items():
        print(f"  the largest of {BASE} on {version}: {largest(row[BASE].sizes_mb)}")


def print_starts(starts: dict) -> None:
    print(f"Python {starts['python']}, medians: ms, ms of CPU")
    for name in STARTS:
        print(f"  {name:<32}{starts['median_wall_ms'][name]:>6}{starts['median_cpu_ms'][name]:>6}")
    print(f"  ms of imports: {largest(starts['import_ms'])}")


def largest(amounts: Mapping[str, float]) -> str:
    """The first few, which are the largest."""
    return ", ".join(f"{name} {amount:.1f}" for name, amount in islice(amounts.items(), SHOWN))


if __name__ == "__main__":
    main(tyro.cli(InstallConfig, description=__doc__))
