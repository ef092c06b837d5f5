"""A policy server of one's own: a child process that lives as long as the command that needs it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protos.channel import free_port
from robot_client.client import PolicyClient
from robot_client.errors import PolicyError


@contextmanager
def served(
    server: str = "", model: str = "nano", *, episodes: Path | None = None, patience_s: float = 120.0
) -> Iterator[str]:
    """The address of a server that answers: the one given, or a child process that serves the model.

    model: nano, or the folder or hub id of a checkpoint.  episodes: where the child keeps what it sees; None: nowhere.
    SystemExit when the child ends or is silent for patience_s.
    """
    if server:
        yield server
        return
    port = free_port()
    address = f"127.0.0.1:{port}"
    print("starting a policy server ...", flush=True)
    command = [sys.executable, "-m", "policy_server", "serve", "--model", model, "--port", str(port)]
    command += ["--episodes", str(episodes)] if episodes else []
    child = subprocess.Popen(command)
    try:
        _wait_until_it_answers(child, address, patience_s)
        yield address
    finally:
        child.terminate()
        child.wait(30)


def _wait_until_it_answers(child: subprocess.Popen, address: str, patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while True:
        try:
            with PolicyClient(address, deadline_s=2.0) as client:
                client.spec()
            return
        except PolicyError as error:
            if child.poll() is not None:
                raise SystemExit(f"the policy server ended with code {child.returncode}") from error
            if time.monotonic() > give_up:
                raise SystemExit(f"the policy server did not answer within {patience_s:.0f} s: {error}") from error
            time.sleep(0.2)
