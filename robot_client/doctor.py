"""What would stop a run on an arm, found before anything moves: packages, profile, cameras, arm, clock, server, disk.

Each check gives findings, a line each: ok, warn or FAIL, with what to do about it.  Nothing is commanded, and nothing
is left at the server.  An arm is opened as for a run.
"""

from __future__ import annotations

import inspect
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tyro

from protos.channel import Credentials
from protos.codec import ImageFormat
from robot_client import arms, cameras, errors
from robot_client.arm import Arm, ArmSpec, Observation
from robot_client.cadence import Cadence
from robot_client.camera import FIRST_FRAME_S, Camera
from robot_client.client import PolicyClient
from robot_client.errors import RobotError
from robot_client.profile import Profile, read_profile
from robot_client.real_arm import POLL_S, RealArm, RealArmConfig, arm_spec
from robot_client.safety import POSITION_STATE
from robot_client.spec import PolicySpec

T = TypeVar("T")
Finding = tuple[Literal["ok", "warn", "FAIL"], str]
"""What was found and, where something is wrong, what to do."""

WATCH_S, SERVER_S, CALLS = 2.0, 5.0, 30
LATE, DRIFT_MS = 0.5, 10.0
"""Of a tick or a servo's period; of the wall clock against the monotonic one."""
FEW, MANY = 0.9, 0.02
"""Of the frames or periods that are due: so many must come, so many may be missed."""
DARK, PLAIN, SQUEEZED = 20.0, 2.0, 0.05
"""A mean level (of 255), a deviation, a change of aspect: beyond these a picture is not what the policy knows."""
LEAST_GB, FEW_GB = 1.0, 10.0
UNJUDGED: Finding = ("warn", "not judged: it needs what failed above")
REALTIME_ARMS, REALTIME_SIGN = ("franka",), Path("/sys/kernel/realtime")
"""They insist on a real-time kernel unless their profile says otherwise."""
REMEDIES = {
    errors.UnknownArm: "see --arm",
    errors.BadProfile: "mend it in --profile",
    errors.CameraError: "plug it in, or mend its --camera",
    errors.UnknownCamera: "see its --camera",
    errors.ArmError: "switch it on, let it be controlled from here, see [hardware]; clear a fault at the robot itself",
    errors.ServerLost: "start the server (python -m policy_server serve), or mend --server",
    errors.NotAdmitted: "ask whoever keeps the server's --tokens",
    errors.TlsMismatch: "mend it on either side",
    errors.PolicyError: "see the server's log, and the network between",
    RobotError: "mend it",
}
MISFITS = {
    "actions": "serve a policy for this arm",
    "images": "name the cameras as the policy does: --camera NAME=...",
    "state": "serve a policy that reads what this arm has",
    "tick rate": "state the policy's rate as the arm's tick_rate_hz, or serve a policy of this one",
    "limits": "mend the arm's ArmSpec",
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Says what would stop a run, and what to do about it.  Moves nothing."""

    arm: str = "kinematic"
    """Name of an installed arm; its own flags follow."""
    server: str = "localhost:50051"
    """HOST:PORT of the policy server."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    image_format: ImageFormat = "raw"
    """How frames will travel."""
    resize: bool = False
    """Whether they will be brought to the policy's size before."""
    record: Path | None = None
    """Where episode files will be written."""


def doctor(config: Doctor, flags: Sequence[str]) -> int:
    """Prints what every check finds; 1 when one of them fails, else 0.  flags: the arm's own."""
    verdicts = set()
    with ExitStack() as stack:
        patient = Patient(config, flags, stack)
        for name, check in CHECKS.items():
            for verdict, text in findings(check, patient):
                print(f"{verdict:<4}  {name:<10}  {text}", flush=True)
                verdicts.add(verdict)
    return int("FAIL" in verdicts)


def findings(check: Check, patient: Patient) -> Iterator[Finding]:
    """What it finds; an error that stops it is a finding too, the first time."""
    try:
        yield from check(patient)
    except RobotError as error:
        known, patient.told = error in patient.told, [*patient.told, error]
        yield from [UNJUDGED] if known else told(error)


def told(error: RobotError) -> list[Finding]:
    """What is wrong, and what to do."""
    if isinstance(error, errors.SpecMismatch):
        return [("FAIL", f"{line}; {MISFITS[line.partition(':')[0]]}") for line in error.mismatches]
    return [("FAIL", f"{error}; {next(remedy for kind, remedy in REMEDIES.items() if isinstance(error, kind))}")]


def judged(fact: str, *troubles: tuple[Any, Literal["warn", "FAIL"], str]) -> list[Finding]:
    """The fact is ok unless there are troubles: whether each is there, how bad it is, what to do."""
    found: list[Finding] = [(verdict, f"{fact}; {remedy}") for is_there, verdict, remedy in troubles if is_there]
    return found or [("ok", fact)]


def once(get: Callable[[Any], T]) -> Any:
    """A property that is had once; an error too: what cannot be had is not tried again."""

    def got(self: Patient) -> T:
        if get not in self.had:
            try:
                self.had[get] = get(self)
            except (RobotError, ValueError) as error:
                self.had[get] = error if isinstance(error, RobotError) else RobotError(str(error))
        if isinstance(self.had[get], RobotError):
            raise self.had[get]
        return self.had[get]

    return property(got)


class Patient:
    """What several checks look at, opened when first needed and closed by the stack.  Each may raise a RobotError.

    A real arm and its cameras are opened apart: where one of them fails, the others are looked at nevertheless.
    """

    def __init__(self, config: Doctor, flags: Sequence[str], stack: ExitStack):
        self.config, self._flags, self._stack = config, flags, stack
        self.had: dict[Callable, Any] = {}
        self.told: list[RobotError] = []

    @once
    def make(self) -> Callable[..., Arm]:
        return arms.load(self.config.arm)

    @once
    def settings(self) -> RealArmConfig | None:
        """None for an arm without a profile."""
        kinds = [each.annotation for each in inspect.signature(self.make, eval_str=True).parameters.values()]
        return self._parsed(RealArmConfig) if kinds == [RealArmConfig] else None

    @once
    def profile(self) -> Profile | None:
        return read_profile(self.settings.profile) if self.settings else None

    @once
    def cameras(self) -> dict[str, Camera | RobotError]:
        """By their descriptions."""
        return {text: self._opened(text) for text in self.settings.camera} if self.settings else {}

    @once
    def arm(self) -> Arm:
        """A real one without its cameras."""
        settings = self.settings if self.profile else None
        return self._kept(self.make(replace(settings, camera=())) if settings else self._parsed(self.make))

    @once
    def spec(self) -> ArmSpec:
        """A profile promises it whether or not the arm can be reached."""
        names = tuple(text.partition("=")[0] for text in self.cameras)
        return arm_spec(self.profile, names) if self.profile else self.arm.spec

    @once
    def tick_ms(self) -> float:
        with suppress(RobotError):
            return 1000 / self.spec.tick_rate_hz
        return 50.0

    @once
    def client(self) -> PolicyClient:
        config = self.config
        how = {"credentials": config.credentials, "image_format": config.image_format, "resize": config.resize}
        return self._kept(PolicyClient(config.server, **how, deadline_s=SERVER_S, give_up_after_s=0))

    @once
    def policy(self) -> PolicySpec:
        return self.client.spec()

    @property
    def images(self) -> dict[str, np.ndarray]:
        """Camera name -> what it shows now, where it shows something."""
        if not self.settings:
            return self.arm.observe().images
        showing = [camera for camera in self.cameras.values() if isinstance(camera, Camera) and camera.report().frames]
        return {camera.name: camera.latest().image for camera in showing}

    def _opened(self, text: str) -> Camera | RobotError:
        try:
            return self._kept(cameras.parse(text))
        except RobotError as error:
            return error

    def _parsed(self, kind: Callable[..., T]) -> T:
        return arms.parse(kind, self._flags, prog=f"robot_client doctor --arm {self.config.arm}")

    def _kept(self, opened: Any) -> Any:
        self._stack.callback(opened.close)
        return opened


def check_packages(patient: Patient) -> Iterator[Finding]:
    """Whether what the arm needs is installed."""
    yield "ok", f"{patient.config.arm} is {patient.make.__module__}"


def check_profile(patient: Patient) -> Iterator[Finding]:
    """Whether the profile can be read, and agrees with itself."""
    profile: Profile | None = patient.profile
    if profile is None:
        yield "ok", f"{patient.config.arm} needs none"
        return
    motion, home_J = profile.motion, profile.home.joints_rad
    low_J, high_J = motion.joints_low_rad or (-inf,) * len(home_J), motion.joints_high_rad or (inf,) * len(home_J)
    beyond = [
        j + 1 for j, (low, at, high) in enumerate(zip(low_J, home_J, high_J, strict=False)) if not low <= at <= high
    ]
    step_m_s, step_rad_s = profile.tick_rate_hz * profile.step * np.array([profile.scale.metres, profile.scale.radians])
    clipped = step_m_s > 1.001 * motion.speed_m_s or step_rad_s > 1.001 * motion.speed_rad_s
    allowed = f"[motion] allows {motion.speed_m_s:g} m/s and {motion.speed_rad_s:g} rad/s"
    yield from judged(
        f"home has {len(home_J)} joints, the longest step is {step_m_s:.3g} m/s and {step_rad_s:.3g} rad/s",
        (len(low_J) != len(home_J), "FAIL", f"[motion] limits {len(low_J)}: limit each of them, or none"),
        (beyond, "FAIL", f"[motion] rules out joints {beyond} at home: change joints_rad, or their limits"),
        (clipped, "warn", f"{allowed} and clips the rest: lower step or scale, or raise it where it is safe"),
    )


def check_cameras(patient: Patient) -> Iterator[Finding]:
    """Whether frames come, new ones, as often as they are due."""
    opened = {text: camera for text, camera in patient.cameras.items() if isinstance(camera, Camera)}
    until_s = time.monotonic() + FIRST_FRAME_S
    while time.monotonic() < until_s and not all(camera.report().frames for camera in opened.values()):
        time.sleep(POLL_S)
    began_s, before = time.monotonic(), {text: camera.report() for text, camera in opened.items()}
    time.sleep(WATCH_S if opened else 0)
    for text, camera in patient.cameras.items():
        if isinstance(camera, RobotError):
            yield from told(camera)
            continue
        report, trouble = camera.report(), camera.trouble()
        rate_hz = (report.frames - before[text].frames) / (time.monotonic() - began_s)
        dropped = report.dropped - before[text].dropped
        stated = re.search(r",fps=([\d.]+)", text)
        due_hz = max(1000 / patient.tick_ms, float(stated[1]) if stated else 0)
        few = rate_hz < FEW * due_hz or dropped > MANY * WATCH_S * due_hz
        yield from judged(
            f"{camera.name}: {rate_hz:.1f} frames a second, {dropped} dropped",
            (trouble, "FAIL", f"{trouble}: plug it in anew; if its picture may rest, frozen_after=0"),
            (few, "warn", f"{due_hz:g} are due: more light, a fixed exposure, its own USB port, or MJPG on the wire"),
        )


def check_images(patient: Patient) -> Iterator[Finding]:
    """Whether there is something to see."""
    for name, image in patient.images.items():
        mean, deviation = image.mean(), image.std()
        yield from judged(
            f"{name}: {image.shape[1]}x{image.shape[0]}, {mean:.0f} of 255 bright, deviation {deviation:.0f}",
            (deviation < PLAIN, "FAIL", "all of one colour: take its cap off, light the scene, mend its exposure"),
            (deviation >= PLAIN and mean < DARK, "warn", "dark: light the scene, mend its exposure"),
        )


def check_arm(patient: Patient) -> Iterator[Finding]:
    """Whether the arm answers in time, may move, and is where it may be."""
    arm: Arm = patient.arm
    state, state_s, cadence = arm.state(), [], Cadence(1000 / patient.tick_ms)
    for _ in range(ceil(1000 * WATCH_S / patient.tick_ms)):
        cadence.wait()
        asked_s, state = time.monotonic(), arm.state()
        state_s.append(time.monotonic() - asked_s)
    state_ms, place, is_inside = 1000 * np.percentile(state_s, 99), "", True
    if box := arm.spec.limits.workspace:
        at_m = state.state_S[[arm.spec.state_names.index(name) for name in POSITION_STATE]]
        is_inside = ((box.low_m <= at_m) & (at_m <= box.high_m)).all()
        place = f"at {[round(float(x), 3) for x in at_m]} m in a workspace of {box.low_m} to {box.high_m}, "
    yield from judged(
        f"{place}its state takes {state_ms:.1f} ms to read (99 %)",
        (state.trouble, "FAIL", f"{state.trouble}: free it"),
        (not is_inside, "FAIL", "outside: bring it in, or mend [workspace] or [frame]"),
        (state_ms > LATE * patient.tick_ms, "warn", f"of a tick of {patient.tick_ms:.0f} ms: free this computer"),
    )


def check_servo(patient: Patient) -> Iterator[Finding]:
    """Whether the process that leads a real arm keeps its rate, at rest."""
    if not isinstance(patient.arm, RealArm):
        return
    patient.arm.cadence()  # begins a new count
    time.sleep(WATCH_S)
    report = patient.arm.cadence()
    late = report.late_p99_ms > LATE * 1000 / report.rate_hz or report.missed > MANY * report.ticks
    slow = report.rate_hz < FEW * 1000 / patient.tick_ms
    yield from judged(
        f"{report}",
        (late, "warn", "free this computer of other work, or lower hardware.rate_hz"),
        (slow, "warn", f"a tick is {patient.tick_ms:.0f} ms: raise hardware.rate_hz"),
    )


def check_clock(patient: Patient) -> Iterator[Finding]:
    """Whether this computer wakes in time, its clocks agree, and its kernel is what the arm wants."""
    cadence, ahead_s = Cadence(1000 / patient.tick_ms), []
    for _ in range(ceil(1000 * WATCH_S / patient.tick_ms)):
        cadence.wait()
        ahead_s.append(time.time() - time.monotonic())
    late_ms, drift_ms = cadence.report().late_p99_ms, 1000 * np.ptp(ahead_s)
    yield from judged(
        f"a tick begins {late_ms:.1f} ms late (99 %), the wall clock moves by {drift_ms:.1f} ms in {WATCH_S:g} s",
        (late_ms > LATE * patient.tick_ms, "warn", f"a tick is {patient.tick_ms:.0f} ms: free this computer"),
        (drift_ms > DRIFT_MS, "warn", "let the time service settle: dates in records are off (ages are not)"),
    )
    profile: Profile | None = patient.profile
    if profile and profile.hardware.get("realtime", profile.arm in REALTIME_ARMS):
        is_there = "PREEMPT_RT" in platform.version() or REALTIME_SIGN.exists()
        yield from judged(
            f"{profile.arm} asks for a real-time kernel, this is {platform.release()}",
            (not is_there, "FAIL", "boot one (PREEMPT_RT), or state hardware.realtime = false"),
        )


def check_network(patient: Patient) -> Iterator[Finding]:
    """Whether the server answers, and how fast."""
    yield "ok", f"{patient.config.server} serves {patient.policy.message.model}"
    yield from timed("a call", patient.client.spec, patient.tick_ms)


def check_policy(patient: Patient) -> Iterator[Finding]:
    """Whether policy and arm fit, and how long what it looks at is under way: it is asked for no decision."""
    policy, spec, images = patient.policy, patient.spec, patient.images
    policy.require_fit(spec)
    yield "ok", f"version {policy.message.live_version} fits {spec.name}"
    for said in policy.message.images:
        height, width = images[said.name].shape[:2] if said.name in images else (said.height, said.width)
        if abs(width / height * said.height / said.width - 1) > SQUEEZED:
            yield "warn", f"{said.name}: {width}x{height} is squeezed to {said.width}x{said.height}; see crop=square"
    if images.keys() >= set(policy.image_names):
        look = Observation(images=images, state_S=np.zeros(len(spec.state_names), np.float32), instruction="")
        yield from timed("an observation", lambda: send(patient.client, policy.read_of(look, spec)), patient.tick_ms)


def send(client: PolicyClient, observation: Observation) -> None:
    """It is refused, for want of an episode, once all of it is there: nothing is kept."""
    with suppress(errors.BadRequest):
        client.act("doctor", 0, observation)


def timed(what: str, call: Callable[[], object], tick_ms: float) -> list[Finding]:
    """How long it takes there and back."""
    times_s = [time.monotonic()]
    for _ in range(CALLS):
        call()
        times_s.append(time.monotonic())
    median_ms, p99_ms = 1000 * np.percentile(np.diff(times_s), [50, 99])
    remedy = "use a cable, fewer pixels, --image-format jpeg or --resize, ask --ahead-ticks None"
    fact = f"{what} takes {median_ms:.1f} ms there and back (median), {p99_ms:.1f} ms (99 %)"
    return judged(fact, (p99_ms > tick_ms, "warn", f"a tick is {tick_ms:.0f} ms: {remedy}"))


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Whether episode files can be written here, if they will be."""
    folder = patient.config.record
    if folder is None and patient.policy.message.stores_episodes:
        yield "ok", "the server keeps the episodes"
        return
    folder = (folder or Path()).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free_gb = shutil.disk_usage(there).free / 2**30
    except OSError as error:
        yield "FAIL", f"{folder}: {error.strerror}; make room, mount its disk, or take another --record"
        return
    yield from judged(
        f"{free_gb:.1f} GiB are free for {folder}",
        (free_gb < LEAST_GB, "FAIL", "make room, or take another --record"),
        (LEAST_GB <= free_gb < FEW_GB, "warn", "make room, or take another --record"),
        (there not in (folder, folder.parent), "warn", f"of it only {there} is there: is its disk mounted?"),
    )


Check = Callable[[Patient], Iterator[Finding]]
CHECKS: dict[str, Check] = {
    "packages": check_packages,
    "profile": check_profile,
    "cameras": check_cameras,
    "images": check_images,
    "arm": check_arm,
    "servo": check_servo,
    "clock": check_clock,
    "network": check_network,
    "policy": check_policy,
    "disk": check_disk,
}
