"""The six servos of an SO-100 or SO-101, in radians: a bus of Feetech servos seen through LeRobot's calibration."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from robot_client.arms.calibration import RAD, JointCalibration
from robot_client.arms.feetech import (
    EEPROM,
    EEPROM_BYTES,
    MOTION,
    STATE,
    STATE_BYTES,
    STS3215,
    TORQUE,
    TORQUE_LIMIT,
    Bus,
    Identity,
    State,
)
from robot_client.errors import ArmError

CONNECT_S = 0.3
SILENT_READS, SILENCE_S = 3, 0.15
"""A servo that misses so many in a row, and for so long, is gone; noise costs a reply, a busy computer a few."""


class Servos:
    """Joints by name.  Every method may raise ArmError: the port is gone."""

    def __init__(self, port: str, calibration: Mapping[str, JointCalibration], *, patience_s: float):
        """patience_s: how long a servo may take to answer; it is asked twice."""
        self._joints, self._patience_s = calibration, patience_s
        self._titles = {joint.id: f"servo {joint.id} ({name})" for name, joint in calibration.items()}
        self._counts, self._missed = dict.fromkeys(self._titles, 0), dict.fromkeys(self._titles, 0)
        self._heard_s = dict.fromkeys(self._titles, time.monotonic())
        self._ailing: set[int] = set()
        self._bus = Bus(port)
        try:
            self._identities = self._identify()
        except ArmError:
            self.close()
            raise

    def listen(self) -> list[str]:
        """Asks all servos how they stand; returns what is wrong with them."""
        troubles = []
        replies = self._bus.read(self._titles, STATE, STATE_BYTES, self._patience_s)
        now_s = time.monotonic()
        for number, title in self._titles.items():
            if number not in replies:
                self._missed[number] += 1
                if self._missed[number] >= SILENT_READS and now_s - self._heard_s[number] > SILENCE_S:
                    troubles.append(f"{title} does not answer")
                continue
            state = State.of(replies[number])
            self._counts[number], self._missed[number], self._heard_s[number] = state.position, 0, now_s
            if state.trouble:
                self._ailing.add(number)
                troubles.append(f"{title}: {state.trouble}")
        return troubles

    def angle_rad(self, name: str) -> float:
        """As last heard."""
        joint = self._joints[name]
        return joint.angle_rad(self._counts[joint.id])

    def move(self, goals: Mapping[str, tuple[float, float]], acceleration_rad_s2: float = 0.0) -> None:
        """Each joint to an angle (rad, within its range) at a speed (rad/s); acceleration 0: as hard as it can."""
        joints = {self._joints[name]: goal for name, goal in goals.items()}
        self._move({j.id: (j.counts(angle), speed) for j, (angle, speed) in joints.items()}, acceleration_rad_s2)

    def power_on(self, speed_rad_s: float) -> None:
        """All of them, where they are."""
        self._move({number: (counts, speed_rad_s) for number, counts in self._counts.items()}, 0.0)
        self._switch(self._titles, True)

    def power_off(self) -> None:
        self._switch(self._titles, False)

    def power_off_ailing(self) -> None:
        """Those that have told of an error since the last call."""
        ailing, self._ailing = self._ailing, set()
        if ailing:
            self._switch(ailing, False)

    def limit_torque(self, name: str, fraction: float) -> None:
        """To this fraction of full torque, but less than the servo itself would call an overload."""
        number = self._joints[name].id
        limit = round(min(1000 * fraction, 10 * (self._identities[number].overload_percent - 1)))
        self._bus.write(TORQUE_LIMIT, {number: limit.to_bytes(2, "little")})

    def close(self) -> None:
        self._bus.close()

    def _identify(self) -> dict[int, Identity]:
        """Raises ArmError unless the arm is whole, and the one that the calibration is of."""
        replies = self._bus.read(self._titles, EEPROM, EEPROM_BYTES, CONNECT_S)
        if missing := [title for number, title in self._titles.items() if number not in replies]:
            raise ArmError(f"{', '.join(missing)} must answer, only {sorted(replies)} do: power, cables?")
        identities = {number: Identity.of(reply) for number, reply in replies.items()}
        for joint in self._joints.values():
            it = identities[joint.id]
            found = (it.model, it.mode, it.homing_offset, it.range_min, it.range_max)
            expected = (STS3215, 0, joint.homing_offset, joint.range_min, joint.range_max)
            if found != expected:
                raise ArmError(
                    f"{self._titles[joint.id]}: model, mode, homing_offset, range_min, range_max must be {expected}, "
                    f"got {found}: run lerobot-calibrate, or give the file of this arm"
                )
        return identities

    def _move(self, goals: Mapping[int, tuple[int, float]], acceleration_rad_s2: float) -> None:
        """Servo -> counts and rad/s."""
        acceleration = acceleration_rad_s2 / RAD
        motions = {
            number: self._identities[number].motion(counts, speed_rad_s / RAD, acceleration)
            for number, (counts, speed_rad_s) in goals.items()
        }
        self._bus.write(MOTION, motions)

    def _switch(self, numbers: Collection[int], on: bool) -> None:
        self._bus.write(TORQUE, dict.fromkeys(numbers, bytes([on])))
