"""`sim evaluate` of whatever speaks openpi's protocol: a server of ours, and one of somebody else's."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from protos import episode_pb2
from protos.episode_file import read_episode
from robot_client.connect import connect
from sim.__main__ import main
from sim.evaluate import EvaluateConfig, carry_out, plan
from sim.suites import find_suite
from tests.openpi_wire import StockServer
from tests.server.running import serving
from tests.sim.test_evaluate_libero import shortened

pytestmark = pytest.mark.libero

CONFIG = EvaluateConfig(suite="libero_object", tasks=(0,), episodes_per_task=2, processes=1, slots=2, videos=0)
TICKS = 24


def test_a_server_of_ours_gives_the_same_evaluation_through_either_door(tiny_vla, tmp_path):
    from policy_server.vla.policy import Policy
    from policy_server.vla_model import VlaModel

    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=8)
    reports = []
    with serving(model, max_batch=8, queue=64, openpi_port=0, episodes=tmp_path) as server:
        for door in (server.address, f"openpi://127.0.0.1:{server.server.openpi_port}"):
            with closing(connect(door)) as client:
                spec = client.spec()
            rollouts = [shortened(rollout, TICKS) for rollout in plan(CONFIG, find_suite(CONFIG.suite), 0)]
            reports.append(carry_out(replace(CONFIG, server=door), spec, rollouts))
    for report in reports:
        assert (report.rate.n, report.rate.errors, report.model, report.chunk_length) == (2, 0, "tiny", 2)
        assert {(episode.ticks, episode.decisions) for episode in report.episodes} == {(TICKS, TICKS // 2)}
    episodes = [read_episode(path) for path in tmp_path.glob("*.episode")]
    seen = {purpose: set() for purpose in (episode_pb2.PURPOSE_EVALUATE, episode_pb2.PURPOSE_DEPLOY)}
    for episode in episodes:
        seen[episode.start.purpose].add(tuple(decision.chunk.token_ids.data for decision in episode.decisions))
    by_grpc, by_openpi = seen.values()
    assert by_grpc == by_openpi and len(by_grpc) == 2  # of every decision, the same tokens


def test_a_server_of_somebody_elses_is_evaluated_by_the_command(tmp_path):
    dice = np.random.default_rng(0)
    stock = StockServer(lambda observation: {"actions": np.tile(dice.uniform(-1, 1, 7), (20, 1))})
    try:
        flags = ["--suite", "libero_object", "--tasks", "0", "--episodes-per-task", "1", "--processes", "1"]
        flags += ["--videos", "0", "--out", str(tmp_path)]
        assert main(["evaluate", "--server", stock.address, *flags]) == 0
    finally:
        stock.stop()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] and report["model"] == "openpi" and report["chunk_length"] == 20
    assert report["overall"]["n"] == 1 and report["overall"]["errors"] == 0
    seen = stock.observations[-1]
    assert seen["observation/image"].shape == seen["observation/wrist_image"].shape == (256, 256, 3)
    assert seen["observation/state"].shape == (8,) and seen["prompt"].startswith("pick up the")
    assert len(stock.observations) == 2 + 280 // 20  # this process and its worker each ask about a black picture first
