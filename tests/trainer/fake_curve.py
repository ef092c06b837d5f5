"""Rows of a curve as a run writes them, and rollouts as they come in, with known numbers in them."""

from __future__ import annotations

from collections.abc import Mapping

from protos import episode_pb2, rollout_pb2
from protos.episode_file import Episode
from rl_trainer.rollouts import Finished

OUTCOMES = {"s": episode_pb2.OUTCOME_SUCCESS, "f": episode_pb2.OUTCOME_FAILURE}
Row = dict[str, float]


def finished(task: str, letter: str, episode: Episode | None = None) -> Finished:
    """A rollout that came in: s success, f failure, e error."""
    rollout = rollout_pb2.Rollout(rollout_id=f"run/0/{task}", task=task, initial_state="40")
    if letter == "e":
        return Finished(rollout=rollout, episode=None, errors=("it broke",))
    start, end = episode_pb2.EpisodeStart(task=task), episode_pb2.EpisodeEnd(outcome=OUTCOMES[letter])
    return Finished(rollout=rollout, episode=episode or Episode(start=start, decisions=[], ticks=[], end=end))


def iteration(step: int, outcomes: Mapping[str, str], *, collect_s: float = 90.0) -> Row:
    """outcomes: task -> its letters.  100 environment steps and 10 decisions an episode."""
    total = "".join(outcomes.values())
    row = {
        "step": step,
        "success/train": total.count("s") / len(total),
        **{"ratio": 1.0, "update_kl": 0.01, "clip_fraction": 0.1, "entropy": 0.9, "logprob_gap": 1e-5},
        **{"value": 0.3, "explained_variance": 0.5, "return": 0.2},
        **{"seconds/collect": collect_s, "seconds/learn": 10.0, "seconds/publish": 2.0},
        **{f"probability/{task}": 1 / len(outcomes) for task in outcomes},
    }
    return row | _counts(outcomes, "train") | _spent(step, len(total))


def evaluation(step: int, outcomes: Mapping[str, str]) -> Row:
    """After `step` iterations of as many episodes; takes 50 s."""
    total = "".join(outcomes.values())
    rate = total.count("s") / len(total)
    row = {"step": step, "success/evaluate": rate, "success/low": rate / 2, "success/high": (1 + rate) / 2}
    row |= {"evaluated": len(total), "evaluation_errors": 0, "seconds/evaluate": 50.0}
    return row | _counts(outcomes, "evaluate") | _spent(step, len(total))


def _counts(outcomes: Mapping[str, str], kind: str) -> Row:
    successes = {f"{kind}_successes/{task}": letters.count("s") for task, letters in outcomes.items()}
    return successes | {f"{kind}_episodes/{task}": len(letters) for task, letters in outcomes.items()}


def _spent(step: int, episodes: int) -> Row:
    spent = {"environment_steps": 100 * step * episodes, "decisions": 10 * step * episodes, "episodes": step * episodes}
    return spent | {"optimiser_steps": 7 * step, "wall_clock_s": 120.0 * step, "version": step}
