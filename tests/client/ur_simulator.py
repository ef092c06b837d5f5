"""A Universal Robots controller (UR5e, PolyScope 5) on a loopback address, as far as ur_rtde 1.6.5 looks at one.

It is a process of its own: ur_rtde connects while it holds Python's lock, so a thread beside it could not answer.
Real are the wire (RTDE on 30004, the dashboard on 29999, scripts on 30003, Robotiq's URCap on 63352), the registers
through which ur_rtde talks to the script that it uploads, the kinematics (Denavit-Hartenberg, joints and pose agree)
and the watchdog on the registers.  Not modelled:

- URScript: any uploaded program counts as ur_rtde's own, of whose commands there are SERVO_L, SERVO_STOP, MOVE_J,
  STOP_J, SET_WATCHDOG and STOP_SCRIPT; another one ends the program, as an error in the script does.
- Dynamics: servoL is a first-order follower with the look-ahead as its time constant and the joints' top speed; gain,
  loads, joint limits and collisions are not there.  A protective or emergency stop halts at once, brakes do not sag,
  and that a protective stop pauses the program is what the manuals say: it was never seen on a real controller.
- An interface on 30001 or 30002, the data stream of 30003, text messages, pop-ups, the tool's own offset, who owns an
  input register, an object between the fingers.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import selectors
import socket
import struct
import time
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robot_client.pose import Pose

PERIOD_S = 0.002
TOP_SPEED_RAD_S = math.pi
STOP_RAD_S2 = 20.0
"""How hard the arm brakes when its program ends."""
STALL_S = 0.5
"""When this process gets no CPU, its clock catches up by so much and stands still for the rest."""
HOME_RAD = (0.0, -math.pi / 2, math.pi / 2, -math.pi / 2, -math.pi / 2, 0.0)

LINK_M = np.array([0.0, -0.425, -0.3922, 0.0, 0.0, 0.0])
OFFSET_M = np.array([0.1625, 0.0, 0.0, 0.1333, 0.0997, 0.0996])
TWIST_RAD = np.array([math.pi / 2, 0.0, 0.0, math.pi / 2, -math.pi / 2, 0.0])
"""a, d and alpha of a UR5e (universal-robots.com, article 45257)."""

# Values of the RTDE guide.
STOPPED, PLAYING, PAUSED = 1, 2, 4
POWER_OFF, IDLE, RUNNING = 3, 5, 7
NORMAL, PROTECTIVE_STOP, ROBOT_EMERGENCY_STOP = 1, 3, 7
SAFETY_BITS = {NORMAL: 1 << 0, PROTECTIVE_STOP: 1 << 2 | 1 << 10, ROBOT_EMERGENCY_STOP: 1 << 6 | 1 << 7 | 1 << 10}
SAFETY_NAMES = {NORMAL: "NORMAL", PROTECTIVE_STOP: "PROTECTIVE_STOP", ROBOT_EMERGENCY_STOP: "ROBOT_EMERGENCY_STOP"}
MODE_NAMES = {POWER_OFF: "POWER_OFF", IDLE: "IDLE", RUNNING: "RUNNING"}

# What ur_rtde's script reads in its first integer register, and what it answers there.
MOVE_J, SERVO_STOP, SERVO_L, STOP_J, SET_WATCHDOG, STOP_SCRIPT = 1, 16, 24, 34, 35, 255
READY, DONE = 1, 2

LAYOUT = {"INT32": "i", "UINT32": "I", "DOUBLE": "d", "VECTOR6D": "6d"}
TYPES = {
    "timestamp": "DOUBLE",
    "actual_q": "VECTOR6D",
    "actual_TCP_pose": "VECTOR6D",
    "robot_mode": "INT32",
    "safety_mode": "INT32",
    "runtime_state": "UINT32",
    "robot_status_bits": "UINT32",
    "safety_status_bits": "UINT32",
    "external_force_torque": "VECTOR6D",
}
for _i in range(24):
    for _way in ("input", "output"):
        TYPES[f"{_way}_int_register_{_i}"], TYPES[f"{_way}_double_register_{_i}"] = "INT32", "DOUBLE"

Motion = Generator[None, None, None]
"""One step a period."""


def frames(joints_6: np.ndarray) -> np.ndarray:
    """(7, 4, 4): the base, then what each joint carries, in the base frame; the last is the flange."""
    frames_744 = np.empty((7, 4, 4))
    frames_744[0] = np.eye(4)
    for i, (joint, a, d, twist) in enumerate(zip(joints_6, LINK_M, OFFSET_M, TWIST_RAD, strict=True)):
        c, s, ct, st = math.cos(joint), math.sin(joint), math.cos(twist), math.sin(twist)
        link_44 = [[c, -s * ct, s * st, a * c], [s, c * ct, -c * st, a * s], [0, st, ct, d], [0, 0, 0, 1]]
        frames_744[i + 1] = frames_744[i] @ np.array(link_44)
    return frames_744


def forward(joints_6: np.ndarray) -> Pose:
    flange_44 = frames(joints_6)[-1]
    return Pose(flange_44[:3, 3], flange_44[:3, :3])


def jacobian(joints_6: np.ndarray) -> np.ndarray:
    """(6, 6): the flange's metres and radians along the base's axes, per radian of each joint."""
    frames_744 = frames(joints_6)
    axes_63, origins_63 = frames_744[:6, :3, 2], frames_744[:6, :3, 3]
    return np.hstack([np.cross(axes_63, frames_744[-1, :3, 3] - origins_63), axes_63]).T


def inverse(pose: Pose, near_6: np.ndarray) -> np.ndarray:
    """The joints (6,) of a pose, by Newton's method from joints near it; raises ScriptError when there are none."""
    joints_6 = near_6
    for _ in range(20):
        error_6 = forward(joints_6).change_to(pose)
        if np.abs(error_6).max() < 1e-9:
            return joints_6
        step_6 = np.linalg.lstsq(jacobian(joints_6), error_6, rcond=1e-6)[0]
        joints_6 = joints_6 + np.clip(step_6, -0.5, 0.5)
    raise ScriptError("no inverse kinematics")


class ScriptError(Exception):
    """The program ends, as on the real controller."""


class Controller:
    """The arm, its safety and the program that ur_rtde uploads; one step() a period."""

    def __init__(self) -> None:
        self.joints_6, self.speed_6 = np.array(HOME_RAD), np.zeros(6)
        self.time_s = self.late_s = 0.0
        self.robot_mode, self.safety_mode, self.runtime = RUNNING, NORMAL, STOPPED
        self.remote = True
        self.may_unlock = True
        self.inputs: dict[str, Any] = {name: 0 for name in TYPES}
        self.outputs: dict[str, Any] = {name: 0 for name in TYPES}
        self.set_points = self.uploads = 0
        self._program: Motion | None = None
        self._motion: Motion | None = None
        self._servo_pose_6 = np.zeros(0)
        self._servo_target_6: np.ndarray | None = None
        self._servo_s = 0.1
        self._operation = 0
        self._watchdog_s, self._written_s = math.inf, 0.0

    # What comes from outside.

    def upload(self) -> None:
        """A script has arrived; it takes the place of the one before."""
        self.uploads += 1
        if self.remote and self.robot_mode == RUNNING and self.safety_mode == NORMAL:
            self._halt()
            self._program, self.runtime = self._rtde_control(), PLAYING

    def write(self, values: dict[str, Any]) -> None:
        self.inputs.update(values)
        if "input_int_register_0" in values:
            self._written_s = self.time_s + self.late_s
            self.set_points += values["input_int_register_0"] == SERVO_L

    def go_home(self) -> None:
        """At once, by nobody's command."""
        self.joints_6, self.speed_6 = np.array(HOME_RAD), np.zeros(6)

    def put_right(self) -> None:
        """As a person leaves it: in remote control, under power, nothing stopped."""
        self.robot_mode, self.safety_mode, self.remote = RUNNING, NORMAL, True

    def end_program(self) -> None:
        if self._program is not None:
            self._halt()
            self._motion = self._brake(float(np.abs(self.speed_6).max()) / STOP_RAD_S2)

    def protective_stop(self) -> None:
        self.safety_mode = PROTECTIVE_STOP
        self.runtime = PAUSED if self._program is not None else STOPPED
        self._motion, self.speed_6 = None, np.zeros(6)

    def emergency_stop(self) -> None:
        self._halt()
        self.safety_mode, self.robot_mode, self.speed_6 = ROBOT_EMERGENCY_STOP, POWER_OFF, np.zeros(6)

    def release_emergency_stop(self) -> None:
        self.safety_mode = NORMAL

    def dashboard(self, line: str) -> str:
        """The answer to one command, in the controller's words."""
        if line == "unlock protective stop":
            if not self.may_unlock:
                return "Cannot unlock protective stop until 5s after occurrence"
            if self.safety_mode == PROTECTIVE_STOP:
                self.safety_mode = NORMAL
            return "Protective stop releasing"
        if line == "stop":
            self.end_program()
        if line == "power on" and self.safety_mode == NORMAL:
            self.robot_mode = IDLE
        if line == "brake release" and self.safety_mode == NORMAL:
            self.robot_mode = RUNNING
        answers = {
            "PolyscopeVersion": "URSoftware 5.12.2.1101534 (Jul 06 2022)",
            "get serial number": "20225500001",
            "is in remote control": "true" if self.remote else "false",
            "safetymode": f"Safetymode: {SAFETY_NAMES[self.safety_mode]}",
            "robotmode": f"Robotmode: {MODE_NAMES[self.robot_mode]}",
            "safetystatus": f"Safetystatus: {SAFETY_NAMES[self.safety_mode]}",
            "close safety popup": "closing safety popup",
            "stop": "Stopped",
            "power on": "Powering on",
            "brake release": "Brake releasing",
        }
        return answers.get(line, f"could not understand: {line}")

    # A period.

    def step(self) -> None:
        self.time_s += PERIOD_S
        if self.runtime == PLAYING:
            if self.time_s - self._written_s > self._watchdog_s:
                self.end_program()
            try:
                if self._program is not None:
                    next(self._program)
            except (StopIteration, ScriptError):
                self.end_program()
        if self._motion is not None and next(self._motion, self) is self:
            self._motion = None
        self.joints_6 = self.joints_6 + self.speed_6 * PERIOD_S

    @property
    def is_led(self) -> bool:
        """By set points."""
        return self._servo_target_6 is not None

    @property
    def pose(self) -> Pose:
        return forward(self.joints_6)

    def refresh(self) -> None:
        """The outputs that are not registers."""
        pose = self.pose
        self.outputs.update(
            timestamp=self.time_s,
            actual_q=self.joints_6,
            actual_TCP_pose=np.concatenate([pose.position_m, pose.rotation_vector_rad]),
            robot_mode=self.robot_mode,
            safety_mode=self.safety_mode,
            runtime_state=self.runtime,
            robot_status_bits=(self.robot_mode == RUNNING) | (self.runtime == PLAYING) << 1,
            safety_status_bits=SAFETY_BITS[self.safety_mode],
        )

    def _halt(self) -> None:
        self._end_servo()
        self._program = None
        self._watchdog_s, self.runtime = math.inf, STOPPED

    def _rtde_control(self) -> Motion:
        """The main loop of ur_rtde's script: a yield is its sync()."""
        commands: dict[int, Callable[[], Motion]] = {
            MOVE_J: self._move_j,
            SERVO_STOP: self._servo_stop,
            STOP_J: self._stop_j,
            SET_WATCHDOG: self._set_watchdog,
        }
        executing = False
        while (command := self.inputs["input_int_register_0"]) != STOP_SCRIPT:
            if command == SERVO_L:
                self._servo_l()
            elif command and not executing:
                executing = True
                if command not in commands:
                    raise ScriptError(f"command {command} is not modelled")
                yield from commands[command]()
                self.outputs["output_int_register_0"] = DONE
            if command in (0, SERVO_L):
                executing = False
                self.outputs["output_int_register_0"] = READY
            yield

    def _servo_l(self) -> None:
        target_6 = self._numbers(6)
        self._servo_s = self.inputs["input_double_register_9"]
        if self._motion is not None and not self.is_led:
            raise ScriptError("another thread is already controlling the robot")
        if self._motion is None:
            self._motion = self._follow()
        if not np.array_equal(target_6, self._servo_pose_6):
            self._servo_pose_6 = target_6
            self._servo_target_6 = inverse(Pose.of(target_6[:3], target_6[3:]), self.joints_6)

    def _servo_stop(self) -> Motion:
        self._end_servo()
        self._motion = self._brake_tool(self._numbers(1)[0])
        while self._motion is not None:
            yield

    def _move_j(self) -> Motion:
        if self.is_led:
            raise ScriptError("another thread is already controlling the robot")
        *joints_6, speed_rad_s, acceleration_rad_s2 = self._numbers(8)
        self._motion = self._asynchronous(self._travel(np.array(joints_6), speed_rad_s, acceleration_rad_s2))
        yield

    def _stop_j(self) -> Motion:
        # The script of 1.6.5 has the thread of an asynchronous stopj call stopl.
        self._motion = self._asynchronous(self._brake_tool(self._numbers(1)[0]))
        yield

    def _set_watchdog(self) -> Motion:
        self._watchdog_s, self._written_s = 1 / self._numbers(1)[0], self.time_s
        yield

    def _numbers(self, count: int) -> np.ndarray:
        return np.array([self.inputs[f"input_double_register_{i}"] for i in range(count)], float)

    def _end_servo(self) -> None:
        self._motion, self._servo_target_6, self._servo_pose_6 = None, None, np.zeros(0)

    # Motions: each sets the joints' speed, once a period.

    def _follow(self) -> Motion:
        while self._servo_target_6 is not None:
            speed_6 = (self._servo_target_6 - self.joints_6) / self._servo_s
            self.speed_6 = speed_6 * min(1.0, TOP_SPEED_RAD_S / max(np.abs(speed_6).max(), 1e-9))
            yield

    def _travel(self, goal_6: np.ndarray, speed_rad_s: float, acceleration_rad_s2: float) -> Motion:
        """A straight line in the joints, a trapezoid of speed along its leading axis."""
        pace_rad_s = 0.0
        while (left_rad := np.abs(goal_6 - self.joints_6).max()) > 1e-6:
            rising_rad_s = pace_rad_s + acceleration_rad_s2 * PERIOD_S
            pace_rad_s = min(rising_rad_s, speed_rad_s, math.sqrt(2 * acceleration_rad_s2 * left_rad))
            self.speed_6 = (goal_6 - self.joints_6) * min(pace_rad_s / left_rad, 1 / PERIOD_S)
            yield
        self.speed_6 = np.zeros(6)

    def _brake_tool(self, deceleration: float) -> Motion:
        """deceleration: of the tool, m/s^2 and rad/s^2, whichever takes longer."""
        tool_6 = jacobian(self.joints_6) @ self.speed_6
        yield from self._brake(max(np.linalg.norm(tool_6[:3]), np.linalg.norm(tool_6[3:])) / deceleration)

    def _brake(self, duration_s: float) -> Motion:
        steps = math.ceil(duration_s / PERIOD_S)
        start_6 = self.speed_6
        for i in range(1, steps + 1):
            self.speed_6 = start_6 * (1 - i / steps)
            yield
        self.speed_6 = np.zeros(6)

    def _asynchronous(self, motion: Motion) -> Motion:
        """The same, with its progress in the register where ur_rtde looks for it."""
        self._operation = (self._operation + 1) % 128
        self.outputs["output_int_register_2"] = self._operation << 24 | 1 << 15
        yield from motion
        self.outputs["output_int_register_2"] = self._operation << 24


class Gripper:
    """Robotiq's URCap: one line asks, one answers, without its end."""

    SPEED = 255 / 0.6
    """Positions a second at full speed."""

    def __init__(self) -> None:
        self.values = {"ACT": 0, "STA": 0, "GTO": 0, "POS": 3.0, "PRE": 3, "SPE": 255, "FOR": 0, "OBJ": 3, "FLT": 0}
        self.low, self.high = 3, 230
        self._left_s = 0.0

    def answer(self, line: str) -> str:
        verb, *words = line.split()
        if verb == "GET" and words[0] in self.values:
            return f"{words[0]} {int(self.values[words[0]])}"
        if verb != "SET":
            return "?"
        for name, value in zip(words[::2], words[1::2], strict=True):
            self.values["PRE" if name == "POS" else name] = int(value)
        if "ACT" in words:
            self.values["STA"], self.values["FLT"], self._left_s = 0, 0, 0.2
        return "ack"

    def step(self) -> None:
        values = self.values
        if values["ACT"] and values["STA"] != 3:
            self._left_s -= PERIOD_S
            values["STA"] = 3 if self._left_s <= 0 else 1
        if values["STA"] == 3 and values["GTO"] and not values["FLT"]:
            goal = min(max(values["PRE"], self.low), self.high)
            reach = self.SPEED * max(values["SPE"], 1) / 255 * PERIOD_S
            values["POS"] += min(max(goal - values["POS"], -reach), reach)


class _Channel:
    """One accepted connection: bytes in, bytes out."""

    def __init__(self, link: socket.socket):
        self.link = link
        self._received = b""
        self.recipes: list[list[str]] = []
        self.outputs: list[str] = []
        self.every, self.due, self.started = 1, 0, False

    def receive(self) -> bool:
        """False when the other side is gone."""
        try:
            data = self.link.recv(1 << 16)
        except OSError:
            return False
        self._received += data
        return bool(data)

    def send(self, data: bytes) -> None:
        try:
            self.link.sendall(data)
        except OSError:
            self.started = False

    def lines(self) -> list[str]:
        *lines, self._received = self._received.split(b"\n")
        return [line.decode().rstrip() for line in lines]

    def packages(self) -> list[tuple[str, bytes]]:
        """RTDE's: what kind, and the payload."""
        packages = []
        while len(self._received) >= 3:
            length, kind = struct.unpack_from(">HB", self._received)
            if len(self._received) < length:
                break
            packages.append((chr(kind), self._received[3:length]))
            self._received = self._received[length:]
        return packages

    def send_package(self, kind: str, payload: bytes) -> None:
        self.send(struct.pack(">HB", 3 + len(payload), ord(kind)) + payload)


class Simulator:
    """The controller behind its ports, in one loop."""

    def __init__(self, host: str):
        self.controller, self.gripper = Controller(), Gripper()
        self._host = host
        self._selector = selectors.DefaultSelector()
        self._servers: dict[int, socket.socket] = {}
        self._channels: dict[int, list[_Channel]] = {port: [] for port in self._services}
        self._silent = False
        self.open()

    @property
    def _services(self) -> dict[int, Callable[[_Channel], None]]:
        return {29999: self._dashboard, 30003: self._script, 30004: self._rtde, 63352: self._urcap}

    def open(self) -> None:
        for port in self._services:
            self._servers[port] = server = socket.create_server((self._host, port))
            self._selector.register(server, selectors.EVENT_READ, lambda port=port: self._accept(port))

    def disconnect(self, refuse: bool) -> None:
        """Every connection breaks; refuse: and no other one is let in until open()."""
        for channel in [channel for channels in self._channels.values() for channel in channels]:
            self._drop(channel)
        if refuse:
            for server in self._servers.values():
                self._selector.unregister(server)
                server.close()
            self._servers.clear()

    def be_silent(self, silent: bool) -> None:
        """Connections stay, and nothing comes: a cable that is pulled.  What was sent meanwhile arrives later."""
        self._silent = silent
        if not silent:
            for port, channels in self._channels.items():
                for channel in channels:
                    self._services[port](channel)

    def state(self) -> dict[str, Any]:
        controller = self.controller
        return {
            "position_m": controller.pose.position_m,
            "speed_rad_s": float(np.abs(controller.speed_6).max()),
            "led": controller.is_led,
            "runtime": controller.runtime,
            "set_points": controller.set_points,
            "uploads": controller.uploads,
            "force": self.gripper.values["FOR"],
            "gripper": dict(self.gripper.values),
            "time_s": controller.time_s,
        }

    def run(self, person: Connection) -> None:
        """Until the person goes away."""
        self._selector.register(person, selectors.EVENT_READ, None)
        next_s, period = time.monotonic(), 0
        while True:
            ready = self._selector.select(max(0.0, next_s - time.monotonic()))
            next_s = max(next_s, time.monotonic() - STALL_S)
            self.controller.late_s = max(0.0, time.monotonic() - next_s)
            for key, _ in ready:
                if key.data is not None:
                    key.data()
                    continue
                try:
                    name, arguments = person.recv()
                except (EOFError, OSError):
                    return
                owner = self if hasattr(self, name) else self.controller
                person.send(getattr(owner, name)(*arguments))
            stream = False
            while time.monotonic() >= next_s:
                self.controller.step()
                self.gripper.step()
                next_s, period, stream = next_s + PERIOD_S, period + 1, True
            if stream:
                self._stream(period)

    def gripper_fault(self, code: int) -> None:
        self.gripper.values["FLT"] = code

    def set_remote(self, remote: bool) -> None:
        self.controller.remote = remote

    def set_unlock(self, may_unlock: bool) -> None:
        """Whether the 5 s are over in which a real controller refuses to release a protective stop."""
        self.controller.may_unlock = may_unlock

    def _stream(self, period: int) -> None:
        self.controller.refresh()
        outputs = self.controller.outputs
        for channel in self._channels[30004]:
            if channel.started and not self._silent and period >= channel.due:
                channel.due = period + channel.every
                layout = ">B" + "".join(LAYOUT[TYPES[name]] for name in channel.outputs)
                channel.send_package("U", struct.pack(layout, 1, *_flat(outputs[name] for name in channel.outputs)))

    def _accept(self, port: int) -> None:
        link, _ = self._servers[port].accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = _Channel(link)
        self._channels[port].append(channel)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._serve(port, channel))
        if port == 29999:
            channel.send(b"Connected: Universal Robots Dashboard Server\n")

    def _serve(self, port: int, channel: _Channel) -> None:
        if not channel.receive():
            self._drop(channel)
        elif not self._silent:
            self._services[port](channel)

    def _drop(self, channel: _Channel) -> None:
        for channels in self._channels.values():
            if channel in channels:
                channels.remove(channel)
        with contextlib.suppress(ValueError):  # dropped already
            self._selector.unregister(channel.link)
        channel.link.close()

    def _dashboard(self, channel: _Channel) -> None:
        for line in channel.lines():
            channel.send(self.controller.dashboard(line).encode() + b"\n")

    def _script(self, channel: _Channel) -> None:
        if "end" in channel.lines():  # not indented: the last line of a program
            self.controller.upload()

    def _urcap(self, channel: _Channel) -> None:
        for line in channel.lines():
            channel.send(self.gripper.answer(line).encode())

    def _rtde(self, channel: _Channel) -> None:
        for kind, payload in channel.packages():
            if kind == "V":
                channel.send_package("V", b"\1")
            elif kind == "v":
                channel.send_package("v", struct.pack(">4I", 5, 12, 2, 1101534))
            elif kind == "O":
                channel.outputs = _names(payload[8:])
                channel.every = max(1, round(1 / (PERIOD_S * struct.unpack_from(">d", payload)[0])))
                channel.send_package("O", b"\1" + _types(channel.outputs))
            elif kind == "I":
                channel.recipes.append(_names(payload))
                channel.send_package("I", bytes([len(channel.recipes)]) + _types(channel.recipes[-1]))
            elif kind in "SP":
                channel.started = kind == "S"
                channel.send_package(kind, b"\1")
            elif kind == "U":
                self._write(channel.recipes[payload[0] - 1], payload[1:])

    def _write(self, names: list[str], payload: bytes) -> None:
        values = iter(struct.unpack(">" + "".join(LAYOUT[TYPES[name]] for name in names), payload))
        self.controller.write({name: next(values) for name in names if TYPES[name] != "VECTOR6D"})


def _names(text: bytes) -> list[str]:
    return [name for name in text.decode().split(",") if name]


def _types(names: list[str]) -> bytes:
    return ",".join(TYPES.get(name, "NOT_FOUND") for name in names).encode()


def _flat(values: Any) -> list[Any]:
    return [number for value in values for number in (value if isinstance(value, np.ndarray) else (value,))]


def _serve(person: Connection) -> None:
    """The process: on the first loopback address of which no other simulator has the ports."""
    for last in range(1, 255):
        try:
            simulator = Simulator(f"127.0.30.{last}")
        except OSError:
            continue
        person.send(f"127.0.30.{last}")
        simulator.run(person)
        return


class URSimulator:
    """The person at the robot: `host` to connect to, and what only a person can do there."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._person, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.host: str = self._person.recv()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """A method of Simulator or Controller, between two periods."""
        self._person.send((name, arguments))
        return self._person.recv()

    def close(self) -> None:
        self._person.close()
        self._process.join()
