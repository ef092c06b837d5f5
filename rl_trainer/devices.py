"""What this machine has to compute and to render on: GPUs as nvidia-smi lists them, EGL's devices, memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from protos.machine import memory_gb

QUERY = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id,memory.total", "--format=csv,noheader,nounits"]
LISTING = ["nvidia-smi", "-L"]
PATIENCE_S = 30.0
MOST_EGL_DEVICES = 10
"""mujoco asks EGL for no more: a device beyond them cannot be chosen."""
EGL_DRM_FILES = (0x3233, 0x3377)
"""EGL_DRM_DEVICE_FILE_EXT and EGL_DRM_RENDER_NODE_FILE_EXT, of the extensions of these names."""
EGL_UUID = 0x335C
"""EGL_DEVICE_UUID_EXT, of EGL_EXT_device_persistent_id."""
UUID_BYTES = 16
DRM = Path("/sys/class/drm")


@dataclass(frozen=True, kw_only=True)
class Mig:
    """A part of a divided GPU."""

    uuid: str
    """MIG-..."""
    profile: str
    """for instance 3g.20gb"""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU."""

    index: int
    """as nvidia-smi counts: by PCI bus id"""
    uuid: str
    """GPU-..."""
    pci: str
    """pci_address()"""
    memory_gb: float
    """GiB; of one that has none of its own, and says so, the machine's"""
    mig: tuple[Mig, ...] = ()
    """its parts, where it is divided"""


@dataclass(frozen=True, kw_only=True)
class EglDevice:
    """One entry of eglQueryDevicesEXT."""

    index: int
    """what MUJOCO_EGL_DEVICE_ID counts; the order is not CUDA's"""
    pci: str | None
    """pci_address(); None for a renderer in software"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This host, or one that a test made up."""

    memory_gb: float
    """GiB that processes may fill together"""
    gpus: tuple[Gpu, ...] = ()
    egl: tuple[EglDevice, ...] = ()


def compute_device(asked: str) -> str:
    """What `auto` means here.  Raises ValueError when CUDA is asked for and is not to be had."""
    cuda = torch.cuda.is_available()
    if asked.startswith("cuda") and not cuda:
        raise ValueError(f"device {asked!r} was asked for, but this machine or its torch has no CUDA")
    return ("cuda" if cuda else "cpu") if asked == "auto" else asked


def find_machine() -> Machine:
    """The host that this runs on."""
    gpus = find_gpus()
    return Machine(memory_gb=memory_gb(), gpus=gpus, egl=find_egl(gpus))


def find_gpus() -> tuple[Gpu, ...]:
    """Empty where there is no nvidia-smi, or it finds no driver."""
    return parse_gpus(_output(QUERY), _output(LISTING), shared_gb=memory_gb())


def parse_gpus(table: str, listing: str, *, shared_gb: float) -> tuple[Gpu, ...]:
    """The GPUs in the output of QUERY, with the instances in that of LISTING.

    shared_gb: memory of one that shows none, since it shares the machine's, as Grace Blackwell's in a DGX Spark do.
    """
    instances: dict[str, list[Mig]] = {}
    gpu = ""
    for line in listing.splitlines():
        found = re.search(r"\(UUID: ([^)]+)\)", line)
        if line.startswith("GPU ") and found:
            gpu = found[1]
        elif found and (profile := re.match(r"\s+MIG (\S+)", line)):
            instances.setdefault(gpu, []).append(Mig(uuid=found[1], profile=profile[1]))
    rows = [[field.strip() for field in line.split(",")] for line in table.splitlines() if line.strip()]
    gpus = [
        Gpu(
            index=int(index),
            uuid=uuid,
            pci=pci_address(pci),
            memory_gb=round(int(mib) / 1024, 1) if mib.isdigit() else shared_gb,
        )
        for index, uuid, pci, mib in rows
    ]
    return tuple(replace(gpu, mig=tuple(instances.get(gpu.uuid, ()))) for gpu in gpus)


def pci_address(text: str) -> str:
    """One spelling of domain:bus:device.function: nvidia-smi's 00000000:3B:00.0 and Linux's 0000:3b:00.0 are one."""
    domain, bus, slot = text.lower().split(":")
    return f"{int(domain, 16):04x}:{bus}:{slot}"


def find_egl(gpus: Sequence[Gpu] = ()) -> tuple[EglDevice, ...]:
    """The devices mujoco could render on through EGL, in its order; empty where EGL cannot list them.

    A device is one of the GPUs by its UUID; where the driver gives none, or of no GPU, by its files in /dev/dri, which
    a container may lack.
    """
    library = ctypes.util.find_library("EGL")
    if library is None:
        return ()
    address_of = ctypes.CDLL(library).eglGetProcAddress
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    named = (b"eglQueryDevicesEXT", b"eglQueryDeviceStringEXT", b"eglQueryDeviceBinaryEXT")
    list_devices, string_of, binary_of = (address_of(name) for name in named)
    if not list_devices or not string_of:
        return ()
    handles, count = (ctypes.c_void_p * MOST_EGL_DEVICES)(), ctypes.c_int()
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(list_devices)
    if not query(MOST_EGL_DEVICES, handles, ctypes.byref(count)):
        return ()
    string = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)(string_of)
    pci_at = {gpu.uuid: gpu.pci for gpu in gpus}
    found = []
    for index, handle in enumerate(handles[: count.value]):
        pci = pci_at.get(_egl_uuid(binary_of, handle)) if binary_of else None
        found.append(EglDevice(index=index, pci=pci or pci_of_drm([string(handle, name) for name in EGL_DRM_FILES])))
    return tuple(found)


def _egl_uuid(binary_of: int, handle: int | None) -> str:
    """As nvidia-smi writes it; empty where the device has none.  binary_of: address of eglQueryDeviceBinaryEXT."""
    signature = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    binary = ctypes.CFUNCTYPE(ctypes.c_uint, *signature)(binary_of)
    number, size = (ctypes.c_ubyte * UUID_BYTES)(), ctypes.c_int()
    answered = binary(handle, EGL_UUID, UUID_BYTES, number, ctypes.byref(size))
    return f"GPU-{uuid.UUID(bytes=bytes(number))}" if answered and size.value == UUID_BYTES else ""


def pci_of_drm(files: list[bytes | None], drm: Path = DRM) -> str | None:
    """Where the device behind one of its /dev/dri files sits, as sysfs says: the file itself may not be there."""
    for file in filter(None, files):
        link = drm / Path(os.fsdecode(file)).name / "device"
        if link.exists() and re.fullmatch(r"[0-9a-f]+:[0-9a-f]+:[0-9a-f.]+", link.resolve().name):
            return pci_address(link.resolve().name)
    return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
