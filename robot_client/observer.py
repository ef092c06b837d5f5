"""Whoever wants to know what an episode does: recording, video, progress.  The episode does not know them."""

from __future__ import annotations

from protos import episode_pb2
from robot_client.answer import Answer
from robot_client.arm import ArmState, Observation
from robot_client.rollout import EpisodeResult, Rollout


class Observer:
    """Override what you need.  Called from the thread that drives the arm: be quick."""

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        """The arm has been reset and the server has opened the episode."""

    def on_observation(self, observation: Observation) -> None:
        """A decision is due: this has been sent."""

    def on_answer(self, answer: Answer) -> None:
        """A decision has been answered: its chunk is followed, unless a person has moved the arm meanwhile."""

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        """`state` was the arm's before this tick was executed."""

    def on_final_observation(self, observation: Observation) -> None:
        """The episode is over, and not as an error: what the arm saw last."""

    def on_end(self, result: EpisodeResult) -> None:
        """The episode is closed."""
