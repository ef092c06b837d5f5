"""Prices of a run on this machine as it is now: everything is run for real, for a short while.

Scenes are timed by the simulator itself, as many processes at once as the run will keep busy.  The learner updates on
random observations, at the run's own ranks and threads; the server's model decodes them.  Nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from policy_server.vla.checkpoint import weights_digests
from policy_server.vla.config import VLAConfig
from policy_server.vla.decoding import decode
from policy_server.vla.derived import as_served
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput
from policy_server.vla.policy import Policy
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.scoring import score
from protos.machine import cores
from rl_trainer.costs import MOST_REQUESTS, Prices
from rl_trainer.devices import compute_device
from rl_trainer.placement import Placement
from rl_trainer.ranks import launched
from rl_trainer.shaping import shaped_rewards
from rl_trainer.train import follow, make_learner, reward_of
from rl_trainer.train_config import TrainConfig
from rl_trainer.trajectories import Trajectory

CHILD_S = 1200.0
SCENES = 3
"""Tasks of the suite that are timed."""
MINIBATCHES = 2
"""Of one update that is timed."""
UPDATES = 4
"""Of either kind: the first makes buffers, the median of the others counts."""
PASSES = 4
"""Of the server's model at each batch."""
PROBES = 8
SIDES = 2
"""Learner and server each hash the weights and score the probes."""


@dataclass(frozen=True, kw_only=True)
class SceneCosts:
    """What `python -m sim timing` says."""

    tick_s: float
    frame_s: float
    reset_s: float
    build_s: float
    base_gb: float
    scene_gb: float
    slowdown: float
    coarse_frame_s: float = 0.0
    """0 where practice is not on coarse meshes"""


def time_scenes(config: TrainConfig, model: VLAConfig, placement: Placement, tasks: Sequence[int]) -> SceneCosts:
    """Of some of the tasks, in processes of their own.  Raises ValueError with the simulator's last words."""
    at_once = min(len(placement.workers), cores())
    chosen = sorted({tasks[n] for n in np.linspace(0, len(tasks) - 1, SCENES).round().astype(int)})
    command = [sys.executable, "-m", "sim", "timing", "--suite", config.suite, "--processes", str(at_once)]
    command += ["--tasks", *map(str, chosen), "--camera", model.camera, "--size-px", str(model.sent_size)]
    command += [] if config.coarse_practice else ["--no-coarse"]
    environment = {**os.environ, **placement.workers[0].environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, env=environment)
    if done.returncode:
        raise ValueError(f"scenes of {config.suite} cannot be timed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return SceneCosts(**json.loads(done.stdout))


def measure_prices(config: TrainConfig, scenes: SceneCosts, instructions: Sequence[str]) -> Prices:
    """The rest of the prices: of learner, server and publish."""
    learning = _time_learner(config, instructions)
    pass_s, request_s = _time_decoding(config, learning.observations)
    return Prices(
        tick_s=scenes.tick_s,
        practice_frame_s=scenes.coarse_frame_s if config.coarse_practice else scenes.frame_s,
        evaluation_frame_s=scenes.frame_s,
        reset_s=scenes.reset_s,
        build_s=scenes.build_s,
        slowdown=scenes.slowdown,
        pass_s=pass_s,
        request_s=request_s,
        prepare_s=learning.prepare_s,
        warm_decision_s=learning.warm_decision_s,
        decision_s=learning.decision_s,
        publish_s=learning.publish_s,
        load_s=learning.load_s,
    )


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What the learner costs, and what it was shown."""

    observations: Sequence[Prepared]
    prepare_s: float
    warm_decision_s: float
    decision_s: float
    publish_s: float
    load_s: float


def _time_learner(config: TrainConfig, instructions: Sequence[str]) -> Learning:
    """Updates of the critic alone, where there is one, then whole ones; none stops early."""
    gae = config.learner.advantage == "gae"
    learner_config = replace(config.learner, warm_up=UPDATES * gae, target_kl=0.0)
    config = replace(config, learner=learner_config, resume=False)
    with launched(config.ranks, follow, config) as ranks:
        began_s = time.perf_counter()
        learner, checkpoint = make_learner(config, ranks)
        load_s = time.perf_counter() - began_s
        count = MINIBATCHES * config.learner.minibatch
        reads = Preprocessor(checkpoint.config, checkpoint.tokenizer, unnorm_key=config.unnorm_key)
        prepare = _Preparing(reads, checkpoint.config, instructions)
        prepare_s, observations = prepare(count)
        trajectories = sampled_trajectories(
            learner.model, observations, temperature=config.temperature, per_trajectory=config.learner.minibatch
        )
        rewards = [trajectory.rewards_T for trajectory in trajectories]

        def update() -> None:
            ranks.share((trajectories, rewards))
            learner.update(trajectories, rewards)

        seconds = [_wall_s(update) for _ in range((1 + gae) * UPDATES)]
        ranks.share(None)
        published = 1 + (config.learner.average > 0)  # an average of the weights goes beside them
        publish_s = published * _publishing_s(learner.model, config.dtype, observations[:PROBES])
        reward, gamma = reward_of(config, checkpoint), config.learner.gamma
        judge_s = _wall_s(lambda: shaped_rewards(trajectories, reward, config.shaping, gamma=gamma)) / count
    return Learning(
        observations=observations,
        prepare_s=prepare_s,
        warm_decision_s=judge_s + float(np.median(seconds[1:UPDATES])) / count,
        decision_s=judge_s + float(np.median(seconds[1 - UPDATES :])) / count,
        publish_s=publish_s,
        load_s=load_s,
    )


def _time_decoding(config: TrainConfig, observations: Sequence[Prepared]) -> tuple[float, float]:
    """Seconds of a pass and of each request in it: the line through passes of one and of most requests.

    On CUDA where there is some, wherever the learner is: so the server is placed.
    """
    device = compute_device("auto")
    policy = Policy.load(
        config.model,
        unnorm_key=config.unnorm_key,
        device=device,
        dtype=config.dtype,
        deterministic_batch=MOST_REQUESTS if config.deterministic else None,
    )
    clock = time.perf_counter if device == "cuda" else time.process_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server decodes
    inputs = [DecodeInput(prepared=one, temperature=1.0) for one in (*observations,) * MOST_REQUESTS][:MOST_REQUESTS]
    one_s, all_s = (
        min(_spent_s(lambda batch=batch: policy.decode(inputs[:batch]), clock) for _ in range(PASSES))
        for batch in (1, MOST_REQUESTS)
    )
    torch.set_num_threads(threads)
    request_s = max(0.0, all_s - one_s) / (MOST_REQUESTS - 1)
    return one_s - request_s, request_s


class _Preparing:
    """Noise of the sizes that the policy asks for, under the suite's own instructions."""

    def __init__(self, preprocessor: Preprocessor, config: VLAConfig, instructions: Sequence[str]):
        self._config, self._instructions, self._preprocessor = config, instructions, preprocessor

    def __call__(self, count: int) -> tuple[float, list[Prepared]]:
        """CPU seconds of one, and so many."""
        draw, side = np.random.default_rng(0), self._config.sent_size
        pixels_HW3 = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        state_S = draw.normal(scale=0.3, size=self._config.state_dim).astype(np.float32)
        prepared = list[Prepared]()

        def prepare() -> None:
            for number in range(count):
                instruction = self._instructions[number % len(self._instructions)]
                prepared.append(self._preprocessor.prepare(pixels_HW3, instruction, state_S))

        return _spent_s(prepare, time.process_time) / count, prepared


def sampled_trajectories(
    model: VLA, observations: Sequence[Prepared], *, temperature: float, per_trajectory: int
) -> list[Trajectory]:
    """What the policy does about the observations, of one task, so that any two may be compared; half are successes.

    Sampled as on a server: ratios begin at 1.  Tokens that the policy never takes would have ratios, and gradients,
    among the denormal numbers, which a CPU is slow at.
    """
    parts = [observations[first : first + per_trajectory] for first in range(0, len(observations), per_trajectory)]
    trajectories = []
    for number, part in enumerate(parts):
        inputs = [DecodeInput(prepared=one, temperature=temperature, seed=seed) for seed, one in enumerate(part)]
        decoded = decode(model, inputs)
        rewards_T = np.zeros(len(part))
        rewards_T[-1] = success = number % 2
        trajectories.append(
            Trajectory(
                episode_id=str(number),
                task="",
                initial_state="",
                success=bool(success),
                whole=True,
                observations=tuple(part),
                after=None,
                token_ids_TN=decoded.token_ids_BN.astype(np.int64),
                logprobs_TN=decoded.token_logprobs_BN,
                mask_TN=np.ones(decoded.token_ids_BN.shape, bool),
                temperature_T=np.full(len(part), temperature, np.float32),
                version_T=np.zeros(len(part), np.int64),
                ticks_T=np.full(len(part), model.config.chunk_length),
                rewards_T=rewards_T,
            )
        )
    return trajectories


def _publishing_s(model: VLA, dtype: str, probes: Sequence[Prepared]) -> float:
    """Weights are written, hashed as a file and as tensors, laid out and asked about probes, by either side."""
    ids_BN = np.full((len(probes), model.config.action_tokens), model.config.action_begin)
    frozen = {name: "known" for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def one_side() -> None:
        with TemporaryDirectory(prefix="plan-") as folder:
            path = Path(folder) / "weights"
            save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}, path)
            hashlib.sha256(path.read_bytes())
        served = as_served(model, dtype)
        weights_digests(served, known=frozen)
        score(served, probes, ids_BN, 1.0)

    return SIDES * _wall_s(one_side)


def _wall_s(work: Callable[[], object]) -> float:
    return _spent_s(work, time.perf_counter)


def _spent_s(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began_s = clock()
    work()
    return clock() - began_s
