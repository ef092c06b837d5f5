"""python -m policy_server serve | merge | compare"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import tyro

from policy_server.access import Guard
from policy_server.config import ServeConfig
from policy_server.engine import SWITCH_S
from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart, EngineGone
from policy_server.loading import opened
from policy_server.logs import configure as configure_log
from policy_server.model import Model
from policy_server.server import PolicyServer
from policy_server.version_store import VersionStore
from protos.channel import address_of

log = logging.getLogger("policy_server")

WRONG_USAGE = 2


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM, SIGINT or a Drain; prints "SERVING host:port model version N" when it does.

    A line for each further door follows: "ADMIN host:port", "OPENPI host:port", "HTTP host:port".
    """
    log.info("%s", config)
    sys.setswitchinterval(SWITCH_S)
    _allow_files()
    guard = Guard(config.access)
    with opened(config) as model:
        asyncio.run(_serve(config, model, guard))


def _allow_files() -> None:
    """As many open files as the system lets us have: every connection is one, and every open episode."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(config: ServeConfig, model: Model, guard: Guard) -> None:
    store = None
    if config.episodes is not None:
        keep_bytes = None if config.keep_gb is None else config.keep_gb * 1e9
        store = EpisodeStore(config.episodes, keep_bytes=keep_bytes)
    versions = None
    if config.has_versions:
        first = model.fingerprint(model.first)
        versions = VersionStore(config.versions_folder, first=first, keep=config.keep_versions)
    server = PolicyServer(
        model,
        host=config.host,
        port=config.port,
        max_batch=config.max_batch,
        max_wait_ms=config.max_wait_ms,
        queue=config.queue,
        store=store,
        episode_idle_s=config.episode_idle_s,
        session_episode_s=config.session_episode_s,
        lease_s=config.lease_s,
        client_episodes=config.client_episodes,
        client_calls=config.client_calls,
        versions=versions,
        adapter_slots=config.adapter_slots,
        admin_port=config.admin_port,
        guard=guard,
        http_port=config.http_port,
        openpi_port=config.openpi_port,
        openpi_keys=dict(text.split("=", 1) for text in config.openpi_keys),
        openpi_gripper=config.openpi_gripper,
    )
    drains: list[asyncio.Task] = []

    def leave() -> None:
        drains.append(asyncio.create_task(server.drain(0.0 if drains else config.drain_s)))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave)
    port = await server.start()
    await server.warm_up()
    doors = {"ADMIN": server.admin_port, "OPENPI": server.openpi_port, "HTTP": server.http_port}
    print(f"SERVING {address_of(config.host, port)} {model.spec.model} version {server.live_version}", flush=True)
    for door, port in doors.items():
        if port is not None:
            print(f"{door} {address_of(config.host, port)}", flush=True)
    await server.drained()
    log.info("stopping: decisions under way are answered first")
    await server.stop()
    if server.engine_is_gone:
        raise EngineGone("the server has stopped because the process that ran the model died")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write a model and its adapter as one checkpoint in the published layout."""

    model: str = "nano"
    """`nano`, a checkpoint folder, or a hub id."""

    adapter: Path
    """A LoRA adapter in PEFT's layout; the dataset_statistics.json of its folder is merged too."""

    out: Path
    """The folder to write, which must not exist."""

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the written weights; `stored` is what the model's own are in."""


def merge(config: MergeConfig) -> int:
    """Writes the checkpoint, whole or not at all.  Raises CannotStart."""
    from policy_server.vla.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, with_statistics
    from policy_server.vla.lora import load_lora, merge_lora

    if config.out.exists():
        raise CannotStart(f"out must be a new folder, but {str(config.out)!r} exists")
    try:
        dtype = None if config.dtype == "stored" else config.dtype
        base = load_checkpoint(config.model, dtype=dtype)
        base.model.config = with_statistics(base.config, config.adapter)
        load_lora(base.model, config.adapter)
        merge_lora(base.model)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=config.out.parent, prefix=f".{config.out.name}-") as folder:
            save_checkpoint(Path(folder) / "whole", base.model, base.tokenizer)
            (Path(folder) / "whole").rename(config.out)
    except (CheckpointError, OSError) as error:
        raise CannotStart(f"cannot merge: {error}") from error
    print(f"MERGED {config.model} and {config.adapter} in {config.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Print this model's outputs beside the recorded ones of a reference."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Laid out like openvla_golden: checkpoints and what the reference made of them."""


def compare(config: CompareConfig) -> int:
    """Prints the table; 1 when a stage is out of its limit.  Raises CannotStart."""
    from policy_server import compare as reference
    from policy_server.vla.checkpoint import CheckpointError

    try:
        rows = reference.compare(config.folder)
    except (reference.NothingToCompare, CheckpointError) as error:
        raise CannotStart(f"cannot compare: {error}") from error
    print(reference.report(rows))
    return 0 if all(row.passed for row in rows) else 1


def main(args: Sequence[str] | None = None) -> int:
    """0 after a clean stop, a merge or a good comparison; 1 after a bad one, or when the model was lost.

    2 when nothing can run as configured.
    """
    config = tyro.cli(
        Annotated[ServeConfig, tyro.conf.subcommand("serve")]
        | Annotated[MergeConfig, tyro.conf.subcommand("merge")]
        | Annotated[CompareConfig, tyro.conf.subcommand("compare")],
        args=args,
        prog="policy_server",
    )
    configure_log(config.log_format if isinstance(config, ServeConfig) else "text")
    try:
        if isinstance(config, MergeConfig):
            return merge(config)
        if isinstance(config, CompareConfig):
            return compare(config)
        serve(config)
    except CannotStart as error:
        print(f"policy_server: {error}", file=sys.stderr)
        return WRONG_USAGE
    except EngineGone as error:
        print(f"policy_server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
