"""Which process of a run computes and renders where: a pure plan, shown before the run.

The learner gets the first device that CUDA_VISIBLE_DEVICES leaves, the server the second; workers render on all but
the learner's.  A child is told its device by UUID, which means the same in CUDA's order and in nvidia-smi's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from rl_trainer.devices import Gpu, Machine, Mig

WORKERS_SHARE = 0.5
"""Part of the machine's memory that simulator workers may fill together."""
SCENE_GB = 0.6
"""GiB that a worker makes room for before it builds a scene."""
SOFTWARE = "osmesa"
CUDA = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one process can compute on: a GPU, or a part of a divided one."""

    gpu: Gpu
    mig: Mig | None = None

    @property
    def uuid(self) -> str:
        """What CUDA_VISIBLE_DEVICES calls it."""
        return self.mig.uuid if self.mig else self.gpu.uuid

    @property
    def memory_gb(self) -> float:
        """GiB; of a part, what its profile says: 3g.40gb has 40."""
        part = re.search(r"(\d+)gb", self.mig.profile) if self.mig else None
        return float(part[1]) if part else self.gpu.memory_gb

    def __str__(self) -> str:
        if self.mig:
            return f"GPU {self.gpu.index}, {self.mig.profile} {self.mig.uuid}"
        return f"GPU {self.gpu.index}, {self.gpu.memory_gb:.0f} GiB"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process runs."""

    process: str
    """learner, server, worker 0, worker 1, ..."""
    device: str
    """in words"""
    environment: Mapping[str, str]
    """what the process must be started with, over the caller's own environment"""
    memory_gb: float | None = None
    """GiB of the device it computes on; None: it computes in the machine's own"""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where all processes of a run go on one host."""

    learner: Place
    server: Place
    workers: tuple[Place, ...]
    scenes: int
    """that each worker may hold"""
    worker_gb: float
    """GiB that each worker may fill"""
    notes: tuple[str, ...]
    """what is not as one would wish"""

    @property
    def groups(self) -> list[tuple[Mapping[str, str], int]]:
        """Environments of workers, and how many workers share each: one command starts a group."""
        kinds = Counter(tuple(place.environment.items()) for place in self.workers)
        return [(dict(kind), count) for kind, count in kinds.items()]

    def table(self) -> str:
        """The plan for people."""
        rows = [
            (place.process, place.device, " ".join(f"{name}={value}" for name, value in place.environment.items()))
            for place in (self.learner, self.server, *self.workers)
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {device:<{widths[1]}}  {env}".rstrip() for name, device, env in rows]
        lines.append(f"each worker: up to {self.scenes} scenes in {self.worker_gb:.1f} GiB")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan(
    machine: Machine,
    *,
    processes: int,
    scene_gb: float = SCENE_GB,
    visible: str | None = None,
    mujoco_gl: str = "",
    render_on_learner: bool = False,
    learner_on_cpu: bool = False,
) -> Placement:
    """Where learner, server and so many workers go.  Raises ValueError when memory does not hold one scene.

    visible: CUDA_VISIBLE_DEVICES; None where it is not set.  mujoco_gl: MUJOCO_GL where the caller chose a renderer.
    learner_on_cpu: it takes no device, and the server gets the first.
    """
    devices = visible_devices(machine.gpus, visible)
    learner = devices[0] if devices and not learner_on_cpu else None
    server = devices[min(int(learner is not None), len(devices) - 1)] if devices else None
    notes = _notes(machine, visible, devices, learner)
    screens = _screens(machine, devices, learner, server, render_on_learner)
    if mujoco_gl not in ("", "egl"):
        screens = []
    elif devices and not screens and not mujoco_gl:
        notes.append("no visible GPU can render through EGL: workers render in software")
    elif screens and learner and not render_on_learner and screens[0][0] == learner.gpu:
        notes.append(f"workers render on the learner's GPU {learner.gpu.index}: no other visible GPU can")
    held, scenes = _scenes(machine.memory_gb, processes, scene_gb)
    if held < processes:
        notes.append(f"memory holds {held} scenes of {scene_gb:g} GiB: {held} workers, not {processes}")
    renderer = mujoco_gl or ("egl" if screens else SOFTWARE)
    return Placement(
        learner=_computing("learner", learner, visible),
        server=_computing("server", server, visible),
        workers=tuple(
            _rendering(f"worker {number}", renderer, screen)
            for number, screen in zip(range(held), cycle(screens or [None]), strict=False)
        ),
        scenes=scenes,
        worker_gb=WORKERS_SHARE * machine.memory_gb / held,
        notes=tuple(notes),
    )


def visible_devices(gpus: Sequence[Gpu], visible: str | None) -> list[Device]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order.

    CUDA's rules: all entries are of the first one's kind (index, GPU-..., MIG-...; a UUID may be cut short), one that
    names nothing or several ends the list, a repeated one empties it.

    An index or a GPU's UUID means the first part of a divided GPU.  Unlike CUDA in one process, several parts may be
    listed, and unset means them all: each process of a run gets one.
    """
    if visible is None:
        return [device for gpu in gpus for device in _parts(gpu)]
    chosen: list[Device] = []
    entries = [entry.strip() for entry in visible.split(",")]
    for entry in entries:
        device = _named(gpus, entry) if _kind(entry) == _kind(entries[0]) else None
        if device is None:
            break
        if device in chosen:
            return []
        chosen.append(device)
    return chosen


def _kind(entry: str) -> str:
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else "index"


def _named(gpus: Sequence[Gpu], entry: str) -> Device | None:
    """The one device that the entry names, if there is just one."""
    if _kind(entry) == "MIG-":
        found = [device for gpu in gpus for device in _parts(gpu) if device.mig and device.uuid.startswith(entry)]
    elif _kind(entry) == "GPU-":
        found = [_parts(gpu)[0] for gpu in gpus if gpu.uuid.startswith(entry)]
    else:
        number = re.match(r"\d+", entry)  # as strtoul reads it: "1gpu" is 1
        found = [_parts(gpu)[0] for gpu in gpus if number and gpu.index == int(number[0])]
    return found[0] if len(found) == 1 else None


def _parts(gpu: Gpu) -> list[Device]:
    return [Device(gpu=gpu, mig=mig) for mig in gpu.mig] or [Device(gpu=gpu)]


def _screens(
    machine: Machine,
    devices: Sequence[Device],
    learner: Device | None,
    server: Device | None,
    render_on_learner: bool,
) -> list[tuple[Gpu, int]]:
    """GPUs to render on, with EGL's index of each, the server's last; the learner's if told, or if it is the only one.

    A divided GPU draws nothing.
    """
    index_at = {egl.pci: egl.index for egl in machine.egl}
    gpus = [device.gpu for device in devices if device.mig is None and device.gpu.pci in index_at]
    learns, serves = (device and device.gpu for device in (learner, server))
    others = sorted((gpu for gpu in gpus if gpu != learns), key=lambda gpu: gpu == serves)
    if learns in gpus and (render_on_learner or not others):
        others.append(learns)
    return [(gpu, index_at[gpu.pci]) for gpu in others]


def _notes(machine: Machine, visible: str | None, devices: Sequence[Device], learner: Device | None) -> list[str]:
    """What the devices themselves leave to be wished."""
    if not machine.gpus:
        return ["no GPU was found: everything runs on the CPU"]
    if not devices:
        return [f"CUDA_VISIBLE_DEVICES={visible!r} leaves none of {len(machine.gpus)} GPUs: everything runs on the CPU"]
    notes = [f"learner and server share {learner}: --server-sleeps makes room"] if learner and len(devices) == 1 else []
    by_index = visible is not None and _kind(visible.strip()) == "index"
    if by_index and len({gpu.memory_gb for gpu in machine.gpus}) > 1:
        notes.append("the GPUs differ, and CUDA_VISIBLE_DEVICES is read in nvidia-smi's order: a UUID is unmistakable")
    return notes


def _scenes(memory_gb: float, processes: int, scene_gb: float) -> tuple[int, int]:
    """How many workers memory allows, and how many scenes in each."""
    scenes = int(WORKERS_SHARE * memory_gb / scene_gb)
    if processes < 1 or scenes < 1:
        raise ValueError(
            f"a worker needs memory for one scene, {scene_gb:g} GiB: {processes} workers may fill"
            f" {WORKERS_SHARE * memory_gb:.2g} GiB of this machine's"
        )
    held = min(processes, scenes)
    return held, scenes // held


def _computing(process: str, device: Device | None, visible: str | None) -> Place:
    """Without a device the caller's environment stands: there is nothing to hide."""
    if device is None:
        return Place(process=process, device="CPU", environment={} if visible is None else {CUDA: visible})
    environment = {CUDA: device.uuid}
    return Place(process=process, device=str(device), environment=environment, memory_gb=device.memory_gb)


def _rendering(process: str, renderer: str, screen: tuple[Gpu, int] | None) -> Place:
    """CUDA's list is empty: a worker needs none, and robosuite refuses an EGL index that a longer list lacks."""
    environment = {CUDA: "", "MUJOCO_GL": renderer}
    if screen is None:
        return Place(process=process, device=renderer, environment=environment)
    gpu, index = screen
    environment["MUJOCO_EGL_DEVICE_ID"] = str(index)
    return Place(process=process, device=f"GPU {gpu.index}, EGL {index}", environment=environment)
