"""The real model behind the real service: what arrives is what the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policy_server.errors import BadRequest, Overloaded
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos import episode_pb2, policy_pb2
from protos.codec import decode_tensor, encode_image, encode_tensor
from tests.server import messages
from tests.server.running import serving


@pytest.fixture(scope="module")
def spec(live_server) -> policy_pb2.PolicySpec:
    return live_server.policy.GetSpec(policy_pb2.GetSpecRequest())


def observation(number: int) -> episode_pb2.Observation:
    generator = np.random.default_rng(number)
    words = ["pick", "up", "the", "bowl", "and", "place", "it"]
    return episode_pb2.Observation(
        images={"agentview": encode_image(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8))},
        state=encode_tensor(generator.normal(size=8).astype(np.float32)),
        instruction=" ".join(generator.choice(words, size=3 + number % 5)),
    )


def chunk(server, number: int, *, together: int = 0, **sampling: float) -> episode_pb2.Chunk:
    """The answer to observation `number`, while `together` other requests are under way."""
    start = messages.start(**{"seed": 0, "temperature": 1.0} | sampling)
    episode_id = server.policy.StartEpisode(start).episode_id
    others = [server.policy.StartEpisode(messages.start()).episode_id for _ in range(together)]
    request = policy_pb2.ActRequest(episode_id=episode_id, decision=0, observation=observation(number))
    calls = [server.policy.Act.future(request)]
    calls += [
        server.policy.Act.future(policy_pb2.ActRequest(episode_id=other, decision=0, observation=observation(100 + i)))
        for i, other in enumerate(others)
    ]
    replies = [call.result(30) for call in calls]
    for opened in (episode_id, *others):
        server.policy.EndEpisode(messages.end(opened))
    return replies[0].chunk


def tokens(message: episode_pb2.Chunk) -> list[int]:
    return decode_tensor(message.token_ids, dtype="int32").tolist()


def test_actions_are_what_the_tokens_stand_for_by_the_formula_in_the_spec(live_server, spec):
    message = chunk(live_server, 1)
    low, high, mask = (decode_tensor(getattr(spec.action_tokens, name)) for name in ("low", "high", "mask"))
    edges = np.linspace(-1, 1, spec.action_tokens.bins)
    bins = np.clip(spec.action_tokens.vocabulary - np.array(tokens(message)) - 1, 0, spec.action_tokens.bins - 2)
    centres_KA = ((edges[:-1] + edges[1:]) / 2)[bins].reshape(spec.chunk_length, len(spec.action))
    expected_KA = np.where(mask, 0.5 * (centres_KA + 1) * (high - low) + low, centres_KA)
    actions_KA = decode_tensor(message.actions, dtype="float32", shape=(spec.chunk_length, len(spec.action)))
    np.testing.assert_allclose(actions_KA, expected_KA, atol=1e-6)
    bounds = np.array([(dimension.low, dimension.high) for dimension in spec.action], np.float32)
    assert (actions_KA >= bounds[:, 0]).all() and (actions_KA <= bounds[:, 1]).all()


def test_sampling_is_a_function_of_the_request_alone(live_server):
    alone = chunk(live_server, 2, seed=7)
    for other in ({"seed": 8}, {"seed": 7, "noise_correlation": 0.9}):
        assert tokens(chunk(live_server, 2, **other)) != tokens(alone)
    for together in (0, 1, 5):
        again = chunk(live_server, 2, seed=7, together=together)
        assert tokens(again) == tokens(alone)
        logprobs = [decode_tensor(c.token_logprobs) for c in (again, alone)]
        np.testing.assert_allclose(*logprobs, atol=5e-5)


def test_a_deterministic_server_answers_bit_for_bit_the_same_whatever_shares_the_pass(tiny_vla):
    model = VlaModel(Policy.load(tiny_vla, deterministic_batch=4), name="tiny", max_batch=4)
    with serving(model, max_batch=4, max_wait_ms=100) as server:
        alone, *others = (chunk(server, 2, seed=2**64 - 1, together=together) for together in (0, 1, 3))
    assert {other.timing.batch_size for other in others} != {1}
    for other in others:
        assert (other.token_ids, other.token_logprobs) == (alone.token_ids, alone.token_logprobs)


def test_requests_that_arrive_together_share_a_pass(live_server):
    assert max(chunk(live_server, 3, together=5).timing.batch_size for _ in range(5)) > 1


def test_an_over_long_instruction_is_refused_with_its_length(live_server, spec):
    episode_id = live_server.policy.StartEpisode(messages.start()).episode_id
    request = policy_pb2.ActRequest(episode_id=episode_id, decision=0, observation=observation(0))
    request.observation.instruction = "bowl " * (spec.max_instruction_tokens + 1)
    (reply,) = live_server.policy.ActStream(iter([request]))
    assert reply.refusal.field == "observation.instruction"
    assert str(spec.max_instruction_tokens) in reply.refusal.message


def test_weights_for_which_the_device_has_no_room_may_come_again(tiny_vla, tmp_path, monkeypatch):
    def no_room(*args: object):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=4)
    monkeypatch.setattr("policy_server.vla_model.with_tensors", no_room)
    with pytest.raises(Overloaded, match="the device has no room") as refused:
        model.build(tmp_path, "full")
    assert refused.value.retry_after_ms > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_that_are_not_there_are_refused_without_a_word_about_where(tiny_vla, tmp_path, kind):
    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=4)
    with pytest.raises(BadRequest) as refused:
        model.build(tmp_path, kind)
    assert "safetensors" in str(refused.value) or "adapter_config.json" in str(refused.value)
    assert str(tmp_path) not in str(refused.value) and "/" not in str(refused.value)
