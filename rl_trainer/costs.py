"""What a run will take, from prices: minutes by phase, memory, disk.  Arithmetic alone; who measures is calibration.py.

Time.  Simulators and server share the machine's cores and saturate them while they collect: the CPU seconds of all
parts are added up and divided by the cores.  Where there are fewer processes than cores, the busiest of them is waited
for instead.  Whatever else runs on the machine is taken to go on as it did while the prices were measured.  Learning is
wall time a decision, at the run's own ranks and threads, without an early stop.

Memory.  Of a learner's numbers P are trained: a float32 master, its gradient and two moments take 16 bytes each;
weights in bfloat16 lie beside their masters and have gradients of their own.  What a forward pass keeps for the
backward one is counted on the meta device, so that a 7B model needs no memory to be planned for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from policy_server.vla.config import VLAConfig
from policy_server.vla.lora import apply_lora
from policy_server.vla.model import VLA, Prompts
from rl_trainer.critic import CriticKind, critic_of
from rl_trainer.launch import BATCH_WAIT_MS

GIB = 2**30
MOST_REQUESTS = 16
"""In one pass of the server, by its defaults."""
SERVED = 1.08
"""Over decoding alone, of a decision that comes by network and is stored (benchmarks/FIGURES.md)."""
ASKED = 1.12
"""Over ticks and frames alone, of a decision that a simulator asks for: safety gate, records, network; seen in runs."""
HELD_MODELS, HELD_ADAPTERS = 4, 18
"""Versions in the server's memory besides the first: the live one, those used lately, and the next being built."""
MASTER_BYTES = 16
"""Of a trained number: float32 master, gradient, two moments of Adam."""
STATE_BYTES = 12
"""Of a trained number in a saved state: master and moments."""
KEPT_VERSIONS = 18
"""On disk: what a server keeps by default, the live one and the one before."""
RECORD_BYTES = 2048
"""Of a stored decision without its image: ticks, tokens, log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What calibration measured; CPU seconds, unless it says wall."""

    tick_s: float
    """a tick of a simulated arm"""
    practice_frame_s: float
    evaluation_frame_s: float
    reset_s: float
    """the start of an episode"""
    build_s: float
    """a scene, once a process"""
    pass_s: float
    """of the server, however many requests share it"""
    request_s: float
    """of the server, each request of a pass"""
    prepare_s: float
    """an observation made ready for the model, by the server and again by the learner"""
    slowdown: float
    """wall time over CPU time of a process now"""
    warm_decision_s: float
    """wall: a decision of an update that trains the critic alone, all its epochs; judged by the reward model, if any"""
    decision_s: float
    """wall: a decision of a whole update, all its epochs; judged likewise"""
    publish_s: float
    """wall"""
    load_s: float
    """wall: until the learner's model is there"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What shares the work of collecting."""

    cores: int
    processes: int
    """simulators"""
    slots: int
    """episodes interleaved in each"""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Seconds of wall time."""

    collect_s: float
    learn_s: float
    warm_learn_s: float
    """of an iteration in which the critic alone learns"""
    publish_s: float
    evaluate_s: float
    """one evaluation"""
    start_s: float
    """once: models are loaded, scenes built"""


def requests_in_a_pass(between_s: float, pass_s: float, request_s: float, host: Host) -> float:
    """How many requests a pass of the server answers, on average.

    Each simulator asks once in between_s.  What comes while one pass is computed shares the next,
    b = processes * (pass_s + b * request_s) / between_s; the first to find the server idle waits
    BATCH_WAIT_MS for others.
    """
    most = min(MOST_REQUESTS, host.processes * host.slots)
    idle = 1 + host.processes * BATCH_WAIT_MS / 1000 / between_s
    spare_s = between_s - host.processes * request_s
    if spare_s <= 0:
        return float(most)
    return min(float(most), max(idle, host.processes * pass_s / spare_s))


def collecting_s(episodes: int, ticks: float, frame_s: float, prices: Prices, host: Host, *, chunk: int) -> float:
    """Wall time until so many episodes of `ticks` ticks on average are in, one frame a chunk of actions."""
    decisions = episodes * ticks / chunk
    between_s = chunk * prices.tick_s + frame_s
    simulated_s = episodes * prices.reset_s + ASKED * decisions * between_s
    requests = requests_in_a_pass(between_s, prices.pass_s, prices.request_s, host)
    answer_s = SERVED * (prices.pass_s / requests + prices.request_s) + prices.prepare_s
    served_s = decisions * answer_s
    busy_s = max((simulated_s + served_s) / host.cores, simulated_s / host.processes, served_s)
    return prices.slowdown * busy_s


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a run does, and how often."""

    iterations: int
    rollouts: int
    """episodes of an iteration"""
    warm_up: int
    """iterations in which the critic alone learns"""
    evaluations: int
    evaluated: int
    """episodes of an evaluation"""
    ticks: float
    """of an episode, on average"""
    chunk: int
    """K"""
    tasks: int
    overlap: bool
    """an iteration is learned from while the next one is collected"""

    @property
    def decisions(self) -> int:
        """Of an iteration."""
        return ceil(self.rollouts * self.ticks / self.chunk)


def phases(schedule: Schedule, prices: Prices, host: Host) -> Phases:
    """How long each phase takes."""
    decisions, chunk = schedule.decisions, schedule.chunk
    read_s = prices.slowdown * decisions * prices.prepare_s / host.cores
    practice_s = collecting_s(schedule.rollouts, schedule.ticks, prices.practice_frame_s, prices, host, chunk=chunk)
    evaluate_s = collecting_s(schedule.evaluated, schedule.ticks, prices.evaluation_frame_s, prices, host, chunk=chunk)
    builds = host.processes * schedule.tasks
    return Phases(
        collect_s=practice_s + read_s,
        learn_s=decisions * prices.decision_s,
        warm_learn_s=decisions * prices.warm_decision_s,
        publish_s=prices.publish_s,
        evaluate_s=evaluate_s,
        start_s=prices.load_s + prices.slowdown * builds * prices.build_s / min(host.cores, host.processes),
    )


def iteration_s(phases: Phases, schedule: Schedule, host: Host, *, warm: bool, learner_cores: int) -> float:
    """Wall time of an iteration.

    With overlap both sides share the cores: no less than either alone, and no less than all their work on all cores.
    """
    learn_s = phases.warm_learn_s if warm else phases.learn_s
    if not schedule.overlap:
        return phases.collect_s + learn_s + phases.publish_s
    work_s = phases.collect_s + learn_s * min(1.0, learner_cores / host.cores)
    return max(phases.collect_s, learn_s + phases.publish_s, work_s)


def run_s(phases: Phases, schedule: Schedule, host: Host, *, learner_cores: int) -> float:
    """Wall time of the whole run."""
    warm = min(schedule.warm_up, schedule.iterations)
    seconds = {
        kind: iteration_s(phases, schedule, host, warm=kind, learner_cores=learner_cores) for kind in (True, False)
    }
    iterated_s = warm * seconds[True] + (schedule.iterations - warm) * seconds[False]
    return phases.start_s + iterated_s + schedule.evaluations * phases.evaluate_s


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a model's shapes say about memory."""

    numbers: int
    """of the model, adapters left out"""
    frozen: int
    """of these"""
    trained: int
    """of the model, or of the adapters"""
    width: int
    """bytes of a weight"""
    trained_width: int
    """bytes of a trained weight: adapters are float32 always"""
    saved_bytes: int
    """what the forward pass of a microbatch keeps for the backward one"""
    critic_trained: int = 0
    """of the critic's own backbone, where it has one"""
    critic_copied: int = 0
    """frozen numbers that lie in memory again for it"""

    @property
    def weights_bytes(self) -> int:
        return self.numbers * self.width

    @property
    def is_adapter(self) -> bool:
        """What is trained lies beside the model, none of which is."""
        return self.frozen == self.numbers

    @property
    def published_bytes(self) -> int:
        """Of what a publish sends."""
        return self.trained * self.trained_width


def shapes_of(
    config: VLAConfig,
    *,
    dtype: torch.dtype,
    lora_rank: int,
    rows: int,
    prompt_tokens: int,
    freeze_vision: bool = False,
    recompute: bool = False,
    critic: CriticKind = "shared",
    critic_rank: int = 1,
) -> Shapes:
    """Counted on the meta device; rows and prompt_tokens: those of a microbatch."""
    with torch.device("meta"):
        model = VLA(config).to("meta", dtype)
        numbers = sum(p.numel() for p in model.parameters())
        if lora_rank:
            apply_lora(model, rank=lora_rank, alpha=1.0, vision=not freeze_vision)
        elif freeze_vision:
            model.freeze_vision()
        trained = [p for p in model.parameters() if p.requires_grad]
        saved = saved_bytes(model, rows=rows, prompt_tokens=prompt_tokens)
        if recompute:  # the inputs of all blocks, and what one block keeps: at most a layer's share of it all
            model.recompute_blocks()
            inputs = saved_bytes(model, rows=rows, prompt_tokens=prompt_tokens)
            saved = inputs + (saved - inputs) // config.llm.num_hidden_layers
        own = critic_of(model, critic, rank=critic_rank).backbone
    parameters = [] if own is None else [*own.parameters()]
    return Shapes(
        numbers=numbers,
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        width=dtype.itemsize,
        trained_width=trained[0].dtype.itemsize,
        saved_bytes=saved,
        critic_trained=sum(p.numel() for p in parameters if p.requires_grad),
        critic_copied=sum(p.numel() for p in parameters if not p.requires_grad) * (critic == "separate"),
    )


def saved_bytes(model: VLA, *, rows: int, prompt_tokens: int) -> int:
    """Bytes that autograd keeps of a scoring pass over so many rows, parameters left out; on the model's device."""
    config, device = model.config, model.device
    prompts = Prompts(
        images_BHW3=torch.zeros((rows, config.image_size, config.image_size, 3), dtype=torch.uint8, device=device),
        input_ids_BL=torch.zeros((rows, prompt_tokens), dtype=torch.int64, device=device),
        lengths_B=torch.full((rows,), prompt_tokens, device=device),
        states_BS=torch.zeros((rows, config.state_dim), device=device) if config.state_dim else None,
        shortest=prompt_tokens,
    )
    ids_BN = torch.full((rows, config.action_tokens), config.action_begin, device=device)
    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage  # held, so that its address is nobody else's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(prompts, ids_BN)
        nn.functional.log_softmax(scores.logits_BNV, -1).sum()
    return sum(storage.nbytes() for storage in kept.values())


def learner_bytes(shapes: Shapes, *, reference: bool, averaged: bool = False) -> int:
    """What one rank computes with: weights, optimisers, and beside them the most that is held for a while.

    That is a microbatch's activations, the weights laid out as a server's to be compared, or a state to be saved.  An
    average of the weights is held, and saved, beside them, and they are put aside where it is released.
    """
    apart = shapes.trained_width != 4  # trained weights that are float32 are the masters themselves
    trained = shapes.trained + shapes.critic_trained
    weights = (shapes.frozen + shapes.critic_copied) * shapes.width + apart * trained * shapes.trained_width
    gradients = apart * shapes.trained * shapes.trained_width
    average = 4 * averaged * shapes.trained
    passing = max(gradients + shapes.saved_bytes, average + shapes.weights_bytes, average + STATE_BYTES * trained)
    return weights + reference * shapes.weights_bytes + MASTER_BYTES * trained + average + passing


def server_bytes(shapes: Shapes, *, width: int) -> int:
    """Of a server that computes in numbers of so many bytes: the model, and what further versions have of their own."""
    further = HELD_ADAPTERS if shapes.is_adapter else HELD_MODELS
    return (shapes.numbers + further * shapes.trained) * width


def decision_bytes(config: VLAConfig) -> int:
    """A stored decision, its pixels as they are."""
    return 3 * config.sent_size**2 + RECORD_BYTES


def batch_bytes(config: VLAConfig, decisions: int, *, kept_width: int = 0, reference: bool = False) -> int:
    """An iteration's observations in the leader: as they came, as the model reads them, what the policy was found to
    make of them, and the reference policy, and, where they are kept, their image tokens, in numbers of kept_width
    bytes."""
    tokens = config.num_image_tokens * config.llm.hidden_size * kept_width
    logits = (1 + reference) * 4 * config.action_tokens * config.n_action_bins
    return decisions * (decision_bytes(config) + 3 * config.image_size**2 + logits + tokens)


def disk_bytes(
    config: VLAConfig, shapes: Shapes, *, schedule: Schedule, averaged: bool = False, serves: bool = True
) -> int:
    """What a run leaves behind: episodes, a version an iteration as far as they are kept, the state (twice while it is
    replaced), the last policy and the best.

    An average of the weights makes a version of its own.  serves: by a server of its own; another keeps episodes and
    versions elsewhere.
    """
    practised = schedule.iterations * schedule.rollouts
    episodes = practised + schedule.evaluations * schedule.evaluated
    stored = episodes * (ceil(schedule.ticks / schedule.chunk) + 1) * decision_bytes(config)
    versions = min((1 + averaged) * schedule.iterations, KEPT_VERSIONS) * shapes.published_bytes
    states = 2 * (STATE_BYTES * (shapes.trained + shapes.critic_trained) + 4 * averaged * shapes.trained)
    released = 2 * (shapes.published_bytes if shapes.is_adapter else shapes.weights_bytes)
    return serves * (stored + versions) + states + released


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of one kind of process."""

    process: str
    where: str
    """whose memory"""
    gb: float
    """GiB, all processes of the kind together"""
    room_gb: float
    """GiB that there are"""


def refusal(needs: Sequence[Need]) -> str:
    """Why the run does not fit, in a sentence; empty when it does."""
    for where in dict.fromkeys(need.where for need in needs):
        here = [need for need in needs if need.where == where]
        total_gb = sum(need.gb for need in here)
        if total_gb > here[0].room_gb:
            parts = ", ".join(f"{need.process} {need.gb:.1f}" for need in here)
            return (
                f"the run needs {total_gb:.1f} GiB of the memory of {where}, which has {here[0].room_gb:.1f}: {parts};"
                " an adapter (--lora-rank), --dtype bfloat16, a smaller --learner.microbatch or fewer --processes"
                " take less"
            )
    return ""
