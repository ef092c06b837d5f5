"""One robot of benchmarks/soak.py, a process that starts fast: plays episodes for a while and says a line for each.

python -m benchmarks.soak_robot ADDRESS MANNERS SECONDS SEED
"""

from __future__ import annotations

import os
import queue
import random
import sys
import time

import grpc
import numpy as np

from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import OPTIONS
from protos.codec import decode_tensor, encode_image, encode_tensor

DEADLINE_S = 60.0
REST_S = (0.1, 0.5)
"""Between an answer and the next request: the time that a chunk takes to be executed."""
DECISIONS = (3, 25)


def main(address: str, manners: str, seconds: float, seed: int) -> None:
    chance, over_s = random.Random(seed), time.monotonic() + seconds
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        policy = policy_pb2_grpc.PolicyStub(channel)
        if manners == "silent":
            outbox: queue.SimpleQueue = queue.SimpleQueue()
            next(policy.ActStream(iter(outbox.get, None)), None)  # until it is closed, or the process killed
            return
        spec = policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=DEADLINE_S)
        seen = observation(spec, seed)
        while time.monotonic() < over_s:
            play(policy, spec, seen, chance, over_s=over_s, walks_out=manners == "drop")


def play(policy, spec, seen, chance: random.Random, *, over_s: float, walks_out: bool) -> None:
    """One episode.  Raises RpcError, and AssertionError for an answer that is none."""
    start = policy_pb2.StartEpisodeRequest(
        task="soak", purpose=episode_pb2.PURPOSE_DEPLOY, temperature=1.0, arm="soak", seed=chance.getrandbits(63)
    )
    episode_id = policy.StartEpisode(start, timeout=DEADLINE_S).episode_id
    outbox: queue.SimpleQueue = queue.SimpleQueue()
    replies = policy.ActStream(iter(outbox.get, None)) if chance.random() < 0.5 else None
    ticks: list[episode_pb2.Tick] = []
    decisions = chance.randint(*DECISIONS)
    for decision in range(decisions):
        request = policy_pb2.ActRequest(episode_id=episode_id, decision=decision, observation=seen, executed=ticks)
        if replies is None:
            reply = policy.Act(request, timeout=DEADLINE_S)
        else:
            outbox.put(request)
            reply = next(replies)
        actions_KA = decode_tensor(reply.chunk.actions, shape=(spec.chunk_length, len(spec.action)))
        assert (reply.episode_id, reply.decision) == (episode_id, decision) and np.isfinite(actions_KA).all(), reply
        ticks = [
            episode_pb2.Tick(decision=decision, index=k, action=action_A.tolist(), source=episode_pb2.SOURCE_POLICY)
            for k, action_A in enumerate(actions_KA)
        ]
        time.sleep(chance.uniform(*REST_S))
        if walks_out and time.monotonic() > over_s:
            os._exit(0)  # the power is off
    outbox.put(None)
    outcome = chance.choice((episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE))
    end = policy_pb2.EndEpisodeRequest(episode_id=episode_id, outcome=outcome, executed=ticks)
    policy.EndEpisode(end, timeout=DEADLINE_S)
    print(f"episode {decisions}", flush=True)


def observation(spec: policy_pb2.PolicySpec, seed: int) -> episode_pb2.Observation:
    generator = np.random.default_rng(seed)
    return episode_pb2.Observation(
        images={
            image.name: encode_image(generator.integers(0, 255, (image.height, image.width, 3), dtype=np.uint8))
            for image in spec.images
        },
        state=encode_tensor(generator.normal(size=len(spec.state)).astype(np.float32)),
        instruction="pick up the milk and place it in the basket",
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    except (grpc.RpcError, AssertionError, StopIteration) as error:
        print(f"error {error!r}".replace("\n", " "), flush=True)
        sys.exit(1)
