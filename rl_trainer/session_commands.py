"""`python -m rl_trainer session start | list | show | pause | resume | promote | rollback | stop | export`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from protos import session_pb2
from rl_trainer.session import VERSIONS, train_session
from rl_trainer.session_client import SessionClient
from rl_trainer.session_config import At, SessionConfig
from rl_trainer.tally import Tally

STATES = {
    session_pb2.SESSION_STATE_RUNNING: "running",
    session_pb2.SESSION_STATE_PAUSED: "paused",
    session_pb2.SESSION_STATE_STOPPED: "stopped",
}


@dataclass(frozen=True, kw_only=True)
class _Asking:
    at: tyro.conf.OmitArgPrefixes[At] = field(default_factory=At)

    def lines(self, client: SessionClient) -> Iterator[str]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class List(_Asking):
    """The sessions of a server, a line for each."""

    def lines(self, client: SessionClient) -> Iterator[str]:
        yield from [summary(session) for session in client.all()] or ["no sessions"]


@dataclass(frozen=True, kw_only=True)
class _OfOne(_Asking):
    session: tyro.conf.Positional[str]
    """its id"""


@dataclass(frozen=True, kw_only=True)
class Show(_OfOne):
    """One session: what its versions achieved, the trial under way, and its log."""

    def lines(self, client: SessionClient) -> Iterator[str]:
        session = client.get(self.session)
        yield summary(session)
        for one in session.versions:
            yield f"  version {one.version}: {counted(one.tally)}"
        if session.standing:
            yield f"  on trial: version {session.candidate_version}; {session.standing}"
        for event in session.log:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.unix_ns / 1e9))
            yield f"  {at}  {event.what}, version {event.version}, by {event.by}: {event.reason}"


@dataclass(frozen=True, kw_only=True)
class _Controlling(_OfOne):
    note: str = ""
    """why, for the log"""

    control = session_pb2.CONTROL_UNSPECIFIED

    def lines(self, client: SessionClient) -> Iterator[str]:
        yield summary(client.control(self.session, self.control, self.note))


@dataclass(frozen=True, kw_only=True)
class _Choosing(_Controlling):
    version: int | None = None
    """that is meant; refused when it would befall another; none given: the one on trial, else the live one"""

    def lines(self, client: SessionClient) -> Iterator[str]:
        version = self.version
        if version is None:  # as it is seen now: the gate may be about to change it
            seen = client.get(self.session)
            version = seen.candidate_version if seen.HasField("candidate_version") else seen.live_version
        yield summary(client.control(self.session, self.control, self.note, version=version))


class Pause(_Controlling):
    """Drops the version on trial; robots go on with the live one; nothing is tried, nothing learns."""

    control = session_pb2.CONTROL_PAUSE


class Resume(_Controlling):
    """Tries and learns again."""

    control = session_pb2.CONTROL_RESUME


class Promote(_Choosing):
    """Makes the candidate live, whatever the gate would say."""

    control = session_pb2.CONTROL_PROMOTE


class Rollback(_Choosing):
    """Drops the candidate; without one, the version that was live before is so again."""

    control = session_pb2.CONTROL_ROLL_BACK


class Stop(_Controlling):
    """Ends the session for good: the version on trial is dropped, and robots get no more episodes in it."""

    control = session_pb2.CONTROL_STOP


@dataclass(frozen=True, kw_only=True)
class Export(_OfOne):
    """The adapter of the live version, in PEFT's layout, from the folder of the session's trainer."""

    out: Path
    """the trainer's folder: --out of `session start`"""
    to: Path
    """the folder to be made"""

    def lines(self, client: SessionClient) -> Iterator[str]:
        version = client.get(self.session).live_version
        shutil.copytree(self.out / VERSIONS / str(version), self.to)
        yield f"version {version} is in {self.to}"


@dataclass(frozen=True, kw_only=True)
class SessionCommand:
    """Starts, shows and steers sessions: the policy improves on the robots in front of you."""

    what: Annotated[
        Annotated[SessionConfig, tyro.conf.subcommand("start")]
        | Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Pause, tyro.conf.subcommand("pause")]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Promote, tyro.conf.subcommand("promote")]
        | Annotated[Rollback, tyro.conf.subcommand("rollback")]
        | Annotated[Stop, tyro.conf.subcommand("stop")]
        | Annotated[Export, tyro.conf.subcommand("export")],
        tyro.conf.arg(name=""),
    ]


def session(command: SessionCommand) -> None:
    """Does what the command line asks for."""
    if isinstance(command.what, SessionConfig):
        train_session(command.what)
        return
    with closing(SessionClient(command.what.at.run_server, patience_s=0.0)) as client:
        for line in command.what.lines(client):
            print(line, flush=True)


def summary(session: session_pb2.Session) -> str:
    """A session in a line."""
    trial = f", version {session.candidate_version} on trial" if session.HasField("candidate_version") else ""
    return (
        f"{session.session_id}: {STATES.get(session.state, 'unknown')}, version {session.live_version} live{trial},"
        f" {session.open_episodes} episodes open; {session.task}"
    )


def counted(tally: session_pb2.Tally) -> str:
    """Success with its interval, and how often people helped and the arm was held or clipped."""
    outcomes = Tally(tally.successes, tally.episodes)
    low, high = outcomes.interval
    return (
        f"{outcomes} succeeded [{low:.0%}, {high:.0%}], {tally.interventions} with help; held at {tally.holds} and"
        f" clipped at {tally.clips} of {tally.ticks} ticks; {tally.errors} errors"
    )
