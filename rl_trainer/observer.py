"""Whoever wants to know what a run does: lines on a terminal, a live view, a report.  The run does not know them.

A row is a line of the run's curve (metrics.py): scalars by name, with `step`, the iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rl_trainer.metrics import Row
from rl_trainer.rollouts import Finished
from rl_trainer.tally import total

Phase = Literal["start", "collect", "learn", "publish", "evaluate", "save"]
TIMED: tuple[Phase, ...] = ("collect", "learn", "publish", "evaluate")
"""Those of which a row has `seconds/PHASE`."""
SPENT = ("environment_steps", "decisions", "episodes", "optimiser_steps")
"""What a row counts since the run began."""


class Observer:
    """Override what you need.  Called from the run's own thread, which waits: be quick."""

    def on_start(self, instructions: Mapping[str, str], rows: Sequence[Row], seconds: float) -> None:
        """A run begins or goes on: its tasks (id -> instruction), its curve so far, and the wall time it has used."""

    def on_phase(self, phase: Phase, rollouts: int = 0) -> None:
        """What is done from now on; with collect and evaluate, for so many rollouts."""

    def on_rollout(self, finished: Finished) -> None:
        """One of them is in."""

    def on_iteration(self, row: Row) -> None:
        """The policy was updated and published."""

    def on_evaluation(self, row: Row, finished: Sequence[Finished]) -> None:
        """The policy was measured."""

    def on_note(self, text: str) -> None:
        """Something that a person should read."""

    def on_save(self) -> None:
        """A checkpoint is on disk, and so is the curve."""

    def close(self) -> None:
        """The run is over, however it ended."""


class Printer(Observer):
    """A line for everything, for logs and pipes.

    split: of the initial states that evaluations are done on.
    """

    def __init__(self, *, split: str):
        self._split = split

    def on_iteration(self, row: Row) -> None:
        moved = f"ratio {row['ratio']:.3f}  kl {row['update_kl']:.4f}" if "ratio" in row else "critic alone"
        self.on_note(
            f"iteration {row['step']}  success {total([row], 'train')}  {moved}  entropy {row['entropy']:.3f}  "
            f"explained {row['explained_variance']:.2f}  gap {row.get('logprob_gap', float('nan')):.1e}  version "
            f"{row['version']:.0f}  {row['seconds/collect']:.0f} + {row['seconds/learn']:.0f} s"
        )

    def on_evaluation(self, row: Row, finished: Sequence[Finished]) -> None:
        rate, low, high = (100 * row[f"success/{name}"] for name in ("evaluate", "low", "high"))
        self.on_note(
            f"iteration {row['step']}  greedy success on {self._split}: {total([row], 'evaluate')} = {rate:.1f} % "
            f"[{low:.1f}, {high:.1f}]"
        )

    def on_note(self, text: str) -> None:
        print(text, flush=True)
