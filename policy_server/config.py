"""What `python -m policy_server serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from policy_server.rollout_queue import DEFAULT_LEASE_S
from protos.channel import DEFAULT_PORT


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a policy over gRPC."""

    model: str = "nano"
    """`nano` (the embedded default), a checkpoint folder, or a hub id such as `openvla/openvla-7b`."""

    adapter: Path | None = None
    """A LoRA adapter in PEFT's layout, applied to the model."""

    unnorm_key: str | None = None
    """Which of the checkpoint's statistics un-normalise the actions; needed when it holds several."""

    image_path: Literal["checkpoint", "libero", "plain", "processor"] = "checkpoint"
    """How images are prepared: as the checkpoint says, as LIBERO's fine-tuned models expect, only resized, or as
    OpenVLA's own processor does."""

    host: str = "127.0.0.1"
    """Address to listen on.  Calls are neither encrypted nor authenticated: keep to loopback or a trusted network."""

    port: int = DEFAULT_PORT
    """0 takes a free port, printed when serving."""

    max_batch: int = 16
    """Most requests in one pass of the model."""

    max_wait_ms: float = 10.0
    """Longest a request waits for others to share its pass."""

    queue: int = 64
    """Most requests waiting for a pass; more are refused with a hint when to retry."""

    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model; `auto` is bfloat16 on CUDA, float32 elsewhere."""

    deterministic: bool = False
    """Pad every pass to one shape: an answer is then bit-identical whatever shares its pass.  Slower."""

    threads: int = 1
    """CPU threads within one operation.  More than one pays only for large models on idle cores."""

    episodes: Path | None = None
    """Folder where finished episodes are kept; absent keeps none."""

    keep_gb: float | None = None
    """Most gigabytes of episodes to keep; the oldest go first, but none that a trainer has yet to read.  Absent keeps
    all."""

    episode_idle_s: float = 600.0
    """An episode that was silent for longer is closed as an error."""

    lease_s: float = DEFAULT_LEASE_S
    """A worker that does not renew its lease of a rollout for so long has lost it: the rollout goes to another."""

    admin_port: int | None = None
    """Port of the admin service, which takes new weights: 0 takes a free one, printed when serving; absent, there is
    none.  Whoever reaches it decides what robots do."""

    versions: Path | None = None
    """Folder where published versions are kept; absent: `versions` in the folder of episodes, and where there is none
    either, as long as the server runs."""

    @property
    def versions_folder(self) -> Path | None:
        """Where versions outlive the server."""
        return self.versions or (self.episodes and self.episodes / "versions")

    @property
    def has_versions(self) -> bool:
        """Whether there is, or may come to be, more than one."""
        return self.admin_port is not None or (self.versions_folder is not None and self.versions_folder.is_dir())

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in 0..65535, got {self.port}")
        if self.admin_port is not None and not 0 <= self.admin_port < 65536:
            raise ValueError(f"admin_port must be in 0..65535, got {self.admin_port}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")
        if not 0 <= self.max_wait_ms <= 1000:
            raise ValueError(f"max_wait_ms must be in 0..1000, got {self.max_wait_ms}")
        if self.queue < self.max_batch:
            raise ValueError(f"queue must hold at least one batch ({self.max_batch}), got {self.queue}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.keep_gb is not None and not self.keep_gb > 0:
            raise ValueError(f"keep_gb must be positive, got {self.keep_gb}")
        if self.keep_gb is not None and self.episodes is None:
            raise ValueError("keep_gb needs episodes, a folder to keep them in, got none")
        if not self.episode_idle_s > 0:
            raise ValueError(f"episode_idle_s must be positive, got {self.episode_idle_s}")
        if not self.lease_s > 0:
            raise ValueError(f"lease_s must be positive, got {self.lease_s}")
