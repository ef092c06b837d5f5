"""Drives an arm with a policy server, or prints what the server's policy is.

    python -m robot_client run --arm kinematic --server HOST:PORT --task "pick up the bowl" --episodes 3
    python -m robot_client doctor --arm franka --profile lab.toml --server HOST:PORT      what would stop a run
    python -m robot_client spec --server HOST:PORT
    python -m robot_client export --episodes DIR --out DIR        episode files as a LeRobotDataset

Flags that `run` and `doctor` do not know go to the arm: `--arm replay --path FILE`.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from protos.channel import Credentials
from protos.codec import ImageFormat
from robot_client import arms, pilots
from robot_client.arm import Arm, Task
from robot_client.client import Client
from robot_client.connect import OPENPI, connect
from robot_client.doctor import Doctor, doctor
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.errors import ArmError, RobotError
from robot_client.export import Export, export
from robot_client.film import SUFFIXES, Film
from robot_client.guide import guided, once_let_go
from robot_client.journal import Journal
from robot_client.leases import Leases, worker_name
from robot_client.observer import Observer
from robot_client.real_arm import RealArm
from robot_client.recorder import Recorder
from robot_client.rollout import EpisodeResult, Purpose, Rollout
from robot_client.spec import PolicySpec
from robot_client.terminal import own_terminal
from robot_client.view import View

logger = logging.getLogger("robot_client")

REFUSED = 2
"""Exit code when nothing was moved."""
INTERRUPTED = 130
UNSTORED = Path("episodes")
"""Where episode files go that the server does not keep."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Runs episodes on an arm and reports each."""

    task: tyro.conf.UseAppendAction[tuple[str, ...]]
    """What to do, in words; several, each given so, take turns."""
    arm: str = "kinematic"
    """Name of an installed arm; its own flags follow."""
    server: str = "localhost:50051"
    """HOST:PORT of the policy server, or openpi://HOST:PORT (robot_client/openpi.py)."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    episodes: int = 1
    """Of each task; with --leases, in all."""
    leases: bool = False
    """Take the work from the server's rollout queue: what it holds of these tasks."""
    session: str = ""
    """Practise in this session of the server's (python -m rl_trainer session list), which says version, purpose and
    temperature."""
    max_ticks: int = 200
    """Length of an episode unless the arm ends it earlier; 0 is no limit."""
    purpose: Purpose = "deploy"
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """Of the first episode; the next ones count up.  The server draws them if not given."""
    initial_state: str = ""
    """Where a simulated task begins, in the arm's own words."""
    image_format: ImageFormat = "raw"
    """How frames travel; jpeg takes a tenth of the bytes and is lossy."""
    resize: bool = False
    """Bring frames to the policy's size before they travel."""
    stream: bool = True
    """Ask over one stream instead of a call for each decision."""
    deadline_s: float = 10.0
    """For one try of any call."""
    give_up_after_s: float = 60.0
    """How long a lost server is tried again before the episode ends as an error."""
    follow: tyro.conf.OmitArgPrefixes[EpisodeConfig] = field(default_factory=EpisodeConfig)
    record: Path | None = None
    """Also write episode files here; where the server keeps none, `episodes` if not given."""
    film: Path | None = None
    """Write what the policy saw in the last episode (.gif, .png or .webp)."""
    view: str = ""
    """Show episodes in Rerun: spawn (a window), rerun+http://HOST:PORT/proxy, or a folder for its files."""
    pilot: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A device to take over, stop, and say the outcome with: keyboard, gamepad, spacemouse, serial-stop:PORT; several,
    each given so, together."""
    guided: bool = False
    """Before each episode, wait until a person at this terminal says that the scene is set up."""

    def __post_init__(self) -> None:
        if self.film is not None and self.film.suffix not in SUFFIXES:
            raise ValueError(f"film must end in one of {list(SUFFIXES)}, got {self.film.name!r}")
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if not self.task:
            raise ValueError("task must be given at least once")
        if self.session and (self.leases or self.server.startswith(OPENPI)):
            raise ValueError("session must be without leases, which name their own, and of a policy server of ours")
        if self.session and (self.temperature or self.purpose == "evaluate"):
            raise ValueError(
                "session says how its practice is sampled: leave out temperature and purpose, got"
                f" {self.temperature:g} and {self.purpose!r}"
            )
        if self.leases and self.server.startswith(OPENPI):
            raise ValueError(f"leases must come from a policy server of ours, openpi's have none, got {self.server}")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Prints what the server says about its policy."""

    server: str = "localhost:50051"
    """HOST:PORT of the policy server, or openpi://HOST:PORT (robot_client/openpi.py)."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    deadline_s: float = 10.0


def main(args: Sequence[str] | None = None) -> int:
    """0 when every episode ended, 1 when one ended as an error or the run was cut short, 2 when nothing was moved.

    130, as shells have it, for any other command that is interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    commands = (
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
        | Annotated[Spec, tyro.conf.subcommand("spec")]
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    command, rest = tyro.cli(commands, args=args, prog="robot_client", return_unknown_args=True)
    try:
        if isinstance(command, Spec):
            return show_spec(command, rest)
        if isinstance(command, Export):
            refuse_others("export", rest)
            return export(command)
        if isinstance(command, Doctor):
            return doctor(command, rest)
        return drive(command, rest)
    except RobotError as error:
        logger.error("%s", error)
        return REFUSED
    except KeyboardInterrupt:
        logger.error("interrupted")
        return INTERRUPTED


def show_spec(command: Spec, rest: Sequence[str]) -> int:
    refuse_others("spec", rest)
    patience_s = command.deadline_s
    client = connect(command.server, credentials=command.credentials, deadline_s=patience_s, give_up_after_s=patience_s)
    with closing(client):
        print(describe(client.spec()))
    return 0


def refuse_others(command: str, rest: Sequence[str]) -> None:
    if rest:
        raise RobotError(f"{command} takes no other flags, got {list(rest)}")


def describe(spec: PolicySpec) -> str:
    """The spec, a line for each thing a robot's owner asks about."""
    said = spec.message
    actions = [
        f"{name}: {low:.4g} to {high:.4g} {dimension.unit}"
        for name, low, high, dimension in zip(spec.action_names, spec.low_A, spec.high_A, said.action, strict=True)
    ]
    images = [f"{image.name}: {image.height}x{image.width}, resized by {image.resize}" for image in said.images]
    lines = {
        "model": f"{said.model}, base {said.base_fingerprint[:12]}",
        "versions": f"{list(said.versions)}, live {said.live_version}",
        "actions": "; ".join(actions),
        "chunk": f"{spec.chunk_length} actions of {len(spec.action_names)}, {spec.tokens.bins} tokens for each number",
        "tick rate": f"{spec.tick_rate_hz:g} Hz" if spec.tick_rate_hz else "unknown",
        "images": "; ".join(images),
        "state": ", ".join(spec.state_names) or "none",
        "prepared as": f"{said.image_path}, un-normalised by {said.unnorm_key}",
        "limits": f"{said.max_instruction_tokens} instruction tokens, {said.max_image_bytes} bytes an image",
        "episodes": "stored" if said.stores_episodes else "not stored",
    }
    return "\n".join(f"{name:<12} {line}" for name, line in lines.items())


class Tally(Observer):
    """How the episodes ended, among them the one that was under way when the run was cut short."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter()

    def on_end(self, result: EpisodeResult) -> None:
        self.outcomes[result.outcome] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items()) or "no episodes"


def drive(command: Run, rest: Sequence[str]) -> int:
    tally, cut_short = Tally(), ""
    try:
        run_all(command, rest, tally)
    except KeyboardInterrupt:
        cut_short = "interrupted"
    except RobotError as error:
        if not tally.outcomes:
            raise
        cut_short = str(error)
    if cut_short:
        logger.error("%s", cut_short)
    logger.info("%s", tally)
    return 1 if cut_short or tally.outcomes["error"] else 0


def run_all(command: Run, rest: Sequence[str], tally: Tally) -> None:
    """Every episode that is wanted.  Raises ArmError where one failed on an arm that nobody is there to see to."""
    with ExitStack() as stack:
        make, prog = arms.load(command.arm), f"robot_client run --arm {command.arm}"
        arm = stack.enter_context(closing(arms.parse(make, rest, prog=prog)))
        logger.info("%s", command)
        client = connect(
            command.server,
            credentials=command.credentials,
            image_format=command.image_format,
            resize=command.resize,
            stream=command.stream,
            deadline_s=command.deadline_s,
            give_up_after_s=command.give_up_after_s,
        )
        stack.callback(client.close)
        watching = [*observers(command, arm, client, stack), tally]
        leases = leases_of(command)
        if leases:
            stack.callback(leases.close)
        work = islice(leases.rollouts(tasks(command)), command.episodes) if leases else rollouts(command)
        if command.guided:
            terminal = stack.enter_context(closing(own_terminal()))
            work = guided(work, terminal, arm.recover if isinstance(arm, RealArm) else lambda: None)
        pilot = None
        if command.pilot:
            pilot = stack.enter_context(closing(pilots.together(command.pilot, arm.spec)))
            work = once_let_go(work, pilot)
            watching.append(pilot)
            if isinstance(arm, RealArm):
                arm.stopped = lambda: pilot.wish().stopped
        for result in run(arm, work, client, command.follow, observers=lambda _: watching, pilot=pilot):
            report(result, arm)
            broken = result.arm_failed and not arm.spec.lockstep  # a simulator fails at a rollout, not for good
            if leases:
                leases.settle(result, worker_failed=broken)
            if broken and not (command.guided or (pilot and pilot.wish().stopped)):
                raise ArmError("the run ends here: nobody is there to see to the arm (--guided waits for a person)")
            if result.refused and not leases:  # the next would be too, and the arm would move to its start for nothing
                raise RobotError(f"the run ends here: {result.message}")


def leases_of(command: Run) -> Leases | None:
    if not command.leases:
        return None
    return Leases(command.server, worker=worker_name(), can_run=command.task, credentials=command.credentials)


def tasks(command: Run) -> list[Task]:
    return [
        Task(name=task, instruction=task, initial_state=command.initial_state, max_ticks=command.max_ticks)
        for task in command.task
    ]


def rollouts(command: Run) -> list[Rollout]:
    turns = [task for _ in range(command.episodes) for task in tasks(command)]
    return [
        Rollout(
            task=task,
            purpose="train" if command.session else command.purpose,
            temperature=command.temperature,
            session_id=command.session,
            seed=None if command.seed is None else command.seed + n,
        )
        for n, task in enumerate(turns)
    ]


def observers(command: Run, arm: Arm, client: Client, stack: ExitStack) -> list[Observer]:
    policy = client.spec()
    watching: list[Observer] = [Journal()]
    if command.film is not None:
        watching.append(Film(command.film))
    folder = command.record or (None if policy.message.stores_episodes else UNSTORED)
    if folder is not None:
        watching.append(Recorder(folder, policy, arm.spec, image_format=client.image_format))
    if command.view:
        watching.append(stack.enter_context(closing(View(command.view, policy, arm.spec))))
    return watching


def report(result: EpisodeResult, arm: Arm) -> None:
    answers_ms = 1000 * np.array(result.answer_s or [0.0])
    logger.info(
        "%s (%s): %s%s; %d ticks (%d held, %d clipped), %d decisions answered in %.1f ms (median), %.1f ms (worst)",
        result.rollout.task.name,
        result.episode_id or "not opened",
        result.outcome,
        f": {result.message}" if result.message else "",
        result.ticks,
        result.holds,
        result.clips,
        result.decisions,
        np.median(answers_ms),
        answers_ms.max(),
    )
    if result.cadence is not None:
        logger.info("%s", result.cadence)
    if isinstance(arm, RealArm) and result.outcome != "error":
        logger.info("%s", arm.report())


if __name__ == "__main__":
    sys.exit(main())
