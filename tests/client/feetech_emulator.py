"""Feetech STS3215 servos on a pseudo-terminal: what the vendor's SDK opens as a serial port (protocol 0, 1 Mbaud).

Each servo has its registers, moves at a constant speed towards its goal while its torque is on, and finds its errors.
Not modelled: the time that bytes take on the wire and collisions on it, the delay of a reply behind a silent servo, the
PID loop, acceleration and backlash, all modes but position.
"""

from __future__ import annotations

import math
import os
import select
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping

PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 1, 2, 3, 0x82, 0x83
BROADCAST = 0xFE
TOP_COUNTS_S = 3000
TIRED_S = 0.01
"""A unit of the time after which an overload is one."""
VOLTAGE, OVERHEAT, OVERLOAD = 1, 4, 32
DEFAULTS = {
    3: (777, 2),  # model
    6: (0, 1),  # 1 Mbaud
    9: (0, 2),  # range
    11: (4095, 2),
    13: (70, 1),  # degrees Celsius at most
    14: (140, 1),  # 0.1 V at most
    15: (40, 1),  # and at least
    18: (12, 1),  # phase: speed in counts/s, 0 is full speed
    34: (20, 1),  # % of torque that is left in an overload
    35: (200, 1),  # 2 s of overload
    36: (80, 1),  # % of torque that is one
    40: (0, 1),  # torque
    48: (1000, 2),  # torque limit, 0.1 %
    62: (121, 1),  # 0.1 V
    63: (31, 1),  # degrees Celsius
}


class Servo:
    """One of them; a test changes its circumstances by its attributes."""

    def __init__(self, number: int, position: float, clock_s: Callable[[], float]):
        """position: what its encoder sees, before the homing offset."""
        self.position = position
        self.plugged = True
        self.sag = 0.0
        """counts by which it rests short of its goal, under a load"""
        self.walls = (-math.inf, math.inf)
        """positions that it cannot pass: it pushes"""
        self.replies: list[str] = []
        """what becomes of the next ones: "lost", "short", "garbage", "corrupt" or "twice\""""
        self.registers = bytearray(128)
        for address, (value, size) in DEFAULTS.items():
            self.put(address, value, size)
        self.put(5, number, 1)
        self._clock_s = clock_s
        self._moved_s = clock_s()
        self._aim = position
        """where it would be without load and walls"""
        self._pushed_s = 0.0

    def put(self, address: int, value: int, size: int) -> None:
        self.registers[address : address + size] = value.to_bytes(size, "little")

    def get(self, address: int, size: int = 2) -> int:
        return int.from_bytes(self.registers[address : address + size], "little")

    @property
    def torque(self) -> bool:
        return self.get(40, 1) == 1

    @property
    def goal(self) -> int:
        return self.get(42)

    @property
    def homing_offset(self) -> int:
        value = self.get(31)
        return -(value & 0x7FF) if value & 0x800 else value

    def write(self, address: int, data: bytes) -> None:
        self.registers[address : address + len(data)] = data
        if address == 40 and not self.torque:
            self.registers[65] &= ~OVERLOAD

    def replug(self) -> None:
        """Comes back as from power off: without torque, its working registers as they begin."""
        for address, (value, size) in DEFAULTS.items():
            if 40 <= address < 56:
                self.put(address, value, size)
        self.put(41, 0, 1)
        self.registers[65] = 0
        self.plugged = True

    def live(self) -> None:
        """Moves on to now."""
        now_s = self._clock_s()
        passed_s, self._moved_s = now_s - self._moved_s, now_s
        pushing = self._move(passed_s) if self.torque else False
        if not self.torque:
            self._aim = self.position
        overloaded = bool(self.registers[65] & OVERLOAD)
        torque = self.get(34, 1) * 10 if overloaded else self.get(48)
        load = torque if pushing else 30
        self._pushed_s = self._pushed_s + passed_s if load >= 10 * self.get(36, 1) else 0.0
        if self._pushed_s > self.get(35, 1) * TIRED_S:
            overloaded = True
        errors = OVERLOAD if overloaded else 0
        errors |= OVERHEAT if self.get(63, 1) > self.get(13, 1) else 0
        errors |= VOLTAGE if not self.get(15, 1) <= self.get(62, 1) <= self.get(14, 1) else 0
        self.put(65, errors, 1)
        self.put(60, load, 2)
        shown = round(self.position) - self.homing_offset
        self.put(56, shown if shown >= 0 else 0x8000 - shown, 2)

    def _move(self, passed_s: float) -> bool:
        """Returns whether it pushes against a wall."""
        goal = min(max(self.goal, self.get(9)), self.get(11)) + self.homing_offset
        step = min(self.get(46) or TOP_COUNTS_S, TOP_COUNTS_S) * passed_s
        self._aim += min(max(goal - self._aim, -step), step)
        self.position = min(max(self._aim - self.sag, self.walls[0]), self.walls[1])
        return not self.walls[0] - 1 <= self._aim - self.sag <= self.walls[1] + 1


class FeetechEmulator:
    """A bus, in a thread of its own; a context manager."""

    def __init__(self, positions: Mapping[int, float], clock_s: Callable[[], float] = time.monotonic):
        """positions: servo -> what its encoder sees.  clock_s: by which they move."""
        self.servos = {number: Servo(number, position, clock_s) for number, position in positions.items()}
        self.writes = 0
        """packets that wrote something"""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="feetech", daemon=True)

    def __enter__(self) -> FeetechEmulator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pull_out()
        os.close(self._slave)

    def pull_out(self) -> None:
        """The adapter of the whole bus, out of its socket."""
        if self._thread.is_alive():
            os.write(self._waker, b"x")
            self._thread.join()
            for descriptor in (self._master, self._wake, self._waker):
                os.close(descriptor)

    def _serve(self) -> None:
        received = b""
        while True:
            ready, _, _ = select.select([self._master, self._wake], [], [])
            if self._wake in ready:
                return
            received += os.read(self._master, 4096)
            if termios.tcgetattr(self._slave)[4] != termios.B1000000:
                received = b""  # noise, at another rate
            received = self._take_packets(received)

    def _take_packets(self, received: bytes) -> bytes:
        """Answers the whole ones; returns the rest."""
        while (start := received.find(b"\xff\xff")) >= 0 and len(received) >= start + 4:
            end = start + 4 + received[start + 3]
            if len(received) < end:
                break
            packet, received = received[start:end], received[end:]
            if sum(packet[2:]) & 0xFF == 0xFF:
                self._answer(packet[2], packet[4], packet[5:-1])
        return received

    def _answer(self, number: int, instruction: int, parameters: bytes) -> None:
        here = {number: servo for number, servo in self.servos.items() if servo.plugged}
        for servo in here.values():
            servo.live()
        if instruction == SYNC_READ:
            address, size, *numbers = parameters
            for asked in numbers:
                if asked in here:
                    self._reply(asked, bytes(here[asked].registers[address : address + size]))
        elif instruction == SYNC_WRITE:
            self.writes += 1
            address, size, *rest = parameters
            for k in range(0, len(rest), size + 1):
                if rest[k] in here:
                    here[rest[k]].write(address, bytes(rest[k + 1 : k + 1 + size]))
        elif number in here:
            if instruction == WRITE:
                self.writes += 1
                here[number].write(parameters[0], parameters[1:])
            read = instruction == READ
            data = bytes(here[number].registers[parameters[0] : parameters[0] + parameters[1]]) if read else b""
            self._reply(number, data)

    def _reply(self, number: int, data: bytes) -> None:
        servo = self.servos[number]
        body = bytes([number, len(data) + 2, servo.registers[65], *data])
        packet = b"\xff\xff" + body + bytes([~sum(body) & 0xFF])
        fate = servo.replies.pop(0) if servo.replies else ""
        if fate == "short":
            packet = packet[: len(packet) // 2]
        elif fate == "corrupt":
            packet = packet[:-2] + bytes([packet[-2] ^ 0x55, packet[-1]])
        elif fate == "garbage":
            packet = b"\x00\xff\x13\xff\xff\xff\x00\x80" + packet
        if fate != "lost":
            os.write(self._master, packet * 2 if fate == "twice" else packet)
