"""Requests as a client would send them."""

from __future__ import annotations

import numpy as np

from protos import episode_pb2, policy_pb2, rollout_pb2
from protos.codec import encode_image, encode_tensor
from tests.server.fake_model import ACTIONS, SIDE_PX


def observation(*, grey: int = 7, instruction: str = "pick up the bowl") -> episode_pb2.Observation:
    return episode_pb2.Observation(
        images={"agentview": encode_image(np.full((SIDE_PX, SIDE_PX, 3), grey, np.uint8))},
        state=encode_tensor(np.zeros(3, np.float32)),
        instruction=instruction,
        capture_time_ns=123,
    )


def act(episode_id: str, decision: int, *, ticks=(), **observed) -> policy_pb2.ActRequest:
    return policy_pb2.ActRequest(
        episode_id=episode_id, decision=decision, observation=observation(**observed), executed=ticks
    )


def tick(decision: int, index: int) -> episode_pb2.Tick:
    return episode_pb2.Tick(decision=decision, index=index, action=[0.5] * ACTIONS, source=episode_pb2.SOURCE_POLICY)


def start(**fields) -> policy_pb2.StartEpisodeRequest:
    return policy_pb2.StartEpisodeRequest(**{"purpose": episode_pb2.PURPOSE_TRAIN, "task": "fake/0", **fields})


def end(episode_id: str, **fields) -> policy_pb2.EndEpisodeRequest:
    return policy_pb2.EndEpisodeRequest(
        **{"episode_id": episode_id, "outcome": episode_pb2.OUTCOME_SUCCESS, "terminal": True, **fields}
    )


def rollout(rollout_id: str, task: str = "fake/0", **fields) -> rollout_pb2.Rollout:
    return rollout_pb2.Rollout(
        **{"rollout_id": rollout_id, "task": task, "purpose": episode_pb2.PURPOSE_TRAIN, "temperature": 1.0, **fields}
    )
