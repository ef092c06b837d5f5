"""As many adapters as robots in one batch, beside one for all of them.

    python -m benchmarks.adapters [--robots 16] [--rank 16] [--slice-s 3] [--rounds 6]

Two servers: one has nano and takes adapters, the other serves nano with one adapter merged into it.  The contenders
take turns in short slices.  Then all robots ask at once, and the answers are held against those of models that have
each nothing but that robot's adapter, merged: greedy, so that a token may differ only where its two best are within
rounding.  The adapters are random and strong: they change nearly every answer.

Prints a table, writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro

from benchmarks.serving import BenchmarkConfig, Tally, child, drive, observation, robots_loop, server
from policy_server.batcher import DecodeRequest
from policy_server.config import ServeConfig
from policy_server.loading import load
from policy_server.observation import read_observation
from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.lora import apply_lora, save_lora
from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import dial, free_port
from protos.codec import decode_tensor
from rl_trainer.publisher import Publisher

RESULT = Path(__file__).parent / "results" / "adapters.json"
MODEL = "nano"
LAW = 1e-4
"""The contract's, for log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """Measure many adapters in one batch."""

    robots: int = 16
    """And adapters, and the largest batch."""
    rank: int = 16
    strength: float = 0.03
    """Standard deviation of the factors."""
    slice_s: float = 3.0
    rounds: int = 6


def main(config: AdaptersConfig) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes started below
    serving, admin = BenchmarkConfig(model=MODEL), free_port()
    with TemporaryDirectory() as folder:
        folders = [random_adapter(Path(folder) / str(seed), seed, config) for seed in range(config.robots)]
        with (
            server(serving, max_batch=config.robots, more=["--admin-port", str(admin)]) as beside,
            server(serving, max_batch=config.robots, more=["--adapter", str(folders[0])]) as merged,
            child(robots_loop) as robots,
        ):
            versions = publish(folders, beside.address, f"127.0.0.1:{admin}")
            contenders = {
                "no adapter": (beside, [0] * config.robots),
                "one, merged": (merged, [0] * config.robots),
                "one, beside the base": (beside, versions[:1] * config.robots),
                "one for each robot": (beside, versions),
            }
            tallies = {name: Tally() for name in contenders}
            for _ in range(config.rounds):
                for name, (target, wanted) in contenders.items():
                    drive(robots, target, wanted, config.slice_s, tallies[name])
            served = answers(beside.address, versions)
        pairs = enumerate(zip(folders, served, strict=True))
        differences = [compare(folder, index, chunk) for index, (folder, chunk) in pairs]
    rows = {name: tally.row() for name, tally in tallies.items()}
    report(rows, differences)
    RESULT.write_text(json.dumps({"config": asdict(config), "rows": rows, "answers": differences}, indent=1) + "\n")


def random_adapter(folder: Path, seed: int, config: AdaptersConfig) -> Path:
    model = load_checkpoint(MODEL).model
    torch.manual_seed(seed)
    for parameter in apply_lora(model, rank=config.rank, alpha=2 * config.rank):
        parameter.data.normal_(std=config.strength)
    save_lora(model, folder)
    return folder


def publish(folders: Sequence[Path], address: str, admin: str) -> list[int]:
    base: Checkpoint = load_checkpoint(MODEL)
    publisher = Publisher(address, admin, model=base.model, tokenizer=base.tokenizer)
    publisher.begin()
    versions = [publisher.send(folder, parent=0) for folder in folders]
    publisher.close()
    return versions


def answers(address: str, versions: Sequence[int]) -> list[episode_pb2.Chunk]:
    """To one robot for each version, all at once; robot i shows observation i."""
    with dial(address) as channel, ThreadPoolExecutor(len(versions)) as pool:
        policy = policy_pb2_grpc.PolicyStub(channel)
        spec = policy.GetSpec(policy_pb2.GetSpecRequest())

        def ask(index: int) -> episode_pb2.Chunk:
            start = policy_pb2.StartEpisodeRequest(purpose=episode_pb2.PURPOSE_EVALUATE, version=versions[index])
            episode_id = policy.StartEpisode(start).episode_id
            request = policy_pb2.ActRequest(episode_id=episode_id, observation=observation(spec, index))
            return policy.Act(request).chunk

        return list(pool.map(ask, range(len(versions))))


def compare(folder: Path, index: int, served: episode_pb2.Chunk) -> dict[str, float]:
    """A robot's answer, and what the model says that has nothing but its adapter, merged."""
    alone = load(ServeConfig(model=MODEL, adapter=folder))
    prepared = alone.prepare(read_observation(observation(alone.spec, index), alone.spec, field=""))
    request = DecodeRequest(prepared=prepared, version=0, temperature=0.0, seed=0, decision=0)
    (answer,) = alone.decode([request], [alone.first])
    tokens_N, logprobs_N = decode_tensor(served.token_ids), decode_tensor(served.token_logprobs)
    same = int(np.argmin(np.append(tokens_N == answer.token_ids_N, False)))  # tokens before the first that differs
    said_N = alone.score([prepared], tokens_N[None], 1.0, alone.first)[0]
    return {
        "batch": served.timing.batch_size,
        "tokens": len(tokens_N),
        "same_tokens": same,
        "gap": float(np.abs(said_N - logprobs_N).max()),
    }


def report(rows: dict[str, dict[str, float]], differences: Sequence[dict[str, float]]) -> None:
    one = rows["one, merged"]["decisions_per_s"]
    for name, row in rows.items():
        print(
            f"{name:22}{row['decisions_per_s']:7.1f} decisions/s   p50 {row['p50_ms']:6.1f} ms   "
            f"p99 {row['p99_ms']:6.1f} ms   mean batch {row['mean_batch']:4.1f}   "
            f"{row['decisions_per_s'] / one:.0%} of one, merged"
        )
    batches = [difference["batch"] for difference in differences]
    same = sum(difference["same_tokens"] == difference["tokens"] for difference in differences)
    print(
        f"answers in batches of {min(batches)} to {max(batches)}: {same} of {len(differences)} robots have the very "
        "tokens of their adapter alone; log-probabilities differ by "
        f"{max(difference['gap'] for difference in differences):.1e} at most (law {LAW:g})"
    )


if __name__ == "__main__":
    main(tyro.cli(AdaptersConfig, description=__doc__))
