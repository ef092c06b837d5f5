"""A bus of Feetech STS servos (protocol 0, 1 Mbaud) through the vendor's SDK, `feetech-servo-sdk`.

The SDK waits 34 ms for a lost reply; it drops the error bits of a sync read, and all that follows a silent servo; it
takes late replies for new ones.  So its packets are used, and who has answered is counted here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import scservo_sdk

from robot_client.errors import ArmError

PROTOCOL = 0
ID, ERROR, DATA = 2, 4, 5
"""Where they are in a reply; behind the data is the checksum."""
TRIES = 2

STS3215 = 777
EEPROM, EEPROM_BYTES = 0, 40
TORQUE, MOTION, TORQUE_LIMIT, STATE, STATE_BYTES = 40, 41, 48, 56, 10
"""Addresses.  MOTION: acceleration (1 byte), goal (2), time (2), speed (2).  STATE: position (2), speed (2), load (2),
voltage (1), temperature (1), nothing (1), error bits (1)."""
ERRORS = {1: "voltage", 2: "angle sensor", 4: "overheat", 8: "overcurrent", 32: "overload"}
COUNTS_S2 = 100
"""A unit of acceleration, in counts/s^2; 0 is as hard as it can."""
CLUMSY_COUNTS_S, FINE_COUNTS_S, FINE = 50, 1, 4
"""A unit of speed, in counts/s, without and with the bit FINE of the servo's phase."""


@dataclass(frozen=True)
class Reply:
    error: int
    """The servo's error bits; 0 when it is well."""
    data: bytes


@dataclass(frozen=True, kw_only=True)
class State:
    """How a servo stands."""

    position: int
    """counts"""
    trouble: str
    """Its error bits by name, and what goes with them; empty when it has none."""

    @classmethod
    def of(cls, reply: Reply) -> State:
        bits = reply.error | reply.data[9]
        errors = ", ".join(ERRORS.get(1 << bit, f"error bit {bit}") for bit in range(8) if bits >> bit & 1)
        load, volts, celsius = signed(word(reply.data, 4), 10) / 10, reply.data[6] / 10, reply.data[7]
        trouble = f"{errors} (load {load:.0f} %, {volts:.1f} V, {celsius} degrees Celsius)" if errors else ""
        return cls(position=signed(word(reply.data, 0), 15), trouble=trouble)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a servo keeps when it is switched off."""

    model: int
    mode: int
    """0: position"""
    homing_offset: int
    range_min: int
    range_max: int
    overload_percent: int
    """Of full torque; more, for a time, is an overload."""
    speed_unit: int
    """counts/s"""

    @classmethod
    def of(cls, reply: Reply) -> Identity:
        data = reply.data
        return cls(
            model=word(data, 3),
            mode=data[33],
            homing_offset=signed(word(data, 31), 11),
            range_min=word(data, 9),
            range_max=word(data, 11),
            overload_percent=data[36],
            speed_unit=FINE_COUNTS_S if data[18] & FINE else CLUMSY_COUNTS_S,
        )

    def motion(self, goal: int, speed: float, acceleration: float) -> bytes:
        """The registers MOTION: counts, counts/s, counts/s^2.  Never of speed 0: to some that is full speed."""
        words = (max(goal, 0), 0, max(math.ceil(speed / self.speed_unit), 1))
        return bytes([min(round(acceleration / COUNTS_S2), 254)]) + b"".join(w.to_bytes(2, "little") for w in words)


class Bus:
    """Every method may raise ArmError: the port is gone."""

    def __init__(self, port: str):
        self._name = port
        self._port = scservo_sdk.PortHandler(port)
        self._packets = scservo_sdk.PacketHandler(PROTOCOL)
        self._ask(self._port.openPort)

    def read(self, ids: Collection[int], address: int, size: int, patience_s: float) -> dict[int, Reply]:
        """What the servos have in `size` registers from `address` on; those that do not answer are left out.

        Asks them all at once, and the silent ones once more, each time for at most patience_s.
        """
        replies: dict[int, Reply] = {}
        for _ in range(TRIES):
            if silent := [number for number in ids if number not in replies]:
                replies |= self._ask(lambda silent=silent: self._read(silent, address, size, patience_s))
        return replies

    def write(self, address: int, data: Mapping[int, bytes]) -> None:
        """The same registers of several servos, in one packet; they do not confirm it."""
        size = len(next(iter(data.values())))
        parameters = [byte for number, values in data.items() for byte in (number, *values)]
        self._ask(lambda: self._packets.syncWriteTxOnly(self._port, address, size, parameters, len(parameters)))

    def close(self) -> None:
        if self._port.is_open:
            self._ask(self._port.closePort)

    def _read(self, ids: list[int], address: int, size: int, patience_s: float) -> dict[int, Reply]:
        self._port.readPort(self._port.getBytesAvailable())  # late replies to an earlier question
        self._packets.syncReadTx(self._port, address, size, ids, len(ids))
        self._port.setPacketTimeoutMillis(1e3 * patience_s)
        until_s = time.monotonic() + patience_s
        replies: dict[int, Reply] = {}
        result = scservo_sdk.COMM_SUCCESS
        while len(replies) < len(ids) and (result == scservo_sdk.COMM_SUCCESS or time.monotonic() < until_s):
            packet, result = self._packets.rxPacket(self._port)
            if result == scservo_sdk.COMM_SUCCESS and packet[ID] in ids and len(packet) == DATA + size + 1:
                replies[packet[ID]] = Reply(packet[ERROR], bytes(packet[DATA:-1]))
        return replies

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever pyserial and termios raise: the SDK lets it through
            raise ArmError(f"the serial port {self._name} is gone: {error}") from error


def word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def signed(value: int, sign_bit: int) -> int:
    """The servos' negative numbers are a magnitude and a bit."""
    return -(value & ~(1 << sign_bit)) if value >> sign_bit & 1 else value
