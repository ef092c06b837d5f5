"""The Sessions service, over real sockets: what robots get, what an offer must show, what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.version_store import VersionStore
from protos import admin_pb2_grpc, episode_pb2, rollout_pb2, session_pb2, session_pb2_grpc
from tests.server import messages
from tests.server.fake_admin import FakeWeights
from tests.server.publishing import LORA, publication
from tests.server.running import RunningServer, eventually, serving

ADAPTER = {"kind": LORA, "adapter_config": "{}"}


class Lab(FakeWeights):
    """Weights that begin with "far" answer one unit beside the others, those that begin with "nan" with no numbers."""

    def decode(self, requests: Sequence[DecodeRequest], weights: Sequence[bytes], lane: int = 0) -> list[DecodeAnswer]:  # pyright: ignore[reportIncompatibleMethodOverride]
        answers = super().decode(list(requests), [None] * len(requests), lane)
        for answer, one in zip(answers, weights, strict=True):
            if one.startswith(b"far"):
                answer.actions_KA[:] += 1
            if one.startswith(b"nan"):
                answer.token_logprobs_N[:] = np.nan
        return answers


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with running(tmp_path) as server:
        yield server


def running(folder: Path, **options: Any) -> Any:
    model = Lab()
    versions = VersionStore(folder / "versions", first=model.fingerprint(model.first), keep=1)
    return serving(model, versions=versions, admin_port=0, episodes=folder / "episodes", **options)


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.admin_address) as channel:
        yield channel


@pytest.fixture
def sessions(channel: grpc.Channel) -> session_pb2_grpc.SessionsStub:
    return session_pb2_grpc.SessionsStub(channel)


@pytest.fixture
def admin(channel: grpc.Channel) -> admin_pb2_grpc.AdminStub:
    return admin_pb2_grpc.AdminStub(channel)


def begun(sessions, **fields) -> session_pb2.Session:
    fields = {"session_id": "s", "task": "fake/0", "temperature": 0.5, **fields}
    return sessions.StartSession(session_pb2.StartSessionRequest(**fields), timeout=10)


def published(admin, data: bytes, **header) -> session_pb2.OfferCandidateRequest:
    """A new version, ready to be offered."""
    reply = admin.PublishWeights(publication("f" * 64, data, **ADAPTER | header), timeout=10)
    return session_pb2.OfferCandidateRequest(
        session_id="s", version=reply.version, device_fingerprint=reply.device_fingerprint
    )


def play(server: RunningServer, outcome=episode_pb2.OUTCOME_SUCCESS, *, decisions: int = 2, **fields) -> str:
    episode_id = server.policy.StartEpisode(messages.start(session_id="s", **fields), timeout=10).episode_id
    for decision in range(decisions):
        server.policy.Act(messages.act(episode_id, decision), timeout=10)
    end = messages.end(episode_id, outcome=outcome, executed=[messages.tick(decisions - 1, 0)])
    server.policy.EndEpisode(end, timeout=10)
    return episode_id


def episodes(server: RunningServer, **fields) -> list[episode_pb2.EpisodeStart]:
    parts = server.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(**fields), timeout=10)
    return [part.record.start for part in parts if part.record.HasField("start")]


def refusal(call) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def test_the_session_says_how_its_episodes_are_sampled_and_the_record_names_it(server, sessions):
    begun(sessions, noise_correlation=0.25)
    play(server, temperature=2.0)
    [start] = episodes(server, session_id="s")
    assert (start.session_id, start.version, start.temperature, start.noise_correlation) == ("s", 0, 0.5, 0.25)


def test_its_episodes_are_streamed_apart_from_others(server, sessions):
    begun(sessions)
    other = server.policy.StartEpisode(messages.start(), timeout=10).episode_id
    server.policy.EndEpisode(messages.end(other), timeout=10)
    mine = play(server)
    assert [start.episode_id for start in episodes(server, session_id="s")] == [mine]
    assert [start.episode_id for start in episodes(server)] == [other, mine]


def test_a_candidate_takes_its_share_and_a_robot_outside_never_gets_it(server, sessions, admin):
    begun(sessions, rule=session_pb2.GateRule(max_episodes=1000))
    play(server)
    offer = published(admin, b"near")
    assert sessions.OfferCandidate(offer, timeout=10).accepted
    for _ in range(40):
        play(server)
    got = {start.version for start in episodes(server, session_id="s")}
    assert got == {0, offer.version}
    for _ in range(10):
        server.policy.StartEpisode(messages.start(), timeout=10)
    assert {start.version for start in episodes(server)} == got
    session = sessions.GetSession(session_pb2.GetSessionRequest(session_id="s"), timeout=10)
    assert session.live.episodes + session.candidate.episodes == 40 and "open" not in session.standing
    assert not session.episodes, "nobody asked for them"
    asked = session_pb2.GetSessionRequest(session_id="s", with_episodes=True)
    counted = sessions.GetSession(asked, timeout=10).episodes
    starts = episodes(server, session_id="s")
    assert [(one.episode_id, one.version) for one in counted] == [(one.episode_id, one.version) for one in starts]
    assert all(one.success and one.ticks == 1 and not one.intervened for one in counted)


def test_an_offer_again_is_the_same_offer(server, sessions, admin):
    begun(sessions)
    play(server)
    offer = published(admin, b"near")
    assert all(sessions.OfferCandidate(offer, timeout=10).accepted for _ in range(2))
    session = sessions.GetSession(session_pb2.GetSessionRequest(session_id="s"), timeout=10)
    assert [event.what for event in session.log] == ["offer"]


@pytest.mark.parametrize(
    "data, reason", [(b"far", "at most 0.25"), (b"nan", "no numbers")], ids=["far off", "not a number"]
)
def test_no_robot_sees_a_candidate_that_answers_otherwise(server, sessions, admin, data, reason):
    begun(sessions)
    play(server)
    reply = sessions.OfferCandidate(published(admin, data), timeout=10)
    assert not reply.accepted and reason in reply.reason and not reply.session.HasField("candidate_version")
    session = sessions.GetSession(session_pb2.GetSessionRequest(session_id="s"), timeout=10)
    assert [event.what for event in session.log] == ["refuse"] and reason in session.log[0].reason


def test_an_offer_that_is_given_up_costs_no_robot_its_answer(server, sessions, admin):
    begun(sessions)
    play(server)
    passes = len(server.model.batches)
    server.model.gate.clear()
    offer = sessions.OfferCandidate.future(published(admin, b"near"), timeout=10)
    eventually(lambda: len(server.model.batches) > passes)
    offer.cancel()
    time.sleep(0.1)  # for the server to hear of it
    server.model.gate.set()
    play(server)
    assert not server.server.waiting


def test_an_offer_needs_an_episode_the_right_fingerprint_and_an_adapter(server, sessions, admin):
    begun(sessions)
    offer = published(admin, b"near")
    refused = refusal(lambda: sessions.OfferCandidate(offer, timeout=10))
    assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION and "no episode" in refused.details()
    play(server)
    offer.device_fingerprint = "0" * 64
    refused = refusal(lambda: sessions.OfferCandidate(offer, timeout=10))
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT and "device_fingerprint" in refused.details()
    whole = published(admin, b"whole", kind=1, adapter_config="")
    refused = refusal(lambda: sessions.OfferCandidate(whole, timeout=10))
    assert "an adapter" in refused.details()


def test_versions_of_a_session_are_kept_whatever_is_published_after_them(server, sessions, admin):
    begun(sessions)
    play(server)
    offer = published(admin, b"near")
    sessions.OfferCandidate(offer, timeout=10)
    promote = session_pb2.ControlSessionRequest(session_id="s", control=session_pb2.CONTROL_PROMOTE)
    assert sessions.ControlSession(promote, timeout=10).live_version == offer.version
    for number in range(40):
        published(admin, f"another {number}".encode())
    assert {0, offer.version} <= set(server.policy.GetSpec(messages.policy_pb2.GetSpecRequest()).versions)
    play(server)
    assert episodes(server, session_id="s")[-1].version == offer.version


def test_a_persons_word_may_name_the_version_it_is_to_befall(server, sessions, admin):
    begun(sessions)
    play(server)
    offer = published(admin, b"near")
    sessions.OfferCandidate(offer, timeout=10)
    word = session_pb2.ControlSessionRequest(session_id="s", control=session_pb2.CONTROL_PROMOTE, version=0)
    refused = refusal(lambda: sessions.ControlSession(word, timeout=10))
    assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION and "version 0 is meant" in refused.details()
    word.version = offer.version
    assert sessions.ControlSession(word, timeout=10).live_version == offer.version


def test_errors_are_counted_apart(server, sessions):
    begun(sessions)
    play(server, episode_pb2.OUTCOME_ERROR)
    play(server, episode_pb2.OUTCOME_FAILURE)
    session = sessions.GetSession(session_pb2.GetSessionRequest(session_id="s", with_episodes=True), timeout=10)
    assert [(one.tally.episodes, one.tally.errors) for one in session.versions] == [(1, 1)]
    assert [one.error for one in session.episodes] == [True, False]


def test_an_episode_that_the_server_ended_before_it_had_an_answer_says_nothing_of_its_version(tmp_path):
    with running(tmp_path, episode_idle_s=0.5) as server, grpc.insecure_channel(server.admin_address) as channel:
        sessions = session_pb2_grpc.SessionsStub(channel)
        begun(sessions)
        server.policy.StartEpisode(messages.start(session_id="s"), timeout=10)  # and not a word more
        played = play(server)
        while not (
            found := sessions.GetSession(session_pb2.GetSessionRequest(session_id="s", with_episodes=True))
        ).episodes:
            time.sleep(0.05)
        assert len(episodes(server)) == 2, "it is stored, as an error"
        assert [one.episode_id for one in found.episodes] == [played] and not found.versions[0].tally.errors
    with running(tmp_path) as server, grpc.insecure_channel(server.admin_address) as channel:
        after = session_pb2_grpc.SessionsStub(channel).ListSessions(session_pb2.ListSessionsRequest(), timeout=10)
        assert not after.sessions[0].versions[0].tally.errors


def test_a_robot_that_fell_silent_after_an_answer_is_an_error_of_the_version_that_drove_it(tmp_path):
    with running(tmp_path, episode_idle_s=0.5) as server, grpc.insecure_channel(server.admin_address) as channel:
        sessions = session_pb2_grpc.SessionsStub(channel)
        begun(sessions)
        silent = server.policy.StartEpisode(messages.start(session_id="s"), timeout=10)
        server.policy.Act(messages.act(silent.episode_id, 0), timeout=10)
        while not (found := sessions.GetSession(session_pb2.GetSessionRequest(session_id="s"))).versions:
            time.sleep(0.05)
        assert found.versions[0].tally.errors == 1


def test_a_session_survives_the_server(tmp_path):
    with running(tmp_path) as server, grpc.insecure_channel(server.admin_address) as channel:
        begun(session_pb2_grpc.SessionsStub(channel))
        play(server)
        admin = admin_pb2_grpc.AdminStub(channel)
        session_pb2_grpc.SessionsStub(channel).OfferCandidate(published(admin, b"near"), timeout=10)
        play(server)
        before = session_pb2_grpc.SessionsStub(channel).ListSessions(session_pb2.ListSessionsRequest(), timeout=10)
    with running(tmp_path) as server, grpc.insecure_channel(server.admin_address) as channel:
        after = session_pb2_grpc.SessionsStub(channel).ListSessions(session_pb2.ListSessionsRequest(), timeout=10)
    assert after == before and before.sessions[0].live.episodes + before.sessions[0].candidate.episodes == 1


def test_practice_for_a_session_is_leased_like_any_other_work(server, sessions):
    begun(sessions)
    rollout = messages.rollout("s/0/0", session_id="s", temperature=0.0)
    server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[rollout]), timeout=10)
    lease = server.rollouts.LeaseRollout(
        rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"], wait_ms=1000), timeout=10
    )
    play(server, lease_id=lease.lease_id)
    [start] = episodes(server, session_id="s", run="s")
    assert (start.rollout_id, start.temperature) == ("s/0/0", 0.5)


def test_practice_for_a_session_that_is_not_there_is_refused_when_it_is_asked_for(server):
    rollout = messages.rollout("s/0/0", session_id="t", temperature=0.0)
    request = rollout_pb2.EnqueueRolloutsRequest(rollouts=[rollout])
    refused = refusal(lambda: server.rollouts.EnqueueRollouts(request, timeout=10))
    assert refused.code() == grpc.StatusCode.NOT_FOUND and "there is no session 't'" in refused.details()


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"session_id": ""}, "session_id"),
        ({"session_id": "../s"}, "session_id"),
        ({"session_id": "."}, "session_id"),
        ({"base_version": 7}, "base_version"),
        ({"temperature": -1.0}, "temperature"),
        ({"noise_correlation": 1.0}, "noise_correlation"),
        ({"task": "x" * 501}, "task"),
        ({"rule": session_pb2.GateRule(margin=2.0)}, "margin must be in"),
        ({"rule": session_pb2.GateRule(max_episodes=0)}, "max_episodes must be at least 1"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused_and_says_what(sessions, fields, field):
    refused = refusal(lambda: begun(sessions, **fields))
    assert refused.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert field in refused.details()


def test_a_robot_that_asks_for_what_is_not_there_is_told(server, sessions):
    refused = refusal(lambda: play(server))
    assert refused.code() == grpc.StatusCode.NOT_FOUND and "there is no session 's'" in refused.details()
    begun(sessions)
    refused = refusal(lambda: play(server, purpose=episode_pb2.PURPOSE_EVALUATE))
    assert "PURPOSE_TRAIN" in refused.details()


def test_a_server_without_a_place_for_episodes_has_no_sessions():
    model = Lab()
    versions = VersionStore(None, first=model.fingerprint(model.first))
    with serving(model, versions=versions, admin_port=0) as server:
        with grpc.insecure_channel(server.admin_address) as channel:
            refused = refusal(lambda: begun(session_pb2_grpc.SessionsStub(channel)))
        assert "--episodes" in refused.details()
        assert "--episodes" in refusal(lambda: play(server)).details()


def test_a_candidate_is_compared_while_robots_wait_for_nothing(server, sessions, admin):
    """Its answers share passes with theirs: a robot asks on while the offer is looked at."""
    begun(sessions)
    play(server, decisions=20)
    offer = published(admin, b"near")
    episode_id = server.policy.StartEpisode(messages.start(), timeout=10).episode_id
    offered = sessions.OfferCandidate.future(offer, timeout=10)
    decision, began_s = 0, time.monotonic()
    while not offered.done() or decision < 5:
        server.policy.Act(messages.act(episode_id, decision), timeout=1)
        decision += 1
        assert time.monotonic() - began_s < 10
    assert offered.result().accepted
