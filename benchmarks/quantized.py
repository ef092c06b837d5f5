"""What fewer bits make of nano: memory, tokens, actions, log-probabilities and time, beside the weights as stored.

    python -m benchmarks.quantized [--work runs/quantized] [--states 2] [--processes 2]

nano drives LIBERO-Object, greedy, from tune states of every task, and its server keeps what it saw; episodes that are
there already are used again.  Then every one of those observations is answered by each contender, on the CPU: weights
stored, int8 and int4, in float32 and in bfloat16, which is what a GPU computes in.  All are compared with the stored
ones in float32; log-probabilities are of the tokens that those choose.  Passes are timed in turns, by the clock of the
process.

Prints a table, writes benchmarks/results/quantized.json.

Success, which is another thing, is for `python -m sim evaluate`:

    python -m policy_server serve --weights int8 --port 50061
    python -m sim evaluate --server localhost:50061 --suite libero_object --protocol held_out

Shapes: D observations, N tokens, K actions of a chunk, A numbers of an action.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.config import ServeConfig
from policy_server.loading import load
from policy_server.observation import read_observation
from policy_server.vla.quantized import stored_bytes
from policy_server.vla_model import VlaModel
from protos.episode_file import SUFFIX, read_episode
from sim.evaluate import EvaluateConfig, evaluate
from sim.local_server import served

RESULT = Path(__file__).parent / "results" / "quantized.json"
SUITE, PROTOCOL = "libero_object", "tune"
CONTENDERS: dict[str, dict[str, Any]] = {
    f"{weights} {dtype}": {"weights": weights, "dtype": dtype, "device": "cpu"}
    for dtype in ("float32", "bfloat16")
    for weights in ("stored", "int8", "int4")
}
STORED = "stored float32"
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class QuantizedConfig:
    """Measure quantised weights."""

    work: Path = Path("runs/quantized")
    """Folder of the episodes."""
    states: int = 2
    """Episodes of each task."""
    processes: int = 2
    """Simulator workers."""
    timed: int = 24
    """Passes of each contender at each batch size that are timed."""
    batches: tuple[int, ...] = (1, 8)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a contender makes of all observations."""

    ids_DN: np.ndarray
    actions_DKA: np.ndarray
    logprobs_DN: np.ndarray
    """Of the stored weights' tokens."""


def main(config: QuantizedConfig) -> None:
    torch.set_num_threads(1)
    if not any(config.work.glob(f"*{SUFFIX}")):
        record(config)
    models = {name: load(ServeConfig(max_batch=BATCH, **options)) for name, options in CONTENDERS.items()}
    requests = seen(config.work, models[STORED])
    answers = {name: decoded(model, requests) for name, model in models.items()}
    ids_DN = np.stack([answer.token_ids_N for answer in answers[STORED]])
    said = {name: said_of(answers[name], scored(model, requests, ids_DN)) for name, model in models.items()}
    cpu_ms = timed(models, requests, config)
    rows = {
        name: {
            "weights_mb": stored_bytes(model.first.vla) / 1e6,
            **apart(said[name], said[STORED], model),
            "cpu": {batch: cpu_ms[name][batch] / cpu_ms[STORED][batch] for batch in config.batches},
        }
        for name, model in models.items()
    }
    about = {"suite": SUITE, "protocol": PROTOCOL, "observations": len(requests), "tokens": ids_DN.size}
    about |= {"stored_cpu_ms": cpu_ms[STORED]}
    report(about, rows)
    settings = {key: value for key, value in asdict(config).items() if key != "work"}
    RESULT.write_text(json.dumps({"config": settings, **about, "rows": rows}, indent=1) + "\n")


def record(config: QuantizedConfig) -> None:
    with served(episodes=config.work) as address:
        evaluate(
            EvaluateConfig(
                server=address,
                suite=SUITE,
                protocol=PROTOCOL,
                episodes_per_task=config.states,
                processes=config.processes,
                videos=0,
            )
        )


def seen(folder: Path, model: VlaModel) -> list[DecodeRequest]:
    """A greedy request for every observation in the episodes."""
    return [
        DecodeRequest(
            prepared=model.prepare(read_observation(decision.observation, model.spec, field="observation")),
            version=0,
            temperature=0.0,
            seed=0,
            decision=0,
        )
        for path in sorted(folder.glob(f"*{SUFFIX}"))
        for decision in read_episode(path).decisions
    ]


def batches(requests: Sequence[DecodeRequest]) -> list[Sequence[DecodeRequest]]:
    return [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]


def decoded(model: VlaModel, requests: Sequence[DecodeRequest]) -> list[DecodeAnswer]:
    return [answer for part in batches(requests) for answer in model.decode(part, [model.first] * len(part))]


def scored(model: VlaModel, requests: Sequence[DecodeRequest], ids_DN: np.ndarray) -> np.ndarray:
    """float32 (D, N)."""
    prepared = [[request.prepared for request in part] for part in batches(requests)]
    ids = np.split(ids_DN, range(BATCH, len(ids_DN), BATCH))
    return np.concatenate([model.score(*part, 1.0, model.first) for part in zip(prepared, ids, strict=True)])


def said_of(answers: Sequence[DecodeAnswer], logprobs_DN: np.ndarray) -> Said:
    return Said(
        ids_DN=np.stack([answer.token_ids_N for answer in answers]),
        actions_DKA=np.stack([answer.actions_KA for answer in answers]),
        logprobs_DN=logprobs_DN,
    )


def apart(ours: Said, stored: Said, model: VlaModel) -> dict[str, Any]:
    """How far a contender is from the stored weights."""
    same_DN = ours.ids_DN == stored.ids_DN
    gap_DN = np.abs(ours.logprobs_DN - stored.logprobs_DN)
    error_A = np.abs(ours.actions_DKA - stored.actions_DKA).mean((0, 1))
    return {
        "tokens_equal": float(same_DN.mean()),
        "first_token_equal": float(same_DN[:, 0].mean()),
        "chunk_equal": float(same_DN.all(1).mean()),
        "action_error": {
            dimension.name: float(error) for dimension, error in zip(model.spec.action, error_A, strict=True)
        },
        "logprob_gap": {
            "mean": float(gap_DN.mean()),
            "p99": float(np.quantile(gap_DN, 0.99)),
            "max": float(gap_DN.max()),
        },
    }


def timed(
    models: dict[str, VlaModel], requests: Sequence[DecodeRequest], config: QuantizedConfig
) -> dict[str, dict[int, float]]:
    """Median CPU time of a pass, ms, by contender and batch size."""
    passes_ms = {name: {batch: [] for batch in config.batches} for name in models}
    for _ in range(config.timed):
        for name, model in models.items():
            for batch, spent_ms in passes_ms[name].items():
                started_s = time.process_time()
                model.decode(requests[:batch], [model.first] * batch)
                spent_ms.append(1e3 * (time.process_time() - started_s))
    return {
        name: {batch: float(np.median(spent_ms)) for batch, spent_ms in one.items()} for name, one in passes_ms.items()
    }


def report(about: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    print(f"{about['observations']} observations, {about['tokens']} tokens; beside the weights as stored:")
    for name, row in rows.items():
        gap, errors = row["logprob_gap"], row["action_error"]
        times = ", ".join(f"batch {batch} x{ratio:.2f}" for batch, ratio in row["cpu"].items())
        print(
            f"{name:16}{row['weights_mb']:6.2f} MB   equal: tokens {row['tokens_equal']:.1%}, first"
            f" {row['first_token_equal']:.1%}, chunks {row['chunk_equal']:.1%}   log-probability off by"
            f" {gap['mean']:.4f}, 99 % {gap['p99']:.3f}, at most {gap['max']:.2f}   CPU {times}"
        )
        print(
            " " * 16 + "actions off by " + ", ".join(f"{dimension} {error:.4f}" for dimension, error in errors.items())
        )


if __name__ == "__main__":
    main(tyro.cli(QuantizedConfig, description=__doc__))
