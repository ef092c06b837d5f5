"""An xArm's controller on a loopback address, as far as the vendor's SDK 1.18.4 looks at it.

Real are the ports (502 control, 503 for the field bus, 30003 report at 100 Hz), their wire, the modes and states, the
limits on set points and speeds, error and warning codes, the two grippers' registers.  Not modelled:

- Kinematics: the tool centre point and the joints are two separate things, neither moves the other; so there are no
  C21 to C24 by themselves, no workspace, no self-collision.
- Dynamics: what moves does so at its top speed and stops at once.  Speeds in servo mode above 1 m/s lag, where a real
  arm may also stop with C24.
- The queue of position mode (a new joint motion replaces the one before), blending, pauses that go on later.
- Timing of the firmware: every answer is immediate but the field bus's; a mode is in force 50 ms later (ours: the
  vendor's examples wait 100 ms), brakes take no time, commands above 250 Hz are not dropped.
- The other report ports (30000 to 30002), tool offset, load, collision settings, several clients, standard Modbus.

An unknown command is answered as the vendor documents, with warning W13, and remembered in `unknown`; motion that is
not carried out is remembered in `refused`.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable

import numpy as np

from robot_client.pose import Pose

MODELS = {
    "xarm5": "5,5,XF1304,AC1304",
    "xarm6": "6,6,XI1304,AC1304",
    "xarm7": "7,7,XS1304,AC1304",
    "lite6": "6,9,LI1006,DL1000",
    "850": "6,12,FX8510,AC8500",
}
"""Axes, type, arm and control box, as the version tells them."""
HOME_7 = np.full(7, -0.6)
"""rad; within every model's limits but the xArm 7's."""
REPORT_S = 0.01
MODE_CHANGE_S = 0.05
MAX_STEP_M = 0.01
MAX_SPEED_M_S = 1.0
MAX_SPEED_RAD_S = math.pi
GRIPPER_PULSES_S = 1700.0
"""At 5000 r/min; ours."""

POSITION, SERVO = 0, 1
MOVING, RESTING, PAUSED, STOPPED, CHANGING = 1, 2, 3, 4, 5
EMERGENCY_STOP, UNKNOWN_COMMAND = 1, 13
HAS_ERROR, HAS_WARNING, CANNOT_MOVE = 0x40, 0x20, 0x10
HOST, GRIPPER = 9, 8
READ, WRITE = 0x03, 0x10
GRIPPER_ERROR, GRIPPER_CLEAR, GRIPPER_TARGET, GRIPPER_POSITION = 0x000F, 0x0109, 0x0700, 0x0702
DIGITAL_OUT = 0x0A15


class XArmSimulator:
    """Attributes may be read and set by a test at any time."""

    def __init__(self, host: str, *, model: str = "xarm6", firmware: str = "v2.7.1", bus_s: float = 0.0):
        """bus_s: how long the field bus takes to answer.  Raises OSError when the ports cannot be bound."""
        self.host = host
        self.version = f"{MODELS[model]},{firmware}"
        self.bus_s = bus_s
        self.pose = Pose.of((0.3, 0.0, 0.2), (math.pi, 0.0, 0.0))
        self.joints_7 = HOME_7
        self.error = self.warning = self.gripper_error = 0
        self.powered = False
        self.outputs = [False, False]
        self.commands: list[int] = []
        self.set_points: list[tuple[float, Pose]] = []
        """When it came (time.monotonic) and what it was, of all that were carried out."""
        self.refused: list[str] = []
        self.unknown: list[str] = []
        self.silent = False
        """Says nothing any more, as when a cable is pulled; nothing is closed."""
        self.told_apart = Pose.of((0.0, 0.0, 0.0))
        """How its pose by axis and angle differs from the reported one; on a real arm: not at all."""

        self._lock = threading.RLock()
        self._mode, self._state, self._settles_s, self._mode_before = POSITION, STOPPED, 0.0, POSITION
        self._goal: Pose | None = None
        self._joints_goal_7, self._joints_speed = HOME_7, 0.0
        self._pulses = self._pulses_goal = 850.0
        self._now_s = time.monotonic()
        self._pressed = False
        self._handlers: dict[int, Callable[[bytes], bytes]] = {
            1: lambda _: self.version.encode().ljust(40, b"\0"),
            11: self._power,
            12: self._set_state,
            13: lambda _: bytes([self.state]),
            15: lambda _: bytes([self.error, self.warning]),
            16: self._clean_error,
            17: self._clean_warning,
            19: self._set_mode,
            23: self._move_joints,
            91: self._pose_by_axis,
            93: self._servo,
            124: self._bus,
            127: self._tool_output,
            146: lambda _: b"",
        }
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        serves = {502: self._serve_control, 503: self._serve_control, 30003: self._serve_report}
        try:
            listeners = {port: self._keep(socket.create_server((host, port))) for port in serves}
        except OSError:
            self.close()
            raise
        for port, listener in listeners.items():
            self._start(self._accept, listener, serves[port])

    # What a test may do to it.

    @property
    def mode(self) -> int:
        return self._mode if time.monotonic() >= self._settles_s else self._mode_before

    @property
    def state(self) -> int:
        with self._lock:
            if time.monotonic() < self._settles_s:
                return CHANGING
            self._advance()
            return MOVING if self._state == RESTING and self._in_motion else self._state

    @property
    def opening(self) -> float:
        with self._lock:
            self._advance()
            return self._pulses / 850

    def where(self) -> Pose:
        with self._lock:
            self._advance()
            return self.pose

    def fail(self, error: int) -> None:
        """An error: motion ends, and the controller is back in position mode."""
        with self._lock:
            self._halt(STOPPED)
            self.error, self._mode = error, POSITION

    def press_emergency_stop(self) -> None:
        self.fail(EMERGENCY_STOP)
        self._pressed, self.powered = True, False

    def release_emergency_stop(self) -> None:
        self._pressed = False

    def interfere(self, *, state: int | None = None, mode: int | None = None) -> None:
        """What another client, or a person at the vendor's own panel, does."""
        with self._lock:
            self._halt(self._state if state is None else state)
            self._mode = self._mode if mode is None else mode

    def close(self) -> None:
        """Is switched off."""
        self._closed.set()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    # The wire.

    def _keep(self, end: socket.socket) -> socket.socket:
        end.settimeout(None)  # the SDK sets a default for the whole process
        self._sockets.append(end)
        return end

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with contextlib.suppress(OSError):
            while True:
                end = self._keep(listener.accept()[0])
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(serve, end)

    def _serve_control(self, end: socket.socket) -> None:
        """Transaction, protocol, length, register, parameters; an answer has a status after the register."""
        with contextlib.suppress(OSError), end.makefile("rb") as stream:
            while len(header := stream.read(6)) == 6:
                transaction, protocol, length = struct.unpack(">HHH", header)
                register, *rest = stream.read(length)
                status, data = self._answer(register, bytes(rest))
                answer = bytes([register, status]) + data
                if not self.silent:
                    end.sendall(struct.pack(">HHH", transaction, protocol, len(answer)) + answer)

    def _answer(self, register: int, parameters: bytes) -> tuple[int, bytes]:
        if register == 124:
            time.sleep(self.bus_s)
        with self._lock:
            self._advance()
            self.commands.append(register)
            if handle := self._handlers.get(register):
                data = handle(parameters)
            else:
                data, self.warning = b"", UNKNOWN_COMMAND
                self.unknown.append(f"command {register}")
            status = HAS_ERROR if self.error else HAS_WARNING if self.warning else 0
            return status | (0 if self._ready else CANNOT_MOVE), data

    def _serve_report(self, end: socket.socket) -> None:
        due_s = time.monotonic()
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                if not self.silent:
                    end.sendall(self._report())
                due_s += REPORT_S
                time.sleep(max(0.0, due_s - time.monotonic()))

    def _report(self) -> bytes:
        """135 bytes: what an arm with the room for a force sensor sends."""
        with self._lock:
            self._advance()
            state_mode = self.state | self.mode << 4
            body = struct.pack("<7f6f19f", *self.joints_7, *_mm_rpy(self.pose), *[0.0] * 19)
        return struct.pack(">IBH", 7 + len(body), state_mode, 0) + body

    # Motion: everything goes at its own speed from where it is to where it was sent, whenever somebody looks.

    @property
    def _in_motion(self) -> bool:
        return self._goal is not None or not np.array_equal(self.joints_7, self._joints_goal_7)

    @property
    def _ready(self) -> bool:
        return self.powered and not self.error and self._state == RESTING and time.monotonic() >= self._settles_s

    def _advance(self) -> None:
        now_s = time.monotonic()
        passed_s, self._now_s = now_s - self._now_s, now_s
        left_7 = self._joints_goal_7 - self.joints_7
        step = self._joints_speed * passed_s / max(float(np.abs(left_7).max()), 1e-12)
        self.joints_7 = self._joints_goal_7 if step >= 1 else self.joints_7 + step * left_7
        reach = GRIPPER_PULSES_S * passed_s
        self._pulses += float(np.clip(self._pulses_goal - self._pulses, -reach, reach))
        if self._goal is not None:
            left_6 = self.pose.change_to(self._goal)
            share = passed_s / max(
                float(np.linalg.norm(left_6[:3])) / MAX_SPEED_M_S,
                float(np.linalg.norm(left_6[3:])) / MAX_SPEED_RAD_S,
                1e-12,
            )
            self.pose = self._goal if share >= 1 else self.pose.moved(share * left_6)
            self._goal = None if share >= 1 else self._goal

    def _halt(self, state: int) -> None:
        self._advance()
        self._goal, self._joints_goal_7, self._state = None, self.joints_7, state

    # Commands.

    def _power(self, parameters: bytes) -> bytes:
        """Ends all motion, as a stop does."""
        self._halt(STOPPED)
        self.powered = bool(parameters[1]) and not self.error
        return b""

    def _set_state(self, parameters: bytes) -> bytes:
        if parameters[0] != 0:
            self._halt(parameters[0])
        elif self.powered and not self.error:
            self._state = RESTING
        return b""

    def _set_mode(self, parameters: bytes) -> bytes:
        self._mode_before = self.mode
        self._halt(CHANGING)
        self._mode, self._settles_s = parameters[0], time.monotonic() + MODE_CHANGE_S
        return b""

    def _clean_error(self, _: bytes) -> bytes:
        self.error = EMERGENCY_STOP if self._pressed else 0
        return b""

    def _clean_warning(self, _: bytes) -> bytes:
        self.warning = 0
        return b""

    def _pose_by_axis(self, _: bytes) -> bytes:
        told = self.pose @ self.told_apart
        return struct.pack("<6f", *told.position_m * 1e3, *told.rotation_vector_rad)

    def _takes(self, what: str, mode: int) -> bool:
        if self._ready and self.mode == mode:
            return True
        self.refused.append(f"{what} in mode {self.mode}, state {self.state}")
        return False

    def _move_joints(self, parameters: bytes) -> bytes:
        if self._takes("joint motion", POSITION):
            *joints, self._joints_speed, _acceleration, _time = struct.unpack("<10f", parameters)
            self._joints_goal_7 = np.array(joints)
        return b""

    def _servo(self, parameters: bytes) -> bytes:
        """Carries out the newest set point only, and none that is too far from the one before."""
        x, y, z, *vector, _speed, _acceleration = struct.unpack("<8f", parameters[:32])
        goal = Pose.of((x / 1e3, y / 1e3, z / 1e3), vector)
        if self._takes("set point", SERVO):
            step_m = float(np.linalg.norm(goal.position_m - (self._goal or self.pose).position_m))
            if step_m > MAX_STEP_M:
                self.refused.append(f"set point {step_m:.3f} m away")
            else:
                self._goal = goal
                self.set_points.append((time.monotonic(), goal))
        return b""

    def _bus(self, parameters: bytes) -> bytes:
        """The xArm's own gripper: Modbus RTU without its checksum."""
        host, device, function, address = struct.unpack(">BBBH", parameters[:5])
        if function == READ and address == GRIPPER_POSITION:
            data = struct.pack(">Bi", 4, round(self._pulses))
        elif function == READ and address == GRIPPER_ERROR:
            data = struct.pack(">BH", 2, self.gripper_error)
        elif function == WRITE:
            data = parameters[3:7]
            if address == GRIPPER_TARGET and not self.gripper_error:
                (self._pulses_goal,) = struct.unpack(">i", parameters[8:12])
            elif address == GRIPPER_CLEAR:
                self.gripper_error = 0
        else:
            self.unknown.append(f"field bus {parameters.hex()}")
            data = b""
        return bytes([host, device, function]) + data

    def _tool_output(self, parameters: bytes) -> bytes:
        """Two outputs, the Lite 6's gripper: a mask in the high byte says which of the low bits counts."""
        _host, address, value = struct.unpack(">BHf", parameters[:3] + parameters[3:7][::-1])
        if address != DIGITAL_OUT:
            self.unknown.append(f"tool output {parameters.hex()}")
        for i in range(2):
            if int(value) >> 8 & 1 << i:
                self.outputs[i] = bool(int(value) & 1 << i)
        return b""


def _mm_rpy(pose: Pose) -> list[float]:
    """x, y, z in mm; roll, pitch, yaw: turns about the base's own x, then y, then z."""
    R = pose.rotation
    pitch = math.atan2(-R[2, 0], math.hypot(R[0, 0], R[1, 0]))
    if math.cos(pitch) < 1e-6:  # only the difference of the other two shows
        return [*(1e3 * pose.position_m), math.atan2(-R[1, 2], R[1, 1]), pitch, 0.0]
    return [*(1e3 * pose.position_m), math.atan2(R[2, 1], R[2, 2]), pitch, math.atan2(R[1, 0], R[0, 0])]
