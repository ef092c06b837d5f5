"""A real arm behind the Arm protocol: hardware led by its servo, cameras, and the profile that ties them to a policy.

policy's frame  -- profile.frame, profile.scale -->  robot's base frame  -- servo -->  hardware
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from robot_client import cameras
from robot_client.arm import ACTION_NAMES, STATE_NAMES, ArmSpec, ArmState, Limits, Observation, Task, Workspace
from robot_client.cadence import CadenceReport
from robot_client.camera import Camera
from robot_client.errors import ArmError, BadProfile, CameraError, RobotError
from robot_client.hardware import Hardware
from robot_client.pose import Pose, same_turn_near
from robot_client.profile import Profile, read_profile
from robot_client.servo import Status
from robot_client.servo_process import ServoLink

log = logging.getLogger(__name__)

POLL_S = 0.02
DOWNWARDS_RAD = np.array([np.pi, 0.0, 0.0])
"""How LIBERO tells the turn of a gripper that points down, as it does when an episode begins."""


@dataclass(frozen=True, kw_only=True)
class RealArmConfig:
    """What the command line says of a real arm."""

    profile: Path
    """The lab's TOML file (robot_client/profile.py)."""
    camera: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=MAKE[:DEVICE][,key=value...], once for each camera: front=realsense:1234,crop=square."""
    dry_run: bool = False
    """Reads everything and moves nothing."""


class RealArm:
    """Owns the robot and its cameras until close().

    make: the class of the hardware, which a process of its own constructs from profile.hardware.
    dry_run: reads everything and moves nothing: apply() says that nothing was sent.
    picture_s: how long the cameras may take to show something at a reset.

    Raises ArmError when the robot cannot be reached, BadProfile when it has other joints than its profile.
    """

    def __init__(
        self,
        make: Callable[..., Hardware],
        profile: Profile,
        cameras: Mapping[str, Camera],
        *,
        dry_run: bool = False,
        picture_s: float = 10.0,
    ):
        self.stopped: Callable[[], str] = lambda: ""
        """Asked on the way home: why the arm must stop, empty when it need not."""
        self._profile = profile
        self._cameras = dict(cameras)
        self._dry_run = dry_run
        self._picture_s = picture_s
        self._base, self._tool = profile.frame.base, profile.frame.tool
        self._tick_s = 1 / profile.tick_rate_hz
        self._spec = arm_spec(profile, tuple(cameras))
        if dry_run:
            self._spec = replace(self._spec, name=f"{profile.arm} (dry run)")
        self._servo = ServoLink(make, profile.hardware, profile.motion, tick_s=self._tick_s)
        self._instruction = ""
        self._tick = 0
        self._turn_rad = DOWNWARDS_RAD
        try:
            self._status = self._servo.status()
            require_angles(profile, len(self._status.reading.joints_J))
        except RobotError:
            self.close()
            raise
        self._gripper = self._status.reading.opening

    @classmethod
    def of(cls, arm: str, make: Callable[..., Hardware], config: RealArmConfig) -> RealArm:
        """As the command line says.  Raises BadProfile, CameraError, UnknownCamera or ArmError; nothing moves yet."""
        profile = read_profile(config.profile)
        if profile.arm != arm:
            raise BadProfile(f"{config.profile}: arm must be {arm!r}, got {profile.arm!r}")
        names = [text.partition("=")[0] for text in config.camera]
        if len(set(names)) < len(names):
            raise CameraError(f"each --camera must have a name of its own, got {names}")
        with ExitStack() as stack:
            opened = [stack.enter_context(closing(cameras.parse(text))) for text in config.camera]
            made = cls(make, profile, {camera.name: camera for camera in opened}, dry_run=config.dry_run)
            stack.pop_all()  # the cameras are the arm's now
        return made

    @property
    def spec(self) -> ArmSpec:
        return self._spec

    def reset(self, task: Task) -> None:
        """Goes home, slowly, and waits for the cameras.  A fault of the robot is left to a person: recover()."""
        self._instruction, self._tick, self._turn_rad = task.instruction, 0, DOWNWARDS_RAD
        self._read()
        self._wait_for_frames()
        if self._dry_run:
            return
        home = self._profile.home
        self._gripper, opening = home.opening, self._profile.gripper.told(home.opening)
        joints_J, until_s = np.array(home.joints_rad), time.monotonic() + home.patience_s
        go_home = partial(self._servo.go_home, joints_J, home.speed, opening)
        while (status := self._command(go_home, self._expires_s)).moving or status.trouble:  # one came late: the next
            late = f"the robot has not come home in {home.patience_s:g} s" if time.monotonic() > until_s else ""
            if trouble := self.stopped() or late:
                self._servo.release()
                raise ArmError(f"on the way home: {trouble}")
            time.sleep(POLL_S)
        self._servo.cadence()  # begins a new count

    def state(self) -> ArmState:
        status = self._read()
        return ArmState(
            tick=self._tick,
            state_S=self._state_S(status),
            trouble=status.trouble,
            blind="; ".join(filter(None, (camera.trouble() for camera in self._cameras.values()))),
            goal_m=self._seen_by_policy(status.goal).position_m,
        )

    def observe(self) -> Observation:
        frames = {name: camera.latest() for name, camera in self._cameras.items()}
        return Observation(
            images={name: frame.image for name, frame in frames.items()},
            state_S=self._state_S(self._status),
            instruction=self._instruction,
            capture_time_ns=min((frame.capture_time_ns for frame in frames.values()), default=time.monotonic_ns()),
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray | None:
        if self._dry_run:
            self._tick += 1
            log.info("dry run: would apply %s", np.array2string(action_A, precision=3))
            return self._still_A()
        scale = self._profile.scale
        # The policy's axes are those of its own frame: a move and a turn are vectors there.
        to_base = self._base.rotation.T
        change_6 = np.concatenate([to_base @ action_A[:3] * scale.metres, to_base @ action_A[3:6] * scale.radians])
        gripper = self._profile.gripper.decided(float(action_A[6]), before=self._gripper)
        if self._command(self._servo.go, change_6, self._profile.gripper.told(gripper), self._expires_s).trouble:
            return None  # it came in between, and nothing was sent
        self._tick += 1
        self._gripper = gripper
        return np.append(action_A[:6], gripper).astype(np.float32)

    def hold(self) -> np.ndarray:
        self._command(self._servo.hold, self._status.trouble)
        return self._still_A()

    def cadence(self) -> CadenceReport:
        """How well the servo kept its rate since the last call, or the last reset."""
        return self._servo.cadence()

    def report(self) -> str:
        """How well the servo kept its rate since the last reset, and what became of each camera's frames."""
        lines = [f"servo: {self.cadence()}"]
        lines += [f"camera {name}: {camera.report()}" for name, camera in self._cameras.items()]
        return "\n".join(lines)

    def recover(self) -> None:
        """Clears a fault: only ever at a person's word."""
        self._command(self._servo.recover)

    def close(self) -> None:
        self._servo.close()
        for camera in self._cameras.values():
            camera.close()

    @property
    def _expires_s(self) -> float:
        return time.monotonic() + self._profile.expire_ticks * self._tick_s

    def _read(self) -> Status:
        return self._command(self._servo.status)

    def _command(self, command: Callable[..., Status], *arguments) -> Status:
        self._status = command(*arguments)
        if self._status.reading.fault:
            raise ArmError(f"{self._profile.arm}: {self._status.reading.fault}")
        return self._status

    def _wait_for_frames(self) -> None:
        until_s = time.monotonic() + self._picture_s
        while troubles := [trouble for camera in self._cameras.values() if (trouble := camera.trouble())]:
            if time.monotonic() > until_s:
                raise ArmError(f"no usable picture in {self._picture_s:g} s: {'; '.join(troubles)}")
            time.sleep(POLL_S)

    def _seen_by_policy(self, pose: Pose) -> Pose:
        return self._base @ pose @ self._tool

    def _state_S(self, status: Status) -> np.ndarray:
        eef, finger_m = (
            self._seen_by_policy(status.reading.pose),
            status.reading.opening * self._profile.gripper.finger_m,
        )
        fingers = [finger_m, -finger_m]
        joints_J = status.reading.joints_J
        # Beyond pi it goes on, as LIBERO's does: a gripper that points down would jump between two signs.
        self._turn_rad = same_turn_near(eef.rotation_vector_rad, self._turn_rad)
        return np.concatenate([eef.position_m, self._turn_rad, fingers, joints_J]).astype(np.float32)

    def _still_A(self) -> np.ndarray:
        return np.array([0.0] * 6 + [self._gripper], np.float32)


def require_angles(profile: Profile, joints: int) -> None:
    """Raises BadProfile where a list of the profile's has not one angle for each of the robot's joints."""
    home_J, low_J = profile.home.joints_rad, profile.motion.joints_low_rad  # joints_high_rad has as many as the latter
    for name, angles_J in (("home.joints_rad", home_J), ("motion.joints_low_rad", low_J)):
        if len(angles_J) not in (joints, 0):
            raise BadProfile(f"{name} must have {joints} angles, got {len(angles_J)}")


def arm_spec(profile: Profile, image_names: tuple[str, ...]) -> ArmSpec:
    """What the profile promises, with its limits in units of the action."""
    scale, motion = profile.scale, profile.motion
    closed, opened = profile.gripper.range
    return ArmSpec(
        name=profile.arm,
        action_names=ACTION_NAMES,
        image_names=image_names,
        state_names=(*STATE_NAMES, *(f"joint_{j + 1}" for j in range(len(profile.home.joints_rad)))),
        tick_rate_hz=profile.tick_rate_hz,
        lockstep=False,
        limits=Limits(
            low=(-profile.step,) * 6 + (closed,),
            high=(profile.step,) * 6 + (opened,),
            workspace=Workspace(
                low_m=profile.workspace.low_m, high_m=profile.workspace.high_m, metres_per_unit=scale.metres
            ),
            longest_move=motion.speed_m_s / profile.tick_rate_hz / scale.metres,
            longest_turn=motion.speed_rad_s / profile.tick_rate_hz / scale.radians,
            slow_start_ticks=round(profile.slow_start_s * profile.tick_rate_hz),
        ),
    )
