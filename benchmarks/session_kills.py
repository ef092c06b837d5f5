"""SIGKILL of a session's trainer and of its server at random moments, while simulated robots practise.

    python -m benchmarks.session_kills [--kills 10] [--seed 0] [--json FILE]

Who is killed when is drawn from the seed before anything runs.  Whoever was killed is started again at once, the
trainer with --resume.  In the end every episode of the session that the server has stored must be counted once, in its
books as in the trainer's, and every rollout have one such episode at most; what stood in the session's log before a
kill must stand there unchanged; and every version that the log names must be in the trainer's folder, the live ones at
the server.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import tyro

from benchmarks.sessions import SUITE, TASKS, Lab, Start, lab
from protos import admin_pb2, admin_pb2_grpc, session_pb2
from protos.channel import dial
from rl_trainer.launch import tied
from rl_trainer.run_state import load_state
from rl_trainer.session import STATE, VERSIONS
from rl_trainer.session_client import SessionClient
from rl_trainer.session_config import At

Victim = Literal["trainer", "server"]
SHIFT, SESSION = "all", "killed"
OPTIONS = ("--update-every", "8", "--offer-every", "1", "--learner.warm-up", "0", "--gate.max-episodes", "10")
OPTIONS += ("--budget-episodes", "100000")
"""Many updates and verdicts: each is a moment that a kill may hit."""
PRACTICE = ("--suite", SUITE, "--tasks", *map(str, TASKS), "--split", "train_drawn")
AFTER_S = 30.0
"""Between the last kill and the end."""
END_S = 300.0


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    """Kill a session's trainer and server, and look for what got lost."""

    kills: int = 10
    seed: int = 0
    """of victims and moments"""
    every_s: tuple[float, float] = (10.0, 60.0)
    """shortest and longest time between two kills"""
    json: Path = Path(__file__).parent / "results" / "session_kills.json"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill as it is planned."""

    victim: Victim
    pause_s: float
    """since the one before, or the start"""


class Trainer:
    """A session's, in a process that is started again wherever it was killed.

    options: of `session start`, but for --out and where the server is.  niceness: how much it yields to others.
    """

    def __init__(self, at: At, out: Path, *options: str, niceness: int = 0):
        self.out = out
        self._command = ["nice", "-n", str(niceness), sys.executable, "-m", "rl_trainer", "session", "start"]
        self._command += ["--out", str(out)]
        self._command += ["--server", at.server, "--admin", at.admin, *options]
        self.start()

    def start(self) -> None:
        resume = ["--resume"] if (self.out / STATE).exists() else []
        self.process = subprocess.Popen(tied([*self._command, *resume]))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()


def main(config: KillsConfig) -> int:
    """0 where nothing was lost."""
    rng, victims = random.Random(config.seed), get_args(Victim)
    kills = [Kill(victim=rng.choice(victims), pause_s=rng.uniform(*config.every_s)) for _ in range(config.kills)]
    with tempfile.TemporaryDirectory() as name, lab(Start(model="nano"), SHIFT) as here:
        trainer, before = Trainer(here.at, Path(name) / SESSION, *OPTIONS, *PRACTICE), list[list[bytes]]()
        with here.practising(corrected=0.0), closing(SessionClient(here.at.run_server)) as client:
            for kill in kills:
                time.sleep(kill.pause_s)
                before.append(log_lines(here))
                print(f"the {kill.victim} is killed; {len(before[-1])} lines are in the log", flush=True)
                trainer.kill() if kill.victim == "trainer" else psutil.Process(here.server.pid).kill()
            time.sleep(AFTER_S)
            client.control(SESSION, session_pb2.CONTROL_STOP, "the end")
            trainer.process.wait(END_S)
            figures = found(here, trainer.out, client, before)
    figures |= {"kills": [asdict(kill) for kill in kills]}
    config.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures["laws"], indent=1))
    return int(not all(figures["laws"].values()))


def log_lines(here: Lab) -> list[bytes]:
    """The whole lines of the session's log."""
    path = here.folder / "versions" / "sessions" / f"{SESSION}.jsonl"
    return path.read_bytes().splitlines(keepends=True)[: path.read_bytes().count(b"\n")] if path.exists() else []


def served(here: Lab) -> set[int]:
    """The versions that the server has."""
    with dial(here.at.admin) as channel:
        reply = admin_pb2_grpc.AdminStub(channel).ListVersions(admin_pb2.ListVersionsRequest(), timeout=30)
    return {one.version for one in reply.versions}


def found(here: Lab, out: Path, client: SessionClient, before: Sequence[list[bytes]]) -> dict[str, Any]:
    """What there is in the end, and which laws it keeps."""
    stored = list(client.all_episodes(SESSION, 0))
    session = client.get(SESSION, with_episodes=True)
    fields, _ = load_state(out / STATE)
    counted = Counter(one.episode_id for one in session.episodes if not one.error)
    rollouts = Counter(episode.start.rollout_id for _, episode in stored)
    named = {event.version for event in session.log}
    made = {int(path.name) for path in (out / VERSIONS).iterdir()}
    lines = log_lines(here)
    return {
        "episodes": len(stored),
        "events": Counter(event.what for event in session.log),
        "live": session.live_version,
        "trainer": fields["counts"],
        "laws": {
            "every stored episode is counted once": counted == Counter(e.start.episode_id for _, e in stored),
            "no rollout has two": set(rollouts.values()) == {1},
            "the trainer took in each once": fields["counts"]["episodes"]
            == sum(number <= fields["cursor"] for number, _ in stored),
            "the log before each kill stands": all(lines[: len(some)] == some for some in before),
            "every version it names is there": named <= made,
            "those to go back to are at the server": {session.live_version, *session.past_versions} <= served(here),
        },
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(KillsConfig, description=__doc__)))
