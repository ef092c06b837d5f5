"""What is counted, and what Prometheus and Grafana make of it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from policy_server.access import Access, Guard
from protos import admin_pb2, episode_pb2, rollout_pb2
from tests.openpi_wire import Robot
from tests.server import messages, publishing
from tests.server.fake_model import ACTIONS, CHUNK, SIDE_PX, FakeModel
from tests.server.rude_client import RudeClient
from tests.server.running import RunningServer, eventually, serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "vla-rl.json"
FROM_PROMETHEUS = {"job", "instance"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(FakeModel(), episodes=tmp_path) as running:
        yield running


def value(server: RunningServer, name: str, **labels: str) -> float | None:
    return server.server.metrics.registry.get_sample_value(name, labels)


def outcomes(server: RunningServer) -> dict[str, int]:
    """Of act requests, those that there were."""
    families = server.server.metrics.registry.collect()
    (requests,) = (family for family in families if family.name == "vla_rl_requests")
    return {
        sample.labels["outcome"]: int(sample.value)
        for sample in requests.samples
        if sample.name.endswith("_total") and sample.labels["call"] == "act" and sample.value
    }


def robots(server: RunningServer) -> dict[tuple[str, str], float]:
    """Arm and client -> age."""
    families = server.server.metrics.registry.collect()
    (ages,) = (family for family in families if family.name == "vla_rl_robot_age_seconds")
    return {(sample.labels["arm"], sample.labels["client"]): sample.value for sample in ages.samples}


def start(server: RunningServer, **fields) -> str:
    return server.policy.StartEpisode(messages.start(**fields)).episode_id


def test_a_decision_is_counted_once_by_what_became_of_it(server):
    episode_id = start(server)
    server.policy.Act(messages.act(episode_id, 0))
    for request in (messages.act(episode_id, 1, instruction=""), messages.act("nobody", 0)):
        with pytest.raises(grpc.RpcError):
            server.policy.Act(request)
    (refusal,) = server.policy.ActStream(iter([messages.act(episode_id, 9)]))
    assert refusal.HasField("refusal")
    assert outcomes(server) == {"answered": 1, "invalid_argument": 1, "failed_precondition": 2}
    assert value(server, "vla_rl_decision_seconds_count") == 1
    assert value(server, "vla_rl_requests_total", call="start", outcome="answered") == 1


def test_a_decision_that_a_newer_one_supersedes_and_one_that_the_client_gives_up_are_told_apart(server):
    server.model.gate.clear()
    first, second = start(server), start(server)
    running = server.policy.Act.future(messages.act(first, 0))
    eventually(lambda: server.model.batches)
    superseded = server.policy.Act.future(messages.act(second, 0))
    eventually(lambda: value(server, "vla_rl_queue_depth") == 1)
    newer = server.policy.Act.future(messages.act(second, 0, grey=8))
    assert superseded.exception(5).code() == grpc.StatusCode.ABORTED
    running.cancel()
    eventually(lambda: outcomes(server) == {"aborted": 1, "cancelled": 1})
    server.model.gate.set()
    newer.result(5)
    assert outcomes(server) == {"aborted": 1, "cancelled": 1, "answered": 1}


def test_a_fault_of_the_model_is_counted_as_internal(server):
    with pytest.raises(grpc.RpcError):
        server.policy.Act(messages.act(start(server), 0, instruction="explode"))
    assert outcomes(server) == {"internal": 1}


def test_what_the_openpi_door_refuses_is_counted_as_any_other_act():
    with serving(FakeModel(), openpi_port=0) as server, Robot(f"127.0.0.1:{server.server.openpi_port}") as robot:
        image, state = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8), np.zeros(3)
        whole = {"observation/image": image, "observation/state": state, "prompt": "pick up the bowl"}
        for observation in (whole, {**whole, "prompt": 7}, {**whole, "observation/state": np.zeros(2)}, [1, 2]):
            robot.infer(observation)
        assert outcomes(server) == {"answered": 1, "invalid_argument": 3}


def turned_away(server: RunningServer) -> dict[str, int]:
    """Status -> how many, where there were some."""
    found = server.server.metrics.registry.collect()
    samples = [sample for family in found if family.name == "vla_rl_turned_away" for sample in family.samples]
    return {s.labels["status"]: int(s.value) for s in samples if s.name.endswith("_total") and s.value}


def asked(server: RunningServer, port: str, token: str = "", **headers: str) -> int:
    """The status of / on an HTTP port."""
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"http://127.0.0.1:{getattr(server.server, f'{port}_port')}/"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=shown | headers), timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_whoever_is_turned_away_for_his_token_is_counted_on_every_port(tmp_path):
    robot = "robot-0123456789abcdef"
    (tmp_path / "tokens").write_text(f"robot {robot}\n")
    guard = Guard(Access(tokens=tmp_path / "tokens"))
    with serving(FakeModel(), guard=guard, http_port=0, openpi_port=0) as server:
        for metadata in ((), [("authorization", f"Bearer {robot}")]):
            with pytest.raises(grpc.RpcError):
                server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(), metadata=metadata, timeout=10)
        assert turned_away(server) == {"unauthenticated": 1, "permission_denied": 1}
        assert (asked(server, "http"), asked(server, "http", robot), asked(server, "openpi")) == (401, 403, 401)
        assert asked(server, "openpi", robot, Origin="http://somewhere.example") == 403
        assert turned_away(server) == {"unauthenticated": 3, "permission_denied": 3}
        assert outcomes(server) == {}


def test_whoever_is_turned_away_for_too_much_or_too_slowly_is_counted():
    with serving(FakeModel(), client_calls=1, openpi_port=0) as server:
        with Robot(f"127.0.0.1:{server.server.openpi_port}"):
            with pytest.raises(grpc.RpcError):
                start(server)
            assert asked(server, "openpi") == 429
        eventually(lambda: not server.server._calls._open)
        with pytest.raises(grpc.RpcError):
            server.channel.unary_unary("/vla_rl.Policy/Act")(b"\xff", timeout=10)
        server.server._calls._arrive_s = 0.1
        with RudeClient(server.address) as rude:
            assert rude.status(rude.call("/vla_rl.Policy/Act")) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert turned_away(server) == {"resource_exhausted": 2, "invalid_argument": 1, "deadline_exceeded": 1}
        assert value(server, "vla_rl_requests_total", call="start", outcome="resource_exhausted") is None


def test_there_is_a_zero_before_the_first_one_of_what_can_occur_and_of_nothing_else(server):
    for status in ("unauthenticated", "permission_denied", "deadline_exceeded"):
        assert value(server, "vla_rl_turned_away_total", status=status) == 0
        assert value(server, "vla_rl_requests_total", call="act", outcome=status) is None
    assert value(server, "vla_rl_requests_total", call="act", outcome="resource_exhausted") == 0


def test_queue_and_batches_are_what_the_engine_saw(server):
    server.model.gate.clear()
    episodes = [start(server) for _ in range(4)]
    calls = [server.policy.Act.future(messages.act(episodes[0], 0))]
    eventually(lambda: server.model.batches)
    calls += [server.policy.Act.future(messages.act(episode_id, 0)) for episode_id in episodes[1:]]
    eventually(lambda: value(server, "vla_rl_queue_depth") == 3)
    eventually(lambda: len(server.server._batcher._queue) == 3)  # none of them is still being prepared
    server.model.gate.set()
    for call in calls:
        call.result(5)
    eventually(lambda: server.server.metrics.passes == (2, 4))
    assert value(server, "vla_rl_queue_depth") == 0
    assert value(server, "vla_rl_batch_size_bucket", le="1.0") == 1  # one pass alone, then the other three together
    assert value(server, "vla_rl_tokens_total") == 4 * CHUNK * ACTIONS


def test_each_phase_is_timed_for_each_request_or_each_pass(server):
    episode_id = start(server)
    for decision in range(3):
        server.policy.Act(messages.act(episode_id, decision))
    eventually(lambda: server.server.metrics.passes == (3, 3))
    for phase, seconds in {"vision": 0.003, "prefill": 0.006, "decode": 0.009}.items():  # as the fake model says
        assert value(server, "vla_rl_phase_seconds_sum", phase=phase) == pytest.approx(seconds)
    for phase in ("prepare", "queue"):
        assert value(server, "vla_rl_phase_seconds_count", phase=phase) == 3
        assert 0 < (value(server, "vla_rl_phase_seconds_sum", phase=phase) or 0) < 5


def test_a_robot_has_figures_for_as_long_as_it_has_an_open_episode(server):
    assert robots(server) == {}
    for _ in range(2):
        episode_id = start(server, arm="franka")
        for decision in range(3):
            server.policy.Act(messages.act(episode_id, decision))
        ((robot, age_s),) = robots(server).items()
        assert robot == ("franka", "127.0.0.1") and 0 <= age_s < 5
        rate = value(server, "vla_rl_robot_decisions_per_second", arm=robot[0], client=robot[1])
        assert rate is not None and rate > 0
        server.policy.EndEpisode(messages.end(episode_id))
        assert robots(server) == {}


def test_arms_of_one_kind_on_one_computer_are_one_series(server):
    for arm in ("libero", "libero", "franka"):
        start(server, arm=arm)
    assert len(robots(server)) == 2
    assert value(server, "vla_rl_open_episodes") == 3


def test_the_words_of_a_client_cannot_forge_a_metric(server):
    arm = 'x"} 1\nvla_rl_live_version 666\n# \\'
    start(server, arm=arm)
    families = list(text_string_to_metric_families(generate_latest(server.server.metrics.registry).decode()))
    (live,) = (family for family in families if family.name == "vla_rl_live_version")
    assert [sample.value for sample in live.samples] == [0]
    (age,) = (family for family in families if family.name == "vla_rl_robot_age_seconds")
    assert [sample.labels["arm"] for sample in age.samples] == [arm]


def test_episodes_are_counted_by_how_they_ended_and_by_what_lies_in_the_store(server, tmp_path):
    for outcome in (episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_ERROR):
        server.policy.EndEpisode(messages.end(start(server), outcome=outcome))
    counts = {o: value(server, "vla_rl_episodes_ended_total", outcome=o) for o in ("success", "failure", "error")}
    assert counts == {"success": 2, "failure": 0, "error": 1}
    assert value(server, "vla_rl_stored_episodes") == 3
    assert value(server, "vla_rl_stored_bytes") == sum(path.stat().st_size for path in tmp_path.glob("*.episode"))


def test_a_server_without_a_store_says_nothing_of_stored_episodes():
    with serving(FakeModel()) as server:
        assert value(server, "vla_rl_stored_episodes") is None


def test_versions_are_counted_as_they_are_held_and_swapped(admin_server, admin, base):
    assert (value(admin_server, "vla_rl_live_version"), value(admin_server, "vla_rl_swaps_total")) == (0, 0)
    version = publishing.publish(admin, base, 0.01, set_live=True).version
    assert (value(admin_server, "vla_rl_live_version"), value(admin_server, "vla_rl_swaps_total")) == (version, 1)
    held = {kind: value(admin_server, "vla_rl_versions_held", kind=kind) for kind in ("first", "full", "lora")}
    assert held == {"first": 1, "full": 1, "lora": 0}
    admin.SetLive(admin_pb2.SetLiveRequest(version=0), timeout=30)
    admin.SetLive(admin_pb2.SetLiveRequest(version=0), timeout=30)  # it is live already
    assert (value(admin_server, "vla_rl_live_version"), value(admin_server, "vla_rl_swaps_total")) == (0, 2)


def test_two_servers_in_one_process_count_apart(server):
    with serving(FakeModel()) as other:
        server.policy.Act(messages.act(start(server), 0))
        assert outcomes(server) == {"answered": 1}
        assert outcomes(other) == {}


def test_names_follow_prometheus_conventions(server):
    start(server)
    for family in server.server.metrics.registry.collect():
        assert re.fullmatch(r"(vla_rl|process|python)_[a-z0-9_]+", family.name)
        assert family.documentation
        assert not re.search(r"_(ms|milliseconds|mb|mib|gb|minutes|total)$", family.name), family.name
        if family.type == "counter":
            assert {sample.name.removeprefix(family.name) for sample in family.samples} <= {"_total", "_created"}


def test_the_dashboard_uses_only_metrics_and_labels_that_exist(server):
    start(server, arm="franka")
    known: dict[str, set[str]] = {}
    for family in server.server.metrics.registry.collect():
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(expressions) > 20
    for expression in expressions:
        names = set(re.findall(r"\b(?:vla_rl|process|python)_\w+", expression))
        assert names and names <= set(known), expression
        labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
        labels |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert labels <= FROM_PROMETHEUS.union(*(known[name] for name in names)), expression
    panels = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(panel["x"] + panel["w"] <= 24 for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(panels)
