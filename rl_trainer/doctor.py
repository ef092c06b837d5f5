"""What would stop a run, found before it starts: `python -m rl_trainer doctor`, with the options of `train`.

Looked at are devices, rendering, assets, the checkpoint, its statistics, the disk, and the server that is given with
its admin service.

Each check gives findings, a line each: ok, warn or FAIL, with what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import grpc
import numpy as np

from policy_server.vla.action_tokens import UnknownStatistics, statistics_key
from policy_server.vla.checkpoint import (
    Checkpoint,
    CheckpointError,
    fault,
    load_checkpoint,
    load_config,
    local_folder,
)
from policy_server.vla.config import VLAConfig
from protos import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc
from protos.channel import Credentials, dial, tls_trouble
from rl_trainer.devices import compute_device
from rl_trainer.placement import Placement
from rl_trainer.plan import disk_free_gb, disk_need_gb, schedule_of, trained_shapes
from rl_trainer.suite import asked, catalogue, cells_of
from rl_trainer.train import placed
from rl_trainer.train_config import TrainConfig

Answer = TypeVar("Answer")
SERVER_S = 10.0
ROOM = 2.0
"""A disk with less than so many times the need is worth a warning."""
INSTALL = "install LIBERO (README) and its assets, and set LIBERO_ASSETS to their folder or not at all"
SIMPLE_TASK = "robosuite/0"
RENDER = """
import sys
from sim.scene import Scene
from sim.suites import find_task

scene = Scene(find_task(sys.argv[1]), fast=False)
scene.place("seed:0")
sys.exit(0 if scene.render("agentview", 64, 64).std() > 1 else "the picture is of one colour")
"""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Looks for what would stop a run before it starts."""

    free_gb: float | None = None
    """judge the disk as if so many GiB were free; none given: those that are"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    check: str
    verdict: Literal["ok", "warn", "FAIL"]
    text: str
    """what was found and, where something is wrong, what to do"""

    def __str__(self) -> str:
        return f"{self.verdict:<4}  {self.check:<10}  {self.text}"


def doctor(config: DoctorConfig) -> int:
    """Prints what every check finds; 1 when one of them fails, else 0."""
    patient = Patient(config)
    verdicts = set()
    for check in CHECKS:
        for finding in check(patient):
            print(finding, flush=True)
            verdicts.add(finding.verdict)
    return int("FAIL" in verdicts)


class Patient:
    """What several checks look at, read once."""

    def __init__(self, config: DoctorConfig):
        self.config = config

    @cached_property
    def model(self) -> VLAConfig | str:
        """What the checkpoint says about itself, or why it cannot be read."""
        try:
            return load_config(local_folder(self.config.model))
        except CheckpointError as error:
            return str(error)

    @cached_property
    def listed(self) -> dict | str:
        """What the simulator says of the suite, which has the run's tasks and states, or why not."""
        config = self.config
        try:
            listed = catalogue(config.suite)
        except ValueError as error:
            return f"{error}; {INSTALL}"
        try:
            for split in (config.split, config.evaluate_split):
                cells_of(listed, config.tasks, split)
        except ValueError as error:
            return str(error)
        return listed

    @cached_property
    def placement(self) -> Placement | str | None:
        """Where the run's processes would go on this machine, or why they cannot; None where a server is given, which
        has workers of its own."""
        try:
            return None if self.config.server else placed(self.config)
        except ValueError as error:
            return str(error)

    def drawing(self, task_id: str) -> str:
        """Why no frame of the task can be drawn as a worker of the run would draw it; empty when one can."""
        if isinstance(self.placement, str):
            return self.placement
        try:
            asked("-c", RENDER, task_id, environment=self.placement.workers[0].environment if self.placement else {})
        except ValueError as error:
            return str(error)
        return ""

    def undrawn(self, check: str, text: str) -> Finding:
        """What it means that this machine cannot draw: the workers of a server that is given may be elsewhere."""
        if self.config.server:
            return Finding(check=check, verdict="warn", text=f"{text}; needless where workers run elsewhere")
        return Finding(check=check, verdict="FAIL", text=text)

    @cached_property
    def checkpoint(self) -> Checkpoint | str:
        """The whole of it, or why it does not load."""
        if isinstance(self.model, str):
            return self.model
        try:
            return load_checkpoint(self.config.model, dtype=None)
        except CheckpointError as error:
            return str(error)


def check_devices(patient: Patient) -> Iterator[Finding]:
    """Whether there is what the learner asks for, and memory for a scene."""
    placement = patient.placement
    try:
        where = compute_device(patient.config.device)
    except ValueError as error:
        yield Finding(check="devices", verdict="FAIL", text=f"{error}; see --device")
        return
    if isinstance(placement, str):
        yield Finding(check="devices", verdict="FAIL", text=f"{placement}; see --processes")
        return
    rest = f", server on {placement.server.device}, {len(placement.workers)} workers" if placement else ""
    yield Finding(check="devices", verdict="ok", text=f"learner on {where}{rest}")


def check_rendering(patient: Patient) -> Iterator[Finding]:
    """Whether a worker can draw: one frame of robosuite's, in a process of its own."""
    if problem := patient.drawing(SIMPLE_TASK):
        advice = "install libosmesa6 (software) or libegl1 (GPU), and set MUJOCO_GL to osmesa or egl or not at all"
        yield patient.undrawn("rendering", f"no frame of {SIMPLE_TASK}: {problem}; {advice}")
    else:
        yield Finding(check="rendering", verdict="ok", text=f"a frame of {SIMPLE_TASK} was drawn")


def check_assets(patient: Patient) -> Iterator[Finding]:
    """Whether the suite can be built here; of LIBERO's, one scene is."""
    suite, listed = patient.config.suite, patient.listed
    if isinstance(listed, str):
        yield Finding(check="assets", verdict="FAIL", text=listed)
        return
    first = f"{suite}/0"
    if first != SIMPLE_TASK and (problem := patient.drawing(first)):
        yield patient.undrawn("assets", f"{first} cannot be built: {problem}; {INSTALL}")
        return
    yield Finding(check="assets", verdict="ok", text=f"{suite}: {len(listed['tasks'])} tasks can be built")


def check_checkpoint(patient: Patient) -> Iterator[Finding]:
    """Whether the policy loads, with every tensor there and finite."""
    checkpoint = patient.checkpoint
    if isinstance(checkpoint, str):
        text = f"{checkpoint}; take another --model, or copy this one again"
        yield Finding(check="checkpoint", verdict="FAIL", text=text)
        return
    tensors = checkpoint.model.state_dict()
    faults = [f"{name} {what}" for name, tensor in tensors.items() if (what := fault(tensor, tensor.shape))]
    if faults:
        text = f"{len(faults)} tensors are broken, the first: {faults[0]}; copy the checkpoint again"
        yield Finding(check="checkpoint", verdict="FAIL", text=text)
        return
    size = sum(tensor.numel() for tensor in tensors.values())
    text = f"{len(tensors)} tensors, {size / 1e6:.1f} M numbers, all finite; fingerprint {checkpoint.fingerprint[:12]}"
    yield Finding(check="checkpoint", verdict="ok", text=text)


def check_statistics(patient: Patient) -> Iterator[Finding]:
    """Whether actions can be un-normalised and states normalised."""
    model = patient.model
    if isinstance(model, str):
        yield Finding(check="statistics", verdict="FAIL", text=f"{model}; take another --model")
        return
    try:
        key = statistics_key(model, patient.config.unnorm_key)
    except UnknownStatistics as error:
        yield Finding(check="statistics", verdict="FAIL", text=f"{error}; see --unnorm-key")
        return
    statistics = model.norm_stats[key]
    problems = _range_faults("action", statistics["action"], model.action_dim)
    if model.state_dim:
        problems += _range_faults("proprio", statistics.get("proprio", {}), model.state_dim)
    for problem in problems:
        text = f"{key}: {problem}; compute norm_stats anew from the demonstrations"
        yield Finding(check="statistics", verdict="FAIL", text=text)
    if not problems:
        text = f"{key}: {model.action_dim} numbers of an action, {model.state_dim} of a state"
        yield Finding(check="statistics", verdict="ok", text=text)


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Whether --out has room for what the run leaves, were every episode to last as long as it may."""
    config, listed = patient.config, patient.listed
    if isinstance(patient.model, str) or isinstance(listed, str):
        text = "not judged: what a run needs follows from checkpoint and suite"
        yield Finding(check="disk", verdict="warn", text=text)
        return
    schedule = schedule_of(config, patient.model, listed, episode_share=1.0)
    shapes = trained_shapes(config, patient.model, prompt_tokens=1)
    need_gb = disk_need_gb(config, patient.model, shapes, schedule)
    free_gb = disk_free_gb(config.out) if config.free_gb is None else config.free_gb
    verdict = "FAIL" if free_gb < need_gb else "warn" if free_gb < ROOM * need_gb else "ok"
    kept = "checkpoints" if config.server else "episodes, versions and checkpoints"
    text = f"{free_gb:.1f} GiB free for --out, at most {need_gb:.1f} needed for {kept}"
    if verdict != "ok":
        text += "; make room, take another --out, or fewer iterations or rollouts"
    yield Finding(check="disk", verdict=verdict, text=text)


def check_server(patient: Patient) -> Iterator[Finding]:
    """Whether the server that is given answers, keeps episodes, and serves this checkpoint."""
    config = patient.config
    if not config.server:
        yield Finding(check="server", verdict="ok", text="none given: the run starts its own")
        return
    request = policy_pb2.GetSpecRequest()
    spec = _answer(
        config.server,
        config.credentials,
        lambda channel: policy_pb2_grpc.PolicyStub(channel).GetSpec(request, timeout=SERVER_S),
        model=config.model,
    )
    if isinstance(spec, str):
        yield Finding(check="server", verdict="FAIL", text=spec)
        return
    problems = []
    if not spec.stores_episodes:
        problems.append("it keeps no episodes; start it with --episodes DIR")
    if isinstance(patient.checkpoint, Checkpoint) and spec.base_fingerprint != patient.checkpoint.fingerprint:
        ours, theirs = patient.checkpoint.fingerprint[:12], spec.base_fingerprint[:12]
        problems.append(f"it serves another base, {theirs}, not {ours}; start it with --model {config.model}")
    for problem in problems:
        yield Finding(check="server", verdict="FAIL", text=f"{config.server}: {problem}")
    if not problems:
        text = f"{config.server} serves {spec.model}, version {spec.live_version}, and keeps episodes"
        yield Finding(check="server", verdict="ok", text=text)


def check_admin(patient: Patient) -> Iterator[Finding]:
    """Whether new weights can be brought to the server that is given."""
    if not patient.config.server:
        return
    given, request = patient.config.given_server, admin_pb2.ListVersionsRequest()
    versions = _answer(
        given.admin_address,
        given.admin_credentials,
        lambda channel: admin_pb2_grpc.AdminStub(channel).ListVersions(request, timeout=SERVER_S),
        model=patient.config.model,
    )
    if isinstance(versions, str):
        yield Finding(check="admin", verdict="FAIL", text=versions)
    else:
        yield Finding(check="admin", verdict="ok", text=f"{given.admin_address} takes new weights")


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    check_devices,
    check_rendering,
    check_assets,
    check_checkpoint,
    check_statistics,
    check_disk,
    check_server,
    check_admin,
)


def _range_faults(what: str, statistics: Mapping[str, Any], dimension: int) -> list[str]:
    """What is wrong with the quantiles of a data set's actions or states, a sentence each."""
    try:
        low, high = (np.array(statistics[name], np.float64) for name in ("q01", "q99"))
        mask = np.array(statistics.get("mask", [True] * dimension), bool)
        least, most = (np.array(statistics.get(name, low), np.float64) for name in ("min", "max"))
    except (KeyError, TypeError, ValueError) as error:
        return [f"{what} must have q01 and q99, lists of numbers, got {error!r}"]
    lengths = {len(np.atleast_1d(row)) for row in (low, high, mask, least, most)}
    if lengths != {dimension}:
        return [f"{what} must have {dimension} numbers in each list, got {sorted(lengths)}"]
    faults = []
    for index in np.flatnonzero(mask & ~((low < high) & np.isfinite(high - low))):
        still = low[index] == high[index] and least[index] == most[index]
        if not still:
            rest = ", though it moves" if low[index] == high[index] else ""
            faults.append(f"{what}[{index}] must have q01 below q99, got {low[index]:g} and {high[index]:g}{rest}")
    return faults


def _answer(
    address: str, credentials: Credentials, ask: Callable[[grpc.Channel], Answer], *, model: str
) -> Answer | str:
    """A service's, or why there is none and what to do; model: that the server should serve."""
    try:
        with dial(address, credentials) as channel:
            return ask(channel)
    except ValueError as error:
        return str(error)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"{address} refuses: {details}"
    start = f"start it: python -m policy_server serve --model {model} --episodes DIR --admin-port PORT"
    return tls_trouble(address, credentials) or f"{address} does not answer: {details}; {start}"
