"""Fault injection on an arm in motion: when it holds, what still moves, and what recovers.

    python -m benchmarks.faults [--repetitions 5] [--arms ur franka] [--only "server killed" "camera frozen"]

A scripted policy leads the arm in circles at 0.1 m/s and 20 Hz, with its profile of docs/profiles; at a random moment
the fault begins, and WATCH_S later it ends.  Real are the sockets, the processes of client and servo, the arm's SDK
(ur_rtde, franky), and OpenCV on a camera in software (tests/client/v4l2_device.c).  The robot is a simulator that is
asked every 4 ms where its tool is: tests/client/ur_simulator.py, or franky-sim, which models neither a watchdog on
missed packets nor a fault.

Each row is of two records.  The client's: how long after the stated limit it told the arm to hold (two ticks or less),
and why.  The robot's: how long after the limit what it was commanded braked (slower than half of its cruising speed,
for good; two ticks or less), how long it took from the hold to rest and how far it went, and how far it moved STOP_S
after the hold and later (nothing).  The way to rest is the stop's own, and the simulator's: franky-sim's joints follow
their commands by a tenth of a second.  One tick is 50 ms.  Writes benchmarks/results/faults.json.

Nothing of ours goes by the wall clock, but ur_rtde's read time-outs do (boost's deadline_timer): a jump in the midst of
a read may cost it the connection, and is then an error of the arm like any other loss.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from benchmarks.faults.kinds import FAULTS, TICK_S, Fault, NotShown
from benchmarks.faults.lab import CHUNK, MAKES, Lab, lab_of

HOLD_TICKS = 2
CRUISE_TICKS = 20
"""So many actions in a row, none of them shortened, come before a fault."""
CRUISE_S = 0.5
"""Over so long its cruising speed is measured, as a median."""
WATCH_S = 2.5
STOP_S = 1.0
STILL_M = 2e-4
"""Nothing."""
SPEED_S = 0.032
"""A speed is a way over so long: some set points of any arm."""
PATIENCE_S = 60.0
CLOCK, JUMP_S = "wall clock jumps by an hour", 3600
NAMES = [*(fault.name for fault in FAULTS), CLOCK]


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Injects faults and measures."""

    repetitions: int = 5
    """of each fault"""
    arms: tuple[str, ...] = ("ur", "franka")
    only: tuple[str, ...] = ()
    """names of faults; none: all"""
    seed: int = 0
    """of the moments"""
    json: Path = Path(__file__).parents[1] / "results" / "faults.json"

    def __post_init__(self) -> None:
        if unknown := {*self.arms} - {*MAKES}:
            raise ValueError(f"arms must be of {[*MAKES]}, got {unknown}")
        if unknown := {*self.only} - {*NAMES}:
            raise ValueError(f"only must be of {NAMES}, got {unknown}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One repetition."""

    fault_to_limit_ms: float
    limit_to_held_ticks: float | None
    """None: nobody was left who could say so"""
    limit_to_braking_ticks: float
    """of what the robot was commanded"""
    held_to_rest_ms: float
    """from the limit, where held is None"""
    held_to_rest_mm: float
    later_mm: float
    """what it moved STOP_S after the hold and later"""
    watched_ms: float
    """for how long that was looked at"""
    recovered_s: float
    """after the fault's end"""
    same_episode: bool
    """it was not over"""
    robot_late_ms: float
    """how far the simulator fell behind the clock: much of it, and its record is not to be trusted"""
    reasons: list[str]


def main(config: FaultsConfig) -> int:
    rows = []
    for row in rows_of(config):
        rows.append(row)
        print_row(row)
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps({"tick_s": TICK_S, "rows": rows}, indent=1) + "\n")
    return int(not all(all(row["laws"].values()) for row in rows))


def rows_of(config: FaultsConfig) -> Iterator[dict[str, Any]]:
    work = [(fault.name, arm, partial(fault_row, config, fault, arm)) for fault in FAULTS for arm in fault.arms]
    work += [(CLOCK, arm, partial(clock_row, config, arm)) for arm in MAKES]
    for name, arm, row in work:
        if arm in config.arms and name in (config.only or NAMES):
            try:
                measured = row()
            except NotShown as error:
                measured = {"limit": "not shown", "laws": {str(error): False}, "samples": []}
            yield {"fault": name, "arm": arm, **measured}


def fault_row(config: FaultsConfig, fault: Fault, arm: str) -> dict[str, Any]:
    chance = random.Random(f"{config.seed} {fault.name} {arm}")
    with lab_of(arm, through_network=fault.through_network) as lab:
        samples = [sample_of(lab, fault, chance) for _ in range(config.repetitions)]
    return {
        "limit": fault.limit,
        "laws": laws_of(fault, samples),
        "samples": [asdict(sample) for sample in samples],
    }


def laws_of(fault: Fault, samples: Sequence[Sample]) -> dict[str, bool]:
    held_ticks = [sample.limit_to_held_ticks for sample in samples if sample.limit_to_held_ticks is not None]
    return {
        "held within two ticks": max(held_ticks, default=0.0) <= HOLD_TICKS,
        "held for no other reason before": min(held_ticks, default=0.0) > -HOLD_TICKS / 2,
        "braked within two ticks": max(sample.limit_to_braking_ticks for sample in samples) <= HOLD_TICKS,
        "nothing moves after": all(sample.later_mm < 1e3 * STILL_M and sample.watched_ms > 0 for sample in samples),
        "the client says why": all(re.search(fault.reason, "\n".join(sample.reasons)) for sample in samples),
        f"recovered: {fault.recovery}": all(sample.same_episode == ("same" in fault.recovery) for sample in samples),
    }


def clock_row(config: FaultsConfig, arm: str) -> dict[str, Any]:
    """The wall clock jumps to and fro, and nothing is to happen."""
    samples, seen = [], []
    with lab_of(arm) as lab:
        for number in range(config.repetitions):
            cruise(lab)
            began_s = time.monotonic()
            lab.wall_clock.jump(jump_s := JUMP_S * (-1) ** number)
            time.sleep(WATCH_S)
            moves = lab.client.since(began_s, "move")
            seen.append(abs(moves[-1].wall_s - time.time() - jump_s) < 1)
            longest_s = max(after.at_s - before.at_s for before, after in pairwise(moves))
            samples.append(
                {
                    "holds": len(lab.client.since(began_s, "hold")),
                    "longest_between_moves_ticks": longest_s / TICK_S,
                    "reasons": reasons(lab, began_s, time.monotonic()),
                }
            )
    return {
        "limit": "none, for nothing goes by it",
        "laws": {"the client sees it jump": all(seen), "it never holds": not any(s["holds"] for s in samples)},
        "samples": samples,
    }


def sample_of(lab: Lab, fault: Fault, chance: random.Random) -> Sample:
    """Raises NotShown."""
    cruise(lab)
    time.sleep(chance.uniform(0.0, CHUNK * TICK_S))
    began_s = time.monotonic()
    fault.begin(lab)
    time.sleep(WATCH_S)
    ended_s = time.monotonic()
    fault.end(lab)
    recovered_s = recovery(lab, fault, began_s, ended_s)
    limit_s, held_s = fault.limit_s(lab, began_s), fault.held_s(lab, began_s, ended_s)
    since_s = limit_s if held_s is None else held_s
    until_s = min([ended_s] + [move.at_s for move in lab.client.since(since_s, "move")])
    states = lab.witness.states(began_s - CRUISE_S, until_s)
    commanded, track = Track(states, "commanded_m"), Track(states, "position_m")
    return Sample(
        fault_to_limit_ms=1e3 * (limit_s - began_s),
        limit_to_held_ticks=None if held_s is None else (held_s - limit_s) / TICK_S,
        limit_to_braking_ticks=(commanded.braking_s(began_s) - limit_s) / TICK_S,
        held_to_rest_ms=1e3 * (track.rest_s - since_s),
        held_to_rest_mm=1e3 * track.way_m(since_s, track.rest_s),
        later_mm=1e3 * track.way_m(since_s + STOP_S, until_s),
        watched_ms=1e3 * (until_s - since_s - STOP_S),
        recovered_s=recovered_s - ended_s,
        same_episode=not lab.client.since(began_s, "over"),
        robot_late_ms=1e3 * track.late_s,
        reasons=reasons(lab, began_s, recovered_s),
    )


def cruise(lab: Lab) -> None:
    """Waits until the policy has led the arm for a while, at full speed.  Raises NotShown."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + PATIENCE_S:
        ticks = lab.client.since(began_s, "tick")[-CRUISE_TICKS:]
        if len(ticks) == CRUISE_TICKS and all(tick.is_led and not tick.reason for tick in ticks):
            return
        time.sleep(TICK_S)
    raise NotShown(f"the arm has not cruised in {PATIENCE_S:g} s; {last_words(lab)}")


def recovery(lab: Lab, fault: Fault, began_s: float, ended_s: float) -> float:
    """When the policy led the arm again: in the same episode or, where that is over, in the next.  Raises NotShown."""
    since_s = ended_s
    while not (led := [tick for tick in lab.client.since(since_s, "tick") if tick.is_led]):
        if since_s == ended_s and lab.client.since(began_s, "over"):
            since_s = time.monotonic()
            if "person" in fault.recovery:
                lab.client.recover()
            lab.client.next_episode()
        if time.monotonic() > ended_s + PATIENCE_S:
            raise NotShown(f"the arm has not recovered in {PATIENCE_S:g} s; {last_words(lab)}")
        time.sleep(TICK_S)
    return led[0].at_s


def last_words(lab: Lab) -> str:
    said = [event.reason for event in lab.client.since(0.0, "tick", "over") if event.reason]
    return f"last it said {said[-2:]}"


def reasons(lab: Lab, since_s: float, until_s: float) -> list[str]:
    """Why it held, in the client's words; of those that differ in numbers alone, the first."""
    said: dict[str, str] = {}
    for event in lab.client.since(since_s, "tick", "over"):
        if event.at_s <= until_s and event.reason and not event.is_led:
            said.setdefault(re.sub(r"[\d.]+", "", event.reason), event.reason)
    return list(said.values())


class Track:
    """A point and its way, out of a robot's states at moments of time.monotonic()."""

    def __init__(self, states: Sequence[tuple[float, dict[str, Any]]], point: str):
        self._at_s = np.array([at_s for at_s, _ in states])
        self._clock_s = np.array([state["time_s"] for _, state in states])
        self._position_m = np.array([state[point] for _, state in states])
        steps_m = np.linalg.norm(np.diff(self._position_m, axis=0), axis=1)
        self._way_m = np.concatenate([[0.0], np.cumsum(steps_m)])

    def way_m(self, since_s: float, until_s: float) -> float:
        """Along its path."""
        return float(np.interp(until_s, self._at_s, self._way_m) - np.interp(since_s, self._at_s, self._way_m))

    def braking_s(self, began_s: float) -> float:
        """The last moment at which it was not yet slower than half of its cruising speed until then."""
        half_s = SPEED_S / 2
        speed_m_s = np.array([self.way_m(at_s - half_s, at_s + half_s) / SPEED_S for at_s in self._at_s])
        cruising_m_s = np.median(speed_m_s[self._at_s < began_s])
        return float(self._at_s[speed_m_s >= cruising_m_s / 2][-1])

    @property
    def rest_s(self) -> float:
        """From when on it stays within STILL_M of where it ends."""
        away_m = np.linalg.norm(self._position_m - self._position_m[-1], axis=1)
        return float(self._at_s[1 + np.flatnonzero(away_m > STILL_M)[-1]])

    @property
    def late_s(self) -> float:
        """The most that the robot's clock was behind where it had been best."""
        behind_s = self._at_s - self._clock_s
        return float(behind_s.max() - behind_s.min())


def print_row(row: dict[str, Any]) -> None:
    samples = row["samples"]
    print(f"{row['fault']}, {row['arm']}.  Limit: {row['limit']}.  {len(samples)} times, median and worst:")
    for name in samples[0] if samples else []:
        values = [sample[name] for sample in samples if type(sample[name]) in (int, float)]
        if values:
            print(f"  {name:<28}{median(values):>10.2f}{max(values):>10.2f}")
    for law, kept in row["laws"].items():
        print(f"  {'held  ' if kept else 'BROKEN'} {law}")
    for reason in samples[0].get("reasons", []) if samples else []:
        print(f"  says: {reason}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(FaultsConfig, description=__doc__)))
