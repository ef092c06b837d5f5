"""The systemd unit and the Dockerfile: what they say is valid, and what they start is what the server takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from policy_server.config import ServeConfig
from policy_server.server import FLUSH_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
UNIT, DOCKERFILE = DEPLOY / "vla-rl.service", DEPLOY / "Dockerfile"
DOCKER_STOP_S = 10.0


def joined(path: Path) -> list[str]:
    """Lines as they are read: comments gone, continued ones joined."""
    kept = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(kept)).splitlines()


def setting(name: str) -> str:
    (value,) = [line.partition("=")[2] for line in joined(UNIT) if line.startswith(f"{name}=")]
    return value


def config_of(words: list[str]) -> ServeConfig:
    """What the server makes of a command line of it."""
    *_, module, command = words[: words.index("serve") + 1]
    assert (module, command) == ("policy_server", "serve")
    return tyro.cli(ServeConfig, args=words[words.index("serve") + 1 :])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/vla-rl/.venv/bin/python", sys.executable))
    line = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and UNIT.name not in done.stderr, done.stderr


def test_the_unit_starts_what_the_server_takes_and_waits_for_its_drain():
    config = config_of(shlex.split(setting("ExecStart")))
    assert config.access.may_be_public and config.host == "0.0.0.0"
    assert config.episodes == Path("/var/lib") / setting("StateDirectory") / "episodes"
    assert config.drain_s + 5 * FLUSH_S < float(setting("TimeoutStopSec"))


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint")
def test_the_dockerfile_has_nothing_to_find_fault_with():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_starts_what_the_server_takes_and_ends_before_docker_loses_patience():
    (entry,) = [line.removeprefix("ENTRYPOINT ") for line in joined(DOCKERFILE) if line.startswith("ENTRYPOINT ")]
    flags = ["--tokens", "t", "--tls-cert", "c", "--tls-key", "k"]
    config = config_of([*json.loads(entry), *flags])
    assert config.access.may_be_public and config.drain_s + FLUSH_S < DOCKER_STOP_S


def test_everything_that_the_image_copies_is_there_and_is_not_ignored():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [word for line in joined(DOCKERFILE) if re.match(r"COPY (?!--)", line) for word in line.split()[1:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored
