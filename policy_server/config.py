"""What `python -m policy_server serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from policy_server.access import Access
from policy_server.admin import MAX_WITHIN_S
from policy_server.calls import DEFAULT_CALLS
from policy_server.episodes import DEFAULT_CLIENT_EPISODES
from policy_server.logs import LogFormat
from policy_server.rollout_queue import DEFAULT_LEASE_S
from policy_server.sessions import DEFAULT_EPISODE_S
from policy_server.version_store import DEFAULT_KEEP_VERSIONS
from policy_server.versions import DEFAULT_ADAPTER_SLOTS
from protos.channel import DEFAULT_PORT, is_loopback
from protos.openpi_codec import Gripper


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a policy over gRPC."""

    model: str = "nano"
    """`nano` (the embedded default), a checkpoint folder, or a hub id such as `openvla/openvla-7b`."""

    adapter: Path | None = None
    """A LoRA adapter in PEFT's layout, applied to the model; with it the dataset_statistics.json of its folder."""

    unnorm_key: str | None = None
    """Which of the model's and the adapter's statistics un-normalise the actions; needed when they are several."""

    image_path: Literal["checkpoint", "libero", "plain", "processor"] = "checkpoint"
    """How images are prepared: as the checkpoint says, as LIBERO's fine-tuned models expect, only resized, or as
    OpenVLA's own processor does."""

    host: str = "127.0.0.1"
    """Address to listen on, for every port; IPv6 with brackets or without.  One that others reach needs --tokens,
    --tls-cert and --tls-key."""

    port: int = DEFAULT_PORT
    """0 takes a free port, printed when serving."""

    access: tyro.conf.OmitArgPrefixes[Access] = field(default_factory=Access)

    max_batch: int = 16
    """Most requests in one pass of the model."""

    max_wait_ms: float = 10.0
    """Longest a request waits for others to share its pass."""

    queue: int = 64
    """Most requests waiting for a pass; more are refused with a hint when to retry."""

    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""

    devices: tuple[str, ...] = ()
    """Devices such as `cuda:0 cuda:1`, each with the model in a process of its own, behind one address; absent: the
    model runs in this process, on `device`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model; `auto` is bfloat16 on CUDA and with int4 weights, float32 elsewhere."""

    weights: Literal["stored", "int8", "int4"] = "stored"
    """Of the base's linear layers: as the checkpoint stores them, or quantised to 8 or 4 bits, for small cards.  A
    quantised base cannot be proved equal to a learner's: it takes an --adapter, but no published versions."""

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
    """An episode that was silent for longer is closed as an error; a session's later ones are counted after that."""

    session_episode_s: float = DEFAULT_EPISODE_S
    """An episode of a session that is under way for longer is counted as an error, and later ones wait for it no
    more."""

    client_episodes: int = DEFAULT_CLIENT_EPISODES
    """Most episodes that one client, an address, may have open; more are refused with a hint when to retry.  Each holds
    its last request in memory, for the live page."""

    client_calls: int = DEFAULT_CALLS
    """Most calls of one client at once: streams, and requests under way.  GetSpec states the bytes that a request may
    take: what arrives of a client, one request for each call or stream, takes at most so many times that, and what
    waits for the model, of all together, `queue` plus `max_batch` times (that for each device).  What is refused takes
    nothing more."""

    drain_s: float = 0.0
    """At SIGTERM or SIGINT, how long open episodes may run to their end; new ones are refused from then on.  0, and a
    second signal: decisions under way are answered, and open episodes are closed as errors.  Whoever sends the signal
    must wait a few seconds longer before SIGKILL."""

    lease_s: float = DEFAULT_LEASE_S
    """A worker that does not renew its lease of a rollout for so long has lost it: the rollout goes to another."""

    admin_port: int | None = None
    """Port of the admin service, which takes new weights: 0 takes a free one, printed when serving; absent, there is
    none.  With --episodes, trainers and sessions improve what is served.  Whoever reaches it decides what robots do."""

    http_port: int | None = None
    """Port of the live page and of /metrics for Prometheus: 0 takes a free one, printed when serving; absent, there is
    none."""

    log_format: LogFormat = "text"
    """Of the log on stderr: `text` for people, `json` for machines, a line an object."""

    openpi_port: int | None = None
    """Port for robots that speak openpi's protocol: 0 takes a free one, printed when serving; absent, there is none."""

    openpi_keys: tuple[str, ...] = ()
    """Where their observations have what the policy reads, as WHAT=KEY: WHAT is the name of a camera, state or prompt,
    and a "/" in KEY leads into nested dicts.  Those not given are openpi's for LIBERO: agentview=observation/image,
    robot0_eye_in_hand=observation/wrist_image, state=observation/state, prompt=prompt."""

    openpi_gripper: Gripper = "libero"
    """What their gripper's action means: libero, -1 opens and 1 closes, as in LIBERO's environments; policy, what the
    policy's own does, which for OpenVLA is 1 for open and 0 for closed."""

    versions: Path | None = None
    """Folder where published versions are kept; absent: `versions` in the folder of episodes, and where there is none
    either, as long as the server runs."""

    keep_versions: int = DEFAULT_KEEP_VERSIONS
    """How many of the newest published versions to keep.  Kept besides: the live one and the one that it was trained
    from, those in memory (of open episodes, or used lately), those that outstanding work names, and of a session those
    that were live in it; of one that is over, what it began with and what it led to."""

    adapter_slots: int = DEFAULT_ADAPTER_SLOTS
    """Most adapters kept on the device though no open episode uses them; the least recently used goes first."""

    @property
    def versions_folder(self) -> Path | None:
        """Where versions outlive the server."""
        return self.versions or (self.episodes and self.episodes / "versions")

    @property
    def has_versions(self) -> bool:
        """Whether there is, or may come to be, more than one."""
        return self.admin_port is not None or (self.versions_folder is not None and self.versions_folder.is_dir())

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.host.strip("[]"))
        if not (is_loopback(self.host) or self.access.may_be_public):
            raise ValueError(
                f"host must be a loopback address such as 127.0.0.1, got {self.host!r}: others may reach it only with"
                " --tokens, --tls-cert and --tls-key, or with --allow-public"
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in 0..65535, got {self.port}")
        if self.admin_port is not None and not 0 <= self.admin_port < 65536:
            raise ValueError(f"admin_port must be in 0..65535, got {self.admin_port}")
        if self.http_port is not None and not 0 <= self.http_port < 65536:
            raise ValueError(f"http_port must be in 0..65535, got {self.http_port}")
        if self.openpi_port is not None and not 0 <= self.openpi_port < 65536:
            raise ValueError(f"openpi_port must be in 0..65535, got {self.openpi_port}")
        if unclear := [text for text in self.openpi_keys if not all(text.partition("=")[::2])]:
            raise ValueError(f"openpi_keys must each be WHAT=KEY, got {unclear}")
        if self.weights != "stored" and self.has_versions:
            where = "admin_port" if self.admin_port is not None else f"versions in {self.versions_folder}"
            raise ValueError(
                f"weights must be 'stored' to serve published versions, got {self.weights!r} with {where}: a quantised"
                " base cannot be proved equal to a learner's"
            )
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
        if self.keep_versions < 1:
            raise ValueError(f"keep_versions must be at least 1, got {self.keep_versions}")
        if self.client_episodes < 1:
            raise ValueError(f"client_episodes must be at least 1, got {self.client_episodes}")
        if self.client_calls < 1:
            raise ValueError(f"client_calls must be at least 1, got {self.client_calls}")
        if not 0 <= self.drain_s <= MAX_WITHIN_S:
            raise ValueError(f"drain_s must be in 0..{MAX_WITHIN_S:g}, got {self.drain_s}")
        if self.adapter_slots < 0:
            raise ValueError(f"adapter_slots must not be negative, got {self.adapter_slots}")
        if not self.episode_idle_s > 0:
            raise ValueError(f"episode_idle_s must be positive, got {self.episode_idle_s}")
        if not self.session_episode_s > 0:
            raise ValueError(f"session_episode_s must be positive, got {self.session_episode_s}")
        if not self.lease_s > 0:
            raise ValueError(f"lease_s must be positive, got {self.lease_s}")
