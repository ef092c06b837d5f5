"""Placement: machines that were made up, with the tables they must give written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rl_trainer.devices import EglDevice, Gpu, Machine, Mig, find_machine, parse_gpus, pci_of_drm
from rl_trainer.placement import Device, Placement, plan, visible_devices

PARTS = (
    Mig(uuid="MIG-1a2b-0001", profile="3g.40gb"),
    Mig(uuid="MIG-1a2b-0002", profile="3g.40gb"),
    Mig(uuid="MIG-9f00-0003", profile="1g.10gb"),
)


def gpu(index: int, uuid: str, mig: tuple[Mig, ...] = ()) -> Gpu:
    return Gpu(index=index, uuid=uuid, pci=f"0000:{index:x}0:00.0", memory_gb=80.0, mig=mig)


GPUS = (gpu(0, "GPU-aa00"), gpu(1, "GPU-aa11"), gpu(2, "GPU-bb22"), gpu(3, "GPU-cc33"))
# EGL lists the same four backwards, after a renderer in software.
EGL = (EglDevice(index=0, pci=None), *(EglDevice(index=4 - one.index, pci=one.pci) for one in GPUS))
FOUR = Machine(memory_gb=96.0, gpus=GPUS, egl=EGL)
ONE = Machine(memory_gb=24.0, gpus=GPUS[:1], egl=(EglDevice(index=0, pci=GPUS[0].pci),))
NONE = Machine(memory_gb=24.0, egl=(EglDevice(index=0, pci=None),))
DIVIDED = Machine(memory_gb=96.0, gpus=(gpu(0, "GPU-aa00", PARTS), GPUS[1]), egl=EGL)


def placed(machine: Machine, visible: str | None = None, *, processes: int = 3, **more) -> Placement:
    return plan(machine, visible=visible, processes=processes, scene_gb=0.6, **more)


def screens(placement: Placement) -> list[str | None]:
    """EGL's index of each worker."""
    return [worker.environment.get("MUJOCO_EGL_DEVICE_ID") for worker in placement.workers]


def computing(placement: Placement) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of learner and server."""
    return [place.environment.get("CUDA_VISIBLE_DEVICES") for place in (placement.learner, placement.server)]


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aa00", "GPU-aa11", "GPU-bb22", "GPU-cc33"]),
        ("", []),
        ("3,1", ["GPU-cc33", "GPU-aa11"]),
        (" 2 , 0 ", ["GPU-bb22", "GPU-aa00"]),
        ("0,7,1", ["GPU-aa00"]),
        ("-1,0", []),
        ("1,-1,0", ["GPU-aa11"]),
        ("0,,1", ["GPU-aa00"]),
        ("1,1", []),
        ("2gpu,0", ["GPU-bb22", "GPU-aa00"]),
        ("NoDevFiles", []),
        ("GPU-cc33,GPU-aa00", ["GPU-cc33", "GPU-aa00"]),
        ("GPU-c,GPU-aa1", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-bb,GPU-aa,GPU-cc", ["GPU-bb22"]),
        ("GPU-dd,GPU-aa00", []),
        ("GPU-cc,GPU-cc33", []),
        ("GPU-cc,0", ["GPU-cc33"]),
        ("MIG-1a2b-0001", []),
    ],
)
def test_a_list_of_devices_means_what_cuda_makes_of_it(visible: str | None, uuids: list[str]) -> None:
    assert [device.uuid for device in visible_devices(GPUS, visible)] == uuids


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["MIG-1a2b-0001", "MIG-1a2b-0002", "MIG-9f00-0003", "GPU-aa11"]),
        ("MIG-1a2b-0002,MIG-9f", ["MIG-1a2b-0002", "MIG-9f00-0003"]),
        ("MIG-9f,MIG-1a2b,MIG-1a2b-0001", ["MIG-9f00-0003"]),
        ("0,1", ["MIG-1a2b-0001", "GPU-aa11"]),
        ("GPU-aa00", ["MIG-1a2b-0001"]),
        ("MIG-9f,GPU-aa11", ["MIG-9f00-0003"]),
    ],
)
def test_a_divided_gpu_is_named_by_its_parts(visible: str | None, uuids: list[str]) -> None:
    assert [device.uuid for device in visible_devices(DIVIDED.gpus, visible)] == uuids


@pytest.mark.parametrize(
    ("machine", "visible", "learner_and_server", "egl", "note"),
    [
        # All four: workers on GPU 2 and 3 (EGL 2 and 1), then the server's GPU 1 (EGL 3), never on 0 (EGL 4).
        (FOUR, None, ["GPU-aa00", "GPU-aa11"], ["2", "1", "3", "2", "1", "3"], ""),
        # Remapped: learner on GPU 3, server on 2, so that workers get GPU 0 (EGL 4) and the server's 2 (EGL 2).
        (FOUR, "3,2,0", ["GPU-cc33", "GPU-bb22"], ["4", "2", "4", "2", "4", "2"], ""),
        # By UUID, cut short: the same.
        (FOUR, "GPU-c,GPU-b,GPU-aa00", ["GPU-cc33", "GPU-bb22"], ["4", "2", "4", "2", "4", "2"], ""),
        # Two: workers share the server's.
        (FOUR, "1,0", ["GPU-aa11", "GPU-aa00"], ["4"] * 6, ""),
        (FOUR, "2", ["GPU-bb22"] * 2, ["2"] * 6, "workers render on the learner's GPU 2: no other visible GPU can"),
        (ONE, None, ["GPU-aa00"] * 2, ["0"] * 6, "learner and server share GPU 0, 80 GiB: --server-sleeps makes room"),
        (FOUR, "", ["", ""], [None] * 6, "CUDA_VISIBLE_DEVICES='' leaves none of 4 GPUs: everything runs on the CPU"),
        (NONE, None, [None, None], [None] * 6, "no GPU was found: everything runs on the CPU"),
        # A divided GPU cannot draw: the whole one does.
        (DIVIDED, None, ["MIG-1a2b-0001", "MIG-1a2b-0002"], ["3"] * 6, ""),
        (
            DIVIDED, "MIG-1a2b-0002,MIG-9f", ["MIG-1a2b-0002", "MIG-9f00-0003"], [None] * 6,
            "no visible GPU can render through EGL: workers render in software",
        ),
        (
            replace(FOUR, egl=EGL[:2]), None, ["GPU-aa00", "GPU-aa11"], ["4"] * 6,
            "workers render on the learner's GPU 0: no other visible GPU can",
        ),
    ],
)  # fmt: skip
def test_processes_go_where_the_table_says(
    machine: Machine, visible: str | None, learner_and_server: list, egl: list, note: str
) -> None:
    placement = placed(machine, visible, processes=6)
    assert computing(placement) == learner_and_server
    assert screens(placement) == egl
    renderers = {worker.environment["MUJOCO_GL"] for worker in placement.workers}
    assert renderers == {"osmesa" if egl[0] is None else "egl"}
    assert all(worker.environment["CUDA_VISIBLE_DEVICES"] == "" for worker in placement.workers)
    assert note in placement.notes if note else placement.notes == ()


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 7, 16])
def test_no_gpu_renders_for_two_workers_more_than_another(processes: int) -> None:
    used = screens(placed(FOUR, processes=processes))
    counts = [used.count(index) for index in ("1", "2", "3")]
    assert sum(counts) == processes and max(counts) - min(counts) <= 1


def test_workers_render_on_the_learners_gpu_when_told_and_it_comes_last() -> None:
    assert screens(placed(FOUR, processes=4, render_on_learner=True)) == ["2", "1", "3", "4"]
    assert screens(placed(FOUR, "1,0", processes=3, render_on_learner=True)) == ["4", "3", "4"]


def test_a_learner_on_the_cpu_leaves_all_gpus_to_server_and_workers() -> None:
    placement = placed(FOUR, processes=4, learner_on_cpu=True)
    assert placement.learner.device == "CPU" and computing(placement) == [None, "GPU-aa00"]
    assert screens(placement) == ["3", "2", "1", "4"]
    one = placed(ONE, learner_on_cpu=True)
    assert computing(one) == [None, "GPU-aa00"] and screens(one) == ["0"] * 3 and one.notes == ()


def test_workers_of_one_environment_are_started_together() -> None:
    by_screen = {environment["MUJOCO_EGL_DEVICE_ID"]: count for environment, count in placed(FOUR, processes=7).groups}
    assert by_screen == {"2": 3, "1": 2, "3": 2}
    assert placed(NONE, processes=5).groups == [({"CUDA_VISIBLE_DEVICES": "", "MUJOCO_GL": "osmesa"}, 5)]


def test_a_renderer_that_the_caller_chose_is_kept() -> None:
    software = placed(FOUR, mujoco_gl="osmesa")
    assert [dict(worker.environment) for worker in software.workers] == [
        {"CUDA_VISIBLE_DEVICES": "", "MUJOCO_GL": "osmesa"}
    ] * 3
    assert placed(NONE, mujoco_gl="egl").workers[0].environment["MUJOCO_GL"] == "egl"
    assert screens(placed(FOUR, mujoco_gl="egl")) == ["2", "1", "3"]


@pytest.mark.parametrize(
    ("memory_gb", "processes", "workers", "scenes"),
    [(24.0, 2, 2, 10), (24.0, 3, 3, 6), (24.0, 20, 20, 1), (24.0, 64, 20, 1), (2.5, 8, 2, 1)],
)
def test_workers_hold_no_more_scenes_than_half_of_memory(
    memory_gb: float, processes: int, workers: int, scenes: int
) -> None:
    placement = placed(replace(NONE, memory_gb=memory_gb), processes=processes)
    assert (len(placement.workers), placement.scenes) == (workers, scenes)
    assert workers * scenes * 0.6 <= workers * placement.worker_gb <= memory_gb / 2 + 1e-9
    short = any(note.endswith(f"{workers} workers, not {processes}") for note in placement.notes)
    assert short == (workers < processes)


def test_a_machine_too_small_for_one_scene_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one scene, 0\.6 GiB: 1 workers may fill 0\.5 GiB"):
        placed(replace(NONE, memory_gb=1.0), processes=1)


def test_the_plan_is_shown_as_a_table() -> None:
    assert placed(FOUR, "3,2,0").table().splitlines() == [
        "learner   GPU 3, 80 GiB  CUDA_VISIBLE_DEVICES=GPU-cc33",
        "server    GPU 2, 80 GiB  CUDA_VISIBLE_DEVICES=GPU-bb22",
        "worker 0  GPU 0, EGL 4   CUDA_VISIBLE_DEVICES= MUJOCO_GL=egl MUJOCO_EGL_DEVICE_ID=4",
        "worker 1  GPU 2, EGL 2   CUDA_VISIBLE_DEVICES= MUJOCO_GL=egl MUJOCO_EGL_DEVICE_ID=2",
        "worker 2  GPU 0, EGL 4   CUDA_VISIBLE_DEVICES= MUJOCO_GL=egl MUJOCO_EGL_DEVICE_ID=4",
        "each worker: up to 26 scenes in 16.0 GiB",
    ]
    assert placed(NONE, processes=1).table().splitlines() == [
        "learner   CPU",
        "server    CPU",
        "worker 0  osmesa  CUDA_VISIBLE_DEVICES= MUJOCO_GL=osmesa",
        "each worker: up to 20 scenes in 12.0 GiB",
        "note: no GPU was found: everything runs on the CPU",
    ]


def test_gpus_are_read_from_what_nvidia_smi_prints() -> None:
    table = "0, GPU-aa00, 00000000:3B:00.0, 81559\n1, GPU-aa11, 00010000:AF:00.0, 81559\n"
    listing = (
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aa00)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-1a2b-0001)\n"
        "  MIG 3g.40gb     Device  1: (UUID: MIG-1a2b-0002)\n"
        "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-aa11)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-GPU-aa11/1/0)\n"
    )
    assert parse_gpus(table, listing, shared_gb=1.0) == (
        Gpu(index=0, uuid="GPU-aa00", pci="0000:3b:00.0", memory_gb=79.6, mig=PARTS[:2]),
        Gpu(
            index=1, uuid="GPU-aa11", pci="10000:af:00.0", memory_gb=79.6,
            mig=(Mig(uuid="MIG-GPU-aa11/1/0", profile="1g.10gb"),),
        ),
    )  # fmt: skip
    assert parse_gpus("", "", shared_gb=1.0) == ()


def test_an_index_that_may_mean_another_gpu_is_spoken_of() -> None:
    mixed = replace(FOUR, gpus=(replace(GPUS[0], memory_gb=24.0), *GPUS[1:]))
    assert any("the GPUs differ" in note for note in placed(mixed, visible="0,1").notes)
    assert not placed(mixed, visible="GPU-aa00,GPU-aa11").notes and not placed(FOUR, visible="0,1").notes


def test_a_gpu_that_shares_the_machines_memory_has_that() -> None:
    [spark] = parse_gpus("0, GPU-aa00, 0000000F:01:00.0, [N/A]\n", "", shared_gb=119.7)
    assert spark.memory_gb == 119.7


def test_equal_parts_of_a_gpu_are_told_apart() -> None:
    one, other = (Device(gpu=Gpu(index=0, uuid="GPU-aa00", pci="", memory_gb=80.0), mig=mig) for mig in PARTS[:2])
    assert one.mig and other.mig and one.mig.profile == other.mig.profile and str(one) != str(other)


def test_an_egl_device_is_where_sysfs_puts_its_file(tmp_path: Path) -> None:
    (tmp_path / "pci0000:00" / "0000:3b:00.0").mkdir(parents=True)
    for name in ("card1", "renderD129"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "device").symlink_to(tmp_path / "pci0000:00" / "0000:3b:00.0")
    assert pci_of_drm([b"/dev/dri/card1", None], tmp_path) == "0000:3b:00.0"
    assert pci_of_drm([None, b"/dev/dri/renderD129"], tmp_path) == "0000:3b:00.0"
    assert pci_of_drm([b"/dev/dri/card0", None], tmp_path) is None and pci_of_drm([None, None], tmp_path) is None


def test_this_machine_can_be_planned_for() -> None:
    assert plan(find_machine(), processes=1, scene_gb=0.1).workers[0].environment["MUJOCO_GL"] in ("egl", "osmesa")
