"""Demonstrations made ready to train on: frames in one memory-mapped file, labels as flat arrays, statistics, a split.

Shapes: n samples (decisions of all demonstrations), K actions of a chunk, A numbers of an action, S of the state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_trainer.demonstrations import Demonstration, chunk_labels, led_chunks


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One row per decision, in the order of the demonstrations."""

    frames_file: Path
    frame_shape: tuple[int, int, int]
    state_nS: np.ndarray
    """float32, in the arm's units"""
    actions_nKA: np.ndarray
    """float32 labels in the policy's units"""
    instruction_n: np.ndarray
    """index into `instructions`"""
    instructions: tuple[str, ...]
    validation_n: np.ndarray
    """bool: the decision's episode is held out"""
    state_names: tuple[str, ...]
    tick_rate_hz: float
    statistics: dict[str, Any]
    """of the training episodes, as an entry of norm_stats"""
    fingerprint: str
    """changes with the set of demonstrations and their lengths"""

    def __len__(self) -> int:
        return len(self.state_nS)

    def frames(self) -> np.ndarray:
        """uint8 (n, H, W, 3), read-only, mapped from the file."""
        return np.memmap(self.frames_file, np.uint8, "r", shape=(len(self), *self.frame_shape))


def held_out(name: str, fraction: float) -> bool:
    """Whether the episode of this name is for validation: a function of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def collect_samples(
    demonstrations: Iterable[Demonstration],
    frames_file: Path,
    *,
    prepare: Callable[[np.ndarray], np.ndarray],
    chunk_length: int,
    validation_fraction: float,
) -> Samples:
    """Reads every demonstration once; its frames, as `prepare` makes them for the model, go to frames_file.

    Raises ValueError when there is nothing to train on or the demonstrations do not fit each other.
    """
    instructions: dict[str, int] = {}
    kinds: dict[tuple, str] = {}
    taught: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[tuple[np.ndarray, ...]] = []
    digest = hashlib.sha256()
    with frames_file.open("wb") as file:
        for demonstration in demonstrations:
            led_D = led_chunks(demonstration.led_T, demonstration.tick_D, chunk_length)
            if not led_D.any():
                continue
            frames_DHW3 = np.stack([prepare(frame) for frame in demonstration.frames_DHW3[led_D]])
            frames_DHW3.tofile(file)
            labels_DKA = chunk_labels(demonstration.actions_TA, demonstration.tick_D[led_D], chunk_length)
            state_DS = demonstration.state_DS[led_D]
            held = held_out(demonstration.name, validation_fraction)
            instruction = instructions.setdefault(demonstration.instruction, len(instructions))
            count = len(labels_DKA)
            rows.append((state_DS, labels_DKA, np.full(count, instruction), np.full(count, held)))
            digest.update(f"{demonstration.name}\0{len(demonstration.actions_TA)}\0{count}\n".encode())
            kind = (frames_DHW3.shape[1:], labels_DKA.shape[2], demonstration.state_names, demonstration.tick_rate_hz)
            kinds.setdefault(kind, demonstration.name)
            if not held:
                taught.append((demonstration.actions_TA[demonstration.led_T], state_DS))
    if not taught:
        raise ValueError(f"no demonstration is left to train on ({len(rows)} are held out for validation)")
    if len(kinds) > 1:
        raise ValueError(f"demonstrations must agree in frame, action, state and tick rate, got {kinds}")
    [(frame_shape, _, state_names, tick_rate_hz)] = kinds
    state_nS, actions_nKA, instruction_n, validation_n = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Samples(
        frames_file=frames_file,
        frame_shape=frame_shape,
        state_nS=state_nS,
        actions_nKA=actions_nKA,
        instruction_n=instruction_n,
        instructions=tuple(instructions),
        validation_n=validation_n,
        state_names=state_names,
        tick_rate_hz=tick_rate_hz,
        statistics=norm_statistics(*zip(*taught, strict=True)),
        fingerprint=digest.hexdigest(),
    )


def norm_statistics(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> dict[str, Any]:
    """An entry of norm_stats over all ticks (T, A) and decisions (D, S), one array per episode.

    The gripper, last, is masked: it passes un-normalised.
    """
    actions_nA, states_nS = np.concatenate(actions), np.concatenate(states)
    mask = [True] * (actions_nA.shape[1] - 1) + [False]
    return {
        "action": _moments(actions_nA) | {"mask": mask},
        "proprio": _moments(states_nS),
        "num_transitions": len(actions_nA),
        "num_trajectories": len(actions),
    }


def _moments(values_nA: np.ndarray) -> dict[str, list[float]]:
    values_nA = values_nA.astype(np.float64)
    numbers = {
        "mean": values_nA.mean(0),
        "std": values_nA.std(0),
        "min": values_nA.min(0),
        "max": values_nA.max(0),
        "q01": np.quantile(values_nA, 0.01, axis=0),
        "q99": np.quantile(values_nA, 0.99, axis=0),
    }
    return {name: value.tolist() for name, value in numbers.items()}
