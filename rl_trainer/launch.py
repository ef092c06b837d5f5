"""The processes of a run on this machine: a policy server and simulator workers, started, watched, and restarted."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from protos.channel import Credentials, free_port
from rl_trainer.placement import Placement

WATCH_S = 0.5
CALM_S = 60.0
"""A child that ran for so long was well: its earlier deaths are forgotten."""
DEATHS = 10
"""How often a child may die, with no calm between, before it is left alone."""
BATCH_WAIT_MS = 100
"""Of a server of the run's own: workers have other episodes to move meanwhile, and a shared pass is a cheap one."""
TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class Child:
    """One command that is started again when it ends, with its output in a log file.

    environment: what it is told over this process's own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        on_loss: Callable[[str], None],
    ):
        self.name, self._command, self._log, self._on_loss = name, list(command), log, on_loss
        self._environment = {**os.environ, **(environment or {})}
        self._deaths = 0
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self) -> None:
        """Starts it again if it has ended; called often.  Raises ChildFailed when that does not help."""
        code = self._process.poll()
        if code is None:
            return
        calm = time.monotonic() - self._started_s > CALM_S
        self._deaths = 1 if calm else self._deaths + 1
        if self._deaths > DEATHS:
            raise ChildFailed(
                f"{self.name} ended {self._deaths} times in a row, the last with code {code}; see {self._log}"
            )
        self._on_loss(f"{self.name} ended with code {code}: started again")
        self._start()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._started_s = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                tied(self._command),
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )


class ChildFailed(RuntimeError):
    """A process of the run cannot be kept alive."""


def tied(command: Sequence[str]) -> list[str]:
    """The command, which on Linux gets SIGTERM once the thread that started it is gone, however its process went.

    It says so to the kernel itself: a preexec_fn would fork beside gRPC's threads, and now and then dies of it.
    """
    return [sys.executable, "-c", TIED, str(os.getpid()), *command] if sys.platform == "linux" else [*command]


@contextmanager
def kept_alive(children: Sequence[Child]) -> Iterator[Callable[[], None]]:
    """Watches the children in a thread; gives a check that raises ChildFailed once one is beyond help."""
    failed: list[ChildFailed] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S) and not failed:
            try:
                for child in children:
                    child.watch()
            except ChildFailed as error:
                failed.append(error)

    def check() -> None:
        if failed:
            raise failed[0]

    watcher = threading.Thread(target=watch, name="children", daemon=True)
    watcher.start()
    try:
        yield check
    finally:
        over.set()
        watcher.join()
        for child in reversed(children):
            child.stop()


@dataclass(frozen=True, kw_only=True)
class RunServer:
    """Where a run's policy server is, and what it is shown there."""

    address: str
    """HOST:PORT"""
    credentials: Credentials
    admin_address: str
    """HOST:PORT of its admin service"""
    admin_credentials: Credentials

    @classmethod
    def given(cls, address: str, admin: str, credentials: Credentials, admin_token_file: Path | None) -> RunServer:
        """One that runs already: the admin service is shown the same certificates, and a token of its own."""
        return cls(
            address=address,
            credentials=credentials,
            admin_address=admin,
            admin_credentials=replace(credentials, token_file=admin_token_file),
        )


def own_tokens(folder: Path) -> tuple[Path, dict[str, Credentials]]:
    """New tokens for a server of the run's own, whose ports others on this machine reach too.

    Gives the server's file of them, and what each role shows; only this user can read them.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    tokens = {role: secrets.token_hex(16) for role in ("robot", "trainer", "admin")}
    for role, token in tokens.items():
        (folder / role).write_text(token)
    known = folder / "tokens"
    known.write_text("".join(f"{role} {token}\n" for role, token in tokens.items()))
    return known, {role: Credentials(token_file=folder / role) for role in tokens}


@contextmanager
def started_here(
    placement: Placement,
    out: Path,
    *,
    model: str,
    unnorm_key: str | None,
    dtype: str,
    suite: str,
    slots: int,
    coarse_practice: bool,
    deterministic: bool,
) -> Iterator[tuple[RunServer, Callable[[], None]]]:
    """A policy server and simulator workers as the placement has them, with logs and episodes in `out`.

    Gives the server, and kept_alive()'s check.
    """
    port, admin = free_port(), free_port()
    server, (tokens, shown) = f"127.0.0.1:{port}", own_tokens(out / "access")
    serve = ["policy_server", "serve", "--model", model, "--port", str(port), "--admin-port", str(admin)]
    serve += ["--dtype", dtype]  # the learner's, or ratios would not begin at 1
    serve += ["--episodes", str(out / "episodes"), "--max-wait-ms", str(BATCH_WAIT_MS), "--tokens", str(tokens)]
    serve += ["--unnorm-key", unnorm_key] if unnorm_key is not None else []
    serve += ["--deterministic"] if deterministic else []
    work = ["sim", "worker", "--server", server, "--suites", suite, "--slots", str(slots), *shown["robot"].flags]
    work += ["--memory-gb", f"{placement.worker_gb:.2f}", *(["--coarse-practice"] if coarse_practice else [])]
    parts = [("policy_server", serve, placement.server.environment)]
    parts += [
        (f"sim-{number}" if number else "sim", [*work, "--processes", str(count)], environment)
        for number, (environment, count) in enumerate(placement.groups)
    ]
    children = [
        Child(name, [sys.executable, "-m", *command], out / f"{name}.log", environment=environment, on_loss=print)
        for name, command, environment in parts
    ]
    with kept_alive(children) as check:
        yield (
            RunServer(
                address=server,
                credentials=shown["trainer"],
                admin_address=f"127.0.0.1:{admin}",
                admin_credentials=shown["admin"],
            ),
            check,
        )
