"""python -m policy_server serve | merge | compare"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from policy_server.config import ServeConfig
from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart
from policy_server.server import Model, PolicyServer
from policy_server.version_store import VersionStore

log = logging.getLogger("policy_server")

WRONG_USAGE = 2
SWITCH_S = 1e-4
"""How soon the engine's thread gets the interpreter back from the network's; it gives it up in every operation."""


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT; prints "SERVING host:port model version N" when it does.

    With an admin service a second line, "ADMIN host:port", follows.
    """
    log.info("%s", config)
    sys.setswitchinterval(SWITCH_S)
    model = load(config)
    asyncio.run(_serve(config, model))


def load(config: ServeConfig) -> Model:
    """The model that the config names, as the server wants it.  Raises CannotStart."""
    import torch

    from policy_server.vla.action_tokens import UnknownStatistics
    from policy_server.vla.checkpoint import CheckpointError
    from policy_server.vla.derived import with_adapter
    from policy_server.vla.policy import Policy
    from policy_server.vla_model import VlaModel

    torch.set_num_threads(config.threads)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    if device.startswith("cuda") and not cuda:
        raise CannotStart(f"device {device!r} was asked for, but this machine or its torch has no CUDA")
    dtype = ("float32" if device == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
    try:
        policy = Policy.load(
            config.model,
            adapter=None if config.has_versions else config.adapter,
            unnorm_key=config.unnorm_key,
            image_path=None if config.image_path == "checkpoint" else config.image_path,
            device=device,
            dtype=dtype,
            deterministic_batch=config.max_batch if config.deterministic else None,
        )
        base = policy
        if config.has_versions and config.adapter is not None:  # published weights are over the base: both are kept
            policy = base.with_model(with_adapter(base.model, config.adapter))
    except (CheckpointError, UnknownStatistics) as error:
        raise CannotStart(f"cannot serve the model {config.model!r}: {error}") from error
    return VlaModel(policy, name=Path(config.model).name, max_batch=config.max_batch, base=base)


async def _serve(config: ServeConfig, model: Model) -> None:
    store = None
    if config.episodes is not None:
        keep_bytes = None if config.keep_gb is None else config.keep_gb * 1e9
        store = EpisodeStore(config.episodes, keep_bytes=keep_bytes)
    versions = None
    if config.has_versions:
        versions = VersionStore(config.versions_folder, first=model.device_fingerprint)
    server = PolicyServer(
        model,
        host=config.host,
        port=config.port,
        max_batch=config.max_batch,
        max_wait_ms=config.max_wait_ms,
        queue=config.queue,
        store=store,
        episode_idle_s=config.episode_idle_s,
        lease_s=config.lease_s,
        versions=versions,
        admin_port=config.admin_port,
    )
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    port = await server.start()
    await server.warm_up()
    print(f"SERVING {config.host}:{port} {model.spec.model} version {server.live_version}", flush=True)
    if server.admin_port is not None:
        print(f"ADMIN {config.host}:{server.admin_port}", flush=True)
    await stopped.wait()
    log.info("stopping: decisions under way are answered first")
    await server.stop()


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write a model and its adapter as one checkpoint in the published layout."""

    model: str = "nano"
    """`nano`, a checkpoint folder, or a hub id."""

    adapter: Path
    """A LoRA adapter in PEFT's layout."""

    out: Path
    """The folder to write, which must not exist."""

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the written weights; `stored` is what the model's own are in."""


def merge(config: MergeConfig) -> int:
    """Writes the checkpoint, whole or not at all.  Raises CannotStart."""
    from policy_server.vla.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
    from policy_server.vla.lora import load_lora, merge_lora

    if config.out.exists():
        raise CannotStart(f"out must be a new folder, but {str(config.out)!r} exists")
    partial = config.out.with_name(f"{config.out.name}.partial")
    try:
        dtype = None if config.dtype == "stored" else config.dtype
        base = load_checkpoint(config.model, dtype=dtype)
        load_lora(base.model, config.adapter)
        merge_lora(base.model)
        shutil.rmtree(partial, ignore_errors=True)
        save_checkpoint(partial, base.model, base.tokenizer)
        partial.rename(config.out)
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
    """0 after a clean stop, a merge or a good comparison, 1 after a bad one, 2 when nothing can run as configured."""
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    config = tyro.cli(
        Annotated[ServeConfig, tyro.conf.subcommand("serve")]
        | Annotated[MergeConfig, tyro.conf.subcommand("merge")]
        | Annotated[CompareConfig, tyro.conf.subcommand("compare")],
        args=args,
        prog="policy_server",
    )
    try:
        if isinstance(config, MergeConfig):
            return merge(config)
        if isinstance(config, CompareConfig):
            return compare(config)
        serve(config)
    except CannotStart as error:
        print(f"policy_server: {error}", file=sys.stderr)
        return WRONG_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
