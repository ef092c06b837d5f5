"""The whole ring on real SDKs: arm, camera, policy server, episodes, data set, and what lerobot reads of it.

    python -m benchmarks.ring --python /path/to/python-with-lerobot-0.4.4 [--episodes 20] [--ticks 60]

A Panda of franky-sim through franky, a RealSense recording through librealsense, and the embedded policy behind
`python -m policy_server serve`; `python -m robot_client run` drives them by the command line, with the profile of
docs/profiles, and `export` makes the data set.  Every episode is recorded twice, by the server and by the robot.

It proves the plumbing and nothing else: the policy has never seen this scene, every episode runs out of time and is
labelled a failure, and no success rate is claimed.  Writes benchmarks/results/ring.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from google.protobuf.json_format import Parse

from benchmarks.lerobot_export import READER, compare
from benchmarks.panda import Panda
from protos import episode_pb2, lerobot
from protos.episode_file import Episode, read_episode
from robot_client.export import files
from sim.local_server import served
from tests.client.realsense_recording import record

HERE = Path(__file__).parent
PROFILE = HERE.parent / "docs" / "profiles" / "franka.toml"
TASK = "lift the cube"
HEIGHT, WIDTH, FPS, FRAMES = 240, 320, 30, 60
"""Of the recording, which repeats."""
NOMINAL_FPS = 2.5
"""Of the data set: an observation for each chunk of 8 ticks at 20 Hz, asked for as far ahead as answers take."""
CADENCE = re.compile(
    r"I (?P<whose>servo: |)\d+ ticks at (?P<rate_hz>[\d.]+) Hz; a tick begins late by (?P<late_p50_ms>[\d.]+) ms "
    r"\(median\), (?P<late_p99_ms>[\d.]+) ms \(99 %\), (?P<late_max_ms>[\d.]+) ms \(worst\); (?P<missed>\d+) deadlines"
)
CAMERA = re.compile(r"camera agentview: (\d+ frames at .*)")
EXPORTED = re.compile(r"I (\d+ episodes, .*)")


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """Runs the ring and counts what came of it."""

    python: Path
    """an interpreter that has lerobot 0.4.4 (benchmarks/lerobot_export.py)"""
    episodes: int = 20
    ticks: int = 60
    """of each episode"""
    out: Path | None = None
    """folder of episodes, data set and logs; none given: a temporary one"""
    json: Path = HERE / "results" / "ring.json"


def main(config: RingConfig) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = config.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        run(config, out)
        log = (out / "run.log").read_text()
        figures = counted(out) | cadences(log) | {"camera": CAMERA.findall(log)[-1]} | read_back(config, out)
    figures["laws"] = {
        "every episode ended, none as an error": figures["outcomes"] == {"OUTCOME_FAILURE": config.episodes},
        "every tick is in the store": figures["ticks"] == config.episodes * config.ticks,
        "server and robot have recorded the same": figures["recorded apart"] == 0,
        "every column that lerobot reads is equal": not any("DIFFERS" in line for line in figures["columns"]),
        "lerobot would write the same schema": not figures["lerobot"]["schema_differences"],
    }
    print_table(figures)
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(not all(figures["laws"].values()))


def run(config: RingConfig, out: Path) -> None:
    """Leaves episodes of the server in out/server, of the robot in out/robot, the data set in out/dataset."""
    recording = out / "camera.db3"
    record(recording, scenery(), fps=FPS)
    with contextlib.closing(Panda()) as robot, served(episodes=out / "server") as address:
        profile = out / "franka.toml"
        profile.write_text(for_simulator(PROFILE.read_text(), robot.host))
        arm = ["--arm", "franka", "--profile", profile, "--camera", f"agentview=realsense:{recording},crop=square"]
        work = ["--task", TASK, "--episodes", config.episodes, "--max-ticks", config.ticks, "--ahead-ticks", None]
        client(out / "run.log", "run", *arm, *work, "--server", address, "--record", out / "robot")
    client(out / "export.log", "export", "--episodes", out / "server", "--out", out / "dataset", "--fps", NOMINAL_FPS)


def scenery() -> np.ndarray:
    """uint8 (F, H, W, 3): stripes that wander over grain, no two alike."""
    grain_HW1 = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 1))
    across_W1 = np.arange(WIDTH)[:, None]
    stripes_FW3 = [90 + 90 * np.sin((across_W1 + 5 * frame) / np.array([20, 30, 40])) for frame in range(FRAMES)]
    return np.stack([stripes_W3 + grain_HW1 for stripes_W3 in stripes_FW3]).astype(np.uint8)


def for_simulator(profile: str, host: str) -> str:
    """The example profile, at another address and without a real-time kernel."""
    for entry, change in (('host = "172.16.0.2"', f'host = "{host}"'), ("realtime = true", "realtime = false")):
        assert profile.count(entry) == 1, f"{PROFILE} has no {entry}"
        profile = profile.replace(entry, change)
    return profile


def client(log: Path, *arguments: object) -> None:
    """One command of robot_client; SystemExit with the end of its log when it fails."""
    with log.open("wb") as file:
        command = [sys.executable, "-m", "robot_client", *map(str, arguments)]
        ran = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ran.returncode:
        raise SystemExit(f"{log.stem} ended with code {ran.returncode}:\n{log.read_text()[-3000:]}")


def counted(out: Path) -> dict:
    """What is in the episodes of the server, and in how many the robot's own differ."""
    episodes = [read_episode(path) for path in files((out / "server",))]
    ticks = [tick for episode in episodes for tick in episode.ticks]
    held = [re.sub(r"\d+(\.\d+)?", "#", tick.reason) for tick in ticks if tick.source == episode_pb2.SOURCE_HOLD]
    led = [tick.reason for tick in ticks if tick.source == episode_pb2.SOURCE_POLICY]
    clips = [rule for reason in led for rule in {clip.partition(":")[0] for clip in reason.split("; ") if clip}]
    own = {episode.start.episode_id: episode for episode in map(read_episode, files((out / "robot",)))}
    return {
        "episodes": len(episodes),
        "outcomes": Counter(episode_pb2.Outcome.Name(episode.end.outcome) for episode in episodes),
        "ticks": len(ticks),
        "decisions": sum(len(episode.decisions) for episode in episodes),
        "holds": Counter(held),
        "clips": Counter(clips),
        "recorded apart": sum(not is_same(episode, own.get(episode.start.episode_id)) for episode in episodes),
        "unseen answers": sum(len(e.decisions) - len(own[e.start.episode_id].decisions) for e in episodes),
    }


def is_same(theirs: Episode, ours: Episode | None) -> bool:
    """But for an answer that came after the last tick, which the robot does not record."""
    return ours is not None and ours.ticks == theirs.ticks and ours.decisions == theirs.decisions[: len(ours.decisions)]


def cadences(log: str) -> dict[str, dict[str, float]]:
    """Of the client's loop and of its servo, over the episodes: medians, and the worst."""
    found: dict[str, list[dict[str, str]]] = {"loop": [], "servo": []}
    for match in CADENCE.finditer(log):
        found["servo" if match["whose"] else "loop"].append(match.groupdict())
    kinds = {"rate_hz": median, "late_p50_ms": median, "late_p99_ms": median, "late_max_ms": max, "missed": sum}
    return {
        whose: {name: kind(float(each[name]) for each in episodes) for name, kind in kinds.items()}
        for whose, episodes in found.items()
    }


def read_back(config: RingConfig, out: Path) -> dict:
    """What the real lerobot reads, against the episodes of the server."""
    read = out / "read.npz"
    ran = subprocess.run([config.python, READER, out / "dataset", read], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"lerobot cannot read it:\n{ran.stderr[-3000:]}")
    columns = dict(np.load(read, allow_pickle=False))
    report = json.loads(str(columns.pop("report")))
    episodes: Sequence[Episode] = [read_episode(path) for path in files((out / "server",))]
    exported = EXPORTED.search((out / "export.log").read_text())
    return {
        "exported": exported[1] if exported else "nothing",
        "lerobot": report,
        "columns": compare(columns, episodes, exact=True) + compare_rest(columns, episodes),
    }


def compare_rest(columns: dict[str, np.ndarray], episodes: Sequence[Episode]) -> list[str]:
    """A line for each column that benchmarks.lerobot_export leaves out: words, and LeRobot's own numbers."""
    of_frames = columns["episode_index"]
    frames = [np.flatnonzero(of_frames == e) for e in range(len(episodes))]
    reasons = [reason for text in columns[lerobot.EXECUTED_REASONS] for reason in str(text).split("\n")]
    ends = [Parse(str(columns[lerobot.END][mine[-1]]), episode_pb2.EpisodeEnd()) for mine in frames]
    own_ends = [episode_pb2.EpisodeEnd.FromString(episode.end.SerializeToString()) for episode in episodes]
    for end in own_ends:
        end.ClearField("final_observation")
    frame_index = np.concatenate([np.arange(len(mine)) for mine in frames])
    found = {
        lerobot.EXECUTED_REASONS: reasons == [tick.reason for episode in episodes for tick in episode.ticks],
        lerobot.EXECUTED_IS_PAD: (~columns[lerobot.EXECUTED_IS_PAD]).sum() == sum(len(e.ticks) for e in episodes),
        lerobot.END: ends == own_ends,
        "index": (columns["index"] == np.arange(len(of_frames))).all(),
        "frame_index": (columns["frame_index"] == frame_index).all(),
        "timestamp": np.allclose(columns["timestamp"], frame_index / NOMINAL_FPS),
        "task_index": not columns["task_index"].any(),
    }
    return [f"{name} {columns[name].shape}: {'equal' if equal else 'DIFFERS'}" for name, equal in found.items()]


def print_table(figures: dict) -> None:
    for name in ("outcomes", "ticks", "decisions", "holds", "clips", "loop", "servo", "camera", "exported"):
        value = figures[name]
        print(f"  {name:<10}{', '.join(f'{k}: {v:g}' for k, v in value.items()) if isinstance(value, dict) else value}")
    print("  lerobot reads:")
    for line in figures["columns"]:
        print(f"    {line}")
    for law, kept in figures["laws"].items():
        print(f"  {'held  ' if kept else 'BROKEN'} {law}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RingConfig, description=__doc__)))
