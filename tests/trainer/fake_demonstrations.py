"""Small demonstrations in the real file formats, with known numbers in them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from protos import codec, episode_pb2
from protos.episode_file import EpisodeWriter
from rl_trainer.demonstrations import HDF5_STATE_NAMES

SIDE = 32


def actions(ticks: int, seed: int = 0) -> np.ndarray:
    """float32 (T, 7): motion in [-1, 1], no rotation, gripper open and then closed."""
    motion = np.random.default_rng(seed).uniform(-1, 1, (ticks, 3))
    gripper = (np.arange(ticks) < ticks // 2).astype(float)
    return np.column_stack([motion, np.zeros((ticks, 3)), gripper]).astype(np.float32)


def write_episode(
    folder: Path,
    name: str,
    labels_TA: np.ndarray,
    *,
    stride: int = 4,
    purpose: episode_pb2.Purpose = episode_pb2.PURPOSE_DEMONSTRATE,
    outcome: episode_pb2.Outcome = episode_pb2.OUTCOME_SUCCESS,
    instruction: str = "pick up the milk",
    with_expert: bool = True,
) -> Path:
    """An episode of a noisy expert: what was executed differs from the label by 0.01 where with_expert."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.episode"
    start = episode_pb2.EpisodeStart(
        episode_id=name, task="libero_object/0", purpose=purpose, state_names=HDF5_STATE_NAMES, tick_rate_hz=20.0
    )
    writer = EpisodeWriter(path, start)
    rng = np.random.default_rng(len(name) + sum(map(ord, name)))
    for decision, tick in enumerate(range(0, len(labels_TA), stride)):
        observation = episode_pb2.Observation(
            images={"agentview": codec.encode_image(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), "png")},
            state=codec.encode_tensor(rng.standard_normal(8).astype(np.float32)),
            instruction=instruction,
        )
        writer.decision(episode_pb2.Decision(decision=decision, observation=observation))
        ticks = [
            episode_pb2.Tick(
                decision=decision,
                index=index,
                action=label + 0.01 if with_expert else label,
                source=episode_pb2.SOURCE_EXPERT,
                expert_action=label if with_expert else [],
            )
            for index, label in enumerate(labels_TA[tick : tick + stride])
        ]
        writer.executed(ticks)
    writer.finish(episode_pb2.EpisodeEnd(outcome=outcome, terminal=True))
    return path


def write_hdf5(path: Path, actions_TA: np.ndarray, *, instruction: str = "open the drawer") -> Path:
    """One demonstration in LIBERO's published layout: raw environment actions, frames as rendered.

    The frame of tick t is dark but for its top left pixel, (t, 0, 255), as rendered.
    """
    ticks = len(actions_TA)
    frames = np.zeros((ticks, SIDE, SIDE, 3), np.uint8)
    frames[:, 0, 0] = [[tick, 0, 255] for tick in range(ticks)]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": [instruction]})
        data.attrs["num_demos"] = 1
        demo = data.create_group("demo_0")
        demo["actions"] = actions_TA.astype(np.float64)
        observations = demo.create_group("obs")
        observations["agentview_rgb"] = frames
        observations["eye_in_hand_rgb"] = frames
        observations["ee_pos"] = np.column_stack([np.arange(ticks)] * 3).astype(np.float64)
        observations["ee_ori"] = np.full((ticks, 3), 0.5)
        observations["gripper_states"] = np.full((ticks, 2), 0.04)
    return path
