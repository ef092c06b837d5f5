"""Demonstrations: what was seen and what should have been done, from our episode files, LIBERO's published HDF5 and
LeRobot data sets.

All give the same record in the policy's convention: images upright, gripper g in [0, 1] with 1 = open.  A LeRobot data
set that is not made of our episodes is taken to keep it.
Shapes: T ticks, D decisions (observations), K actions of a chunk, A numbers of an action, S of the state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.json_format import Parse

from protos import codec, episode_pb2, lerobot
from protos.episode_file import SUFFIX, DamagedEpisode, Episode, read_episode
from rl_trainer.lerobot_dataset import LerobotDataset, Recording, UnreadableRecording

if TYPE_CHECKING:
    import h5py

# A motion shorter than this, with the gripper's command unchanged, is a no-op in the published OpenVLA data sets.
NO_OP_NORM = 1e-4

# Names of LIBERO's HDF5 arrays for the cameras as our arms name them.
HDF5_IMAGES = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
HDF5_STATE = ("ee_pos", "ee_ori", "gripper_states")
# The numbers in them: position, axis-angle, fingers; as our arms name them.
HDF5_STATE_NAMES = ("eef_x", "eef_y", "eef_z", "eef_ax", "eef_ay", "eef_az", "finger_left", "finger_right")
HDF5_TICK_RATE_HZ = 20.0

PURPOSES = (episode_pb2.PURPOSE_DEMONSTRATE, episode_pb2.PURPOSE_TRAIN)
SUFFIXES = (SUFFIX, ".hdf5", ".h5")
DRIVEN_BY_POLICY = (episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_BLEND, episode_pb2.SOURCE_HOLD)


class BadDemonstration(ValueError):
    """A demonstration that cannot be learned from.  The message names it and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One episode."""

    name: str
    """unique: the episode id, or file and demo of an HDF5 source, or data set and number"""
    instruction: str
    frames_DHW3: np.ndarray
    """uint8 RGB, upright"""
    state_DS: np.ndarray
    """float32; S is 0 when the source has no state"""
    tick_D: np.ndarray
    """int64: how many actions had been executed when each observation was taken"""
    actions_TA: np.ndarray
    """float32 labels, the gripper last"""
    led_T: np.ndarray
    """bool: the label is what was executed, noise apart; False where an expert only watched the policy drive"""
    state_names: tuple[str, ...]
    """S names, or none where the source does not say"""
    tick_rate_hz: float


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where demonstrations come from and how they are read."""

    paths: Sequence[Path]
    """files, or folders searched for *.episode, *.hdf5, *.h5 and LeRobot data sets"""
    camera: str = "agentview"
    """as our arms name it; HDF5 has those of HDF5_IMAGES"""
    hdf5_stride: int = 4
    """HDF5 keeps a frame for every tick, as others' LeRobot data sets do; every n-th becomes a decision"""
    drop_no_ops: bool = False
    """leave out HDF5 ticks without motion, as the published OpenVLA data sets do"""
    failed: bool = False
    """also episodes that ended otherwise than in success: for labels that are not what was executed"""

    def files(self) -> list[Path]:
        """Every demonstration file, sorted; a LeRobot data set is its meta/info.json.

        Raises FileNotFoundError when a path has none.
        """
        found: list[Path] = []
        for path in self.paths:
            here = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in SUFFIXES or is_dataset(p)]
            if not here:
                raise FileNotFoundError(
                    f"{path}: expected a file, or a folder with *.episode or *.hdf5 files or a LeRobot data set, "
                    "found none"
                )
            found += here
        return sorted(set(found))

    def read(self, refused: Counter[str]) -> Iterator[Demonstration]:
        """The usable demonstrations, in the order of files().

        The others are counted in `refused` by reason; the damaged are also printed by name.  Raises UnreadableDataset
        for a LeRobot data set of another version, or without this camera.
        """
        for path in self.files():
            try:
                if path.suffix == SUFFIX:
                    yield from self._from_episode(path, refused)
                elif is_dataset(path):
                    yield from self._from_lerobot(path.parents[1], refused)
                else:
                    yield from self._from_hdf5(path)
            except (DamagedEpisode, BadDemonstration, codec.CodecError) as error:
                refused["damaged"] += 1
                print(f"refused {path.name}: {error}", flush=True)

    def _from_episode(self, path: Path, refused: Counter[str]) -> Iterator[Demonstration]:
        episode = read_episode(path)
        if (reason := refusal(episode, failed=self.failed)) is not None:
            refused[reason] += 1
        else:
            yield demonstration_from_episode(episode, self.camera)

    def _from_lerobot(self, folder: Path, refused: Counter[str]) -> Iterator[Demonstration]:
        for recording in LerobotDataset(folder, self.camera).recordings():
            if (reason := recording_refusal(recording, failed=self.failed)) is not None:
                refused[reason] += 1
                continue
            try:
                demonstration = demonstration_from_lerobot(recording, stride=self.hdf5_stride)
            except UnreadableRecording as error:
                refused["damaged"] += 1
                print(f"refused {recording.name}: {error}", flush=True)
            else:
                yield demonstration

    def _from_hdf5(self, path: Path) -> Iterator[Demonstration]:
        import h5py  # only this source needs it

        try:
            with h5py.File(path) as file:
                data = _group(file, "data")
                for demo in sorted(data, key=lambda name: int(str(name).rpartition("_")[2])):
                    yield demonstration_from_hdf5(
                        data, demo, path.stem, self.camera, stride=self.hdf5_stride, drop_no_ops=self.drop_no_ops
                    )
        except (OSError, KeyError, ValueError) as error:
            raise BadDemonstration(f"not in LIBERO's HDF5 layout: {error}") from error


def refusal(episode: Episode, *, failed: bool = False) -> str | None:
    """Why an episode may not be cloned, or None.  Evaluation episodes never enter training."""
    reason = _unfit(episode.start, episode.end, failed=failed)
    return reason or (None if episode.decisions and episode.ticks else "empty")


def recording_refusal(recording: Recording, *, failed: bool = False) -> str | None:
    """The same of a LeRobot recording: of others' only what did not end in success, where they say so."""
    if is_ours(recording.dataset):
        return _unfit(*_start_and_end(recording), failed=failed)
    says = lerobot.SUCCESS in recording.dataset.features
    return "outcome_failure" if says and not failed and not recording.column(lerobot.SUCCESS)[-1, 0] else None


def _unfit(start: episode_pb2.EpisodeStart, end: episode_pb2.EpisodeEnd, *, failed: bool) -> str | None:
    if start.purpose not in PURPOSES:
        return episode_pb2.Purpose.Name(start.purpose).lower()
    if end.outcome != episode_pb2.OUTCOME_SUCCESS and not failed:
        return episode_pb2.Outcome.Name(end.outcome).lower()
    return None


def demonstration_from_episode(episode: Episode, camera: str) -> Demonstration:
    """The labels are the expert's actions where an expert watched, else what was executed.

    Raises BadDemonstration, or CodecError for bytes that are not what they say.
    """
    decisions = episode.decisions
    ticks = [_tick_of(episode, decision.decision) for decision in decisions]
    kept = [(decision.observation, tick) for decision, tick in zip(decisions, ticks, strict=True) if tick is not None]
    if not kept:
        raise BadDemonstration("no decision of it was executed")
    labels = [tick.expert_action or tick.action for tick in episode.ticks]
    watched = [bool(tick.expert_action) and tick.source in DRIVEN_BY_POLICY for tick in episode.ticks]
    if len({len(label) for label in labels}) != 1:
        raise BadDemonstration(f"its actions differ in length: {sorted({len(label) for label in labels})}")
    if camera not in kept[0][0].images:
        raise BadDemonstration(f"camera {camera!r} is missing, available: {sorted(kept[0][0].images)}")
    has_state = kept[0][0].HasField("state")
    return Demonstration(
        name=episode.start.episode_id,
        instruction=kept[0][0].instruction,
        frames_DHW3=np.stack([codec.decode_image(observation.images[camera], camera) for observation, _ in kept]),
        state_DS=np.stack(
            [
                codec.decode_tensor(observation.state, "state", dtype="float32", shape=(None,))
                if has_state
                else np.zeros(0, np.float32)
                for observation, _ in kept
            ]
        ),
        tick_D=np.array([tick for _, tick in kept]),
        actions_TA=np.array([list(label) for label in labels], np.float32),
        led_T=~np.array(watched),
        state_names=tuple(episode.start.state_names),
        tick_rate_hz=episode.start.tick_rate_hz,
    )


def _tick_of(episode: Episode, decision: int) -> int | None:
    """How many ticks were executed before the observation of a decision; None when nothing of it was executed."""
    for position, tick in enumerate(episode.ticks):
        if tick.decision == decision:
            return max(0, position - tick.index)
    return None


def is_dataset(path: Path) -> bool:
    """Whether a file is the meta/info.json of a LeRobot data set."""
    return path.match(lerobot.INFO)


def is_ours(dataset: LerobotDataset) -> bool:
    """Whether a LeRobot data set was made of our episodes: its frames say which ticks were executed from them."""
    return lerobot.EXECUTED_ACTIONS in dataset.features


def _start_and_end(recording: Recording) -> tuple[episode_pb2.EpisodeStart, episode_pb2.EpisodeEnd]:
    start, end = recording.text(lerobot.START), recording.text(lerobot.END)
    return Parse(start, episode_pb2.EpisodeStart()), Parse(end, episode_pb2.EpisodeEnd())


def demonstration_from_lerobot(recording: Recording, *, stride: int) -> Demonstration:
    """Of our episodes what they themselves give; of others' the actions, a frame each, and every stride-th frame.

    Raises UnreadableRecording.
    """
    dataset, frame_F = recording.dataset, np.arange(len(recording.column(lerobot.ACTION)))
    name, tick_rate_hz = recording.name, dataset.fps
    names = dataset.features.get(lerobot.STATE, {}).get("names")
    state_names = tuple(names) if isinstance(names, list) else ()
    if is_ours(dataset):
        start, _ = _start_and_end(recording)
        name, tick_rate_hz, state_names = start.episode_id, start.tick_rate_hz, tuple(start.state_names)
        actions_TA, led_T = _labels(recording)
        frame_D, tick_D = frame_F, recording.column(lerobot.TICK)[:, 0]
    else:
        actions_TA = recording.column(lerobot.ACTION)
        led_T = np.ones(len(actions_TA), bool)
        frame_D = tick_D = frame_F[::stride]
    has_state = lerobot.STATE in dataset.features
    state_FS = recording.column(lerobot.STATE) if has_state else np.zeros((len(frame_F), 0))
    return Demonstration(
        name=name,
        instruction=recording.instruction,
        frames_DHW3=recording.pixels(frame_D),
        state_DS=state_FS[frame_D].astype(np.float32),
        tick_D=tick_D,
        actions_TA=actions_TA.astype(np.float32),
        led_T=led_T,
        state_names=state_names,
        tick_rate_hz=tick_rate_hz,
    )


def _labels(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """actions_TA and led_T of a Demonstration, from frames of M ticks of which some only fill up."""
    kept_FM = ~recording.column(lerobot.EXECUTED_IS_PAD)

    def ticks(name: str) -> np.ndarray:
        return recording.column(name).reshape(*kept_FM.shape, -1)[kept_FM]

    actions_TA = ticks(lerobot.EXECUTED_ACTIONS)
    if lerobot.EXPERT_WATCHED not in recording.dataset.features:
        return actions_TA, np.ones(len(actions_TA), bool)
    watched_T1 = ticks(lerobot.EXPERT_WATCHED)
    by_policy_T1 = np.isin(ticks(lerobot.EXECUTED_SOURCE), DRIVEN_BY_POLICY)
    return np.where(watched_T1, ticks(lerobot.EXPERT_ACTIONS), actions_TA), ~(watched_T1 & by_policy_T1)[:, 0]


def demonstration_from_hdf5(
    data: h5py.Group, demo: str, file: str, camera: str, *, stride: int, drop_no_ops: bool
) -> Demonstration:
    """data/demo of LIBERO's layout: frames lie as rendered, upside down; the gripper's command is -1 open, +1 close."""
    group, observations = _group(data, demo), _group(data, f"{demo}/obs")
    problem = json.loads(str(data.attrs["problem_info"]))
    actions_TA = np.asarray(group["actions"], np.float32)
    keep = np.flatnonzero(~no_ops(actions_TA)) if drop_no_ops else np.arange(len(actions_TA))
    decisions = keep[::stride]
    actions_TA = actions_TA[keep]
    actions_TA[:, -1] = (1 - np.clip(actions_TA[:, -1], -1, 1)) / 2
    frames: Any = observations[HDF5_IMAGES[camera]]
    state_TS = np.concatenate([np.asarray(observations[name], np.float32) for name in HDF5_STATE], axis=1)
    return Demonstration(
        name=f"{file}/{demo}",
        instruction="".join(problem["language_instruction"]),  # a string, or a list of its letters
        # Rotated by 180 degrees, as every policy trained on these files sees them.
        frames_DHW3=np.stack([frames[tick][::-1, ::-1] for tick in decisions]),
        state_DS=state_TS[decisions],
        tick_D=np.arange(len(decisions)) * stride,
        actions_TA=actions_TA,
        led_T=np.ones(len(actions_TA), bool),
        state_names=HDF5_STATE_NAMES,
        tick_rate_hz=HDF5_TICK_RATE_HZ,
    )


def no_ops(actions_TA: np.ndarray) -> np.ndarray:
    """bool (T,): no motion, and the gripper's command is that of the tick before (at tick 0, any)."""
    still = np.linalg.norm(actions_TA[:, :-1], axis=1) < NO_OP_NORM
    gripper = actions_TA[:, -1]
    return still & (gripper == np.concatenate([gripper[:1], gripper[:-1]]))


def _group(parent: h5py.Group, name: str) -> h5py.Group:
    import h5py

    group = parent[name]
    if not isinstance(group, h5py.Group):
        raise KeyError(f"{name} must be a group")
    return group


def chunk_labels(actions_TA: np.ndarray, tick_D: np.ndarray, chunk_length: int) -> np.ndarray:
    """float32 (D, K, A): the next K actions from each decision on, whichever decisions they belong to.

    Past the end of the episode the arm stands still and the gripper keeps its last command.
    """
    padding_KA = np.zeros((chunk_length, actions_TA.shape[1]), actions_TA.dtype)
    padding_KA[:, -1] = actions_TA[-1, -1]
    padded = np.concatenate([actions_TA, padding_KA])
    return padded[np.asarray(tick_D)[:, None] + np.arange(chunk_length)]


def led_chunks(led_T: np.ndarray, tick_D: np.ndarray, chunk_length: int) -> np.ndarray:
    """bool (D,): decisions whose next K ticks were all led.

    An expert who only watches asks for the same correction tick after tick, since nobody follows it: as a chunk that
    would be the correction K times over.
    """
    return np.array([led_T[tick : tick + chunk_length].all() for tick in tick_D], bool)
