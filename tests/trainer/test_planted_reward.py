"""A planted reward model through train's own path: arms that dwell more and more, and what the run says of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from policy_server.episode_store import EpisodeStore
from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.model import collate
from policy_server.vla.policy import Policy
from policy_server.vla.preprocessing import Preprocessor
from policy_server.vla_model import VlaModel
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.progress_model import ProgressModel
from rl_trainer.reward_alarm import AlarmConfig
from rl_trainer.reward_model import RECORD, load_reward_model
from rl_trainer.shaping import ShapingConfig
from rl_trainer.train import train
from rl_trainer.train_config import TrainConfig
from robot_client.arm import Task
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.leases import Lease, Leases
from robot_client.rollout import Rollout
from tests.client.fake_arm import FakeArm
from tests.server.running import RunningServer, serving

ITERATIONS, ROLLOUTS, CHUNK = 4, 4, 2


@pytest.fixture
def planted(tiny_vla: Path, tmp_path: Path) -> Path:
    """A reward model that takes whatever the fake arm sees for a milestone."""
    checkpoint = load_checkpoint(tiny_vla)
    model, observation = ProgressModel(checkpoint.model, checkpoint.tokenizer), FakeArm().observe()
    preprocessor = Preprocessor(checkpoint.config, checkpoint.tokenizer)
    seen = preprocessor.prepare(observation.images["agentview"], "lift", observation.state_S)
    with torch.no_grad():
        hidden_D = checkpoint.model.hidden(collate([seen]), torch.zeros(1, 0, dtype=torch.int64))[0, -1]
        no, yes = (checkpoint.tokenizer.backend.token_to_id(answer) for answer in "01")
        answers_VD = checkpoint.model.language_model.lm_head.weight
        answers_VD[no], answers_VD[yes] = 0.0, 5 * hidden_D / (hidden_D @ hidden_D)
    folder = tmp_path / "planted"
    model.save(folder)
    (folder / RECORD).write_text(json.dumps({"kind": model.kind, "config": {"milestones": {"rule": "keyframes"}}}))
    loaded = load_reward_model(folder, checkpoint.config, checkpoint.tokenizer)
    assert loaded.predict([seen])[0] > 0.9
    return folder


@contextmanager
def served(tiny_vla: Path, folder: Path) -> Iterator[RunningServer]:
    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=4)
    versions = VersionStore(None, first=model.fingerprint(model.first))
    with serving(model, store=EpisodeStore(folder), queue=64, versions=versions, admin_port=0) as server:
        yield server


def drifting(lease: Lease) -> tuple[FakeArm, Rollout]:
    """In iteration i one more arm dwells than in the one before, and longer; the others succeed at once."""
    _, iteration, number = lease.rollout.rollout_id.rsplit("/", 2)
    dwells = int(number) < int(iteration)
    task = Task(
        name=lease.rollout.task,
        instruction="lift",
        initial_state=lease.rollout.initial_state,
        max_ticks=CHUNK * (3 + int(iteration)),
    )
    rollout = Rollout(task=task, purpose="train", temperature=1.0, lease_id=lease.lease_id)
    return FakeArm(succeed_at=None if dwells else CHUNK), rollout


@contextmanager
def arms_at(server: RunningServer) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        leases = Leases(server.address, worker="test", can_run=["robosuite/*"])
        with PolicyClient(server.address) as client:
            while not over.is_set():
                if (lease := leases.take(wait_s=0.1)) is not None:
                    arm, rollout = drifting(lease)
                    assert [result.outcome for result in run(arm, [rollout], client)] != ["error"]
                    leases.let_go(lease.lease_id)
        leases.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("rule", "warned"), [("paper", True), ("potential", False)])
def test_a_policy_that_is_paid_for_dwelling_sets_off_the_alarm_and_a_potential_does_not_pay_for_it(
    tiny_vla: Path,
    planted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rule: Literal["paper", "potential"],
    warned: bool,
) -> None:
    with served(tiny_vla, tmp_path / "episodes") as server, arms_at(server):
        train(
            TrainConfig(
                out=tmp_path / "run",
                suite="robosuite",
                tasks=(0,),
                model=str(tiny_vla),
                server=server.address,
                admin=server.admin_address,
                iterations=ITERATIONS,
                rollouts=ROLLOUTS,
                evaluate_every=0,
                reward_model=planted,
                shaping=ShapingConfig(rule=rule),
                alarm=AlarmConfig(window=ITERATIONS),
                learner=LearnerConfig(warm_up=ITERATIONS),
            )
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [row["success/train"] for row in rows] == [1.0, 0.75, 0.5, 0.25]
    rises = np.diff([row["return"] for row in rows]) > 0
    assert rises.all() if warned else not rises.any()
    assert ("reward hacking: over 4 iterations" in capsys.readouterr().out) is warned
    assert [row["reward_alarm"] for row in rows] == [0.0] * (ITERATIONS - 1) + [float(warned)]
