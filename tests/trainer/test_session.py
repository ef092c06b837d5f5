"""A session's trainer, whole but for the arm: the real server and gate, a tiny policy, a worker without a simulator."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from policy_server.gate import GateRule
from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.lora import lora_tensors
from policy_server.vla.model import collate
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos import episode_pb2, rollout_pb2, session_pb2
from protos.episode_file import Episode, read_episode
from rl_trainer import session, session_client
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.loss import LossConfig, token_logprobs
from rl_trainer.run_state import load_state
from rl_trainer.session import STATE, VERDICTS, SessionRun, claim, train_session
from rl_trainer.session_client import SessionClient
from rl_trainer.session_commands import Export, List, Rollback, Show
from rl_trainer.session_config import At, GateConfig, SessionConfig
from rl_trainer.shaping import ShapingConfig
from rl_trainer.trajectories import TrajectoryReader
from tests.server.running import RunningServer, serving
from tests.trainer.fake_worker import Succeeds, by_seed, working


@contextmanager
def lab(model: Path, folder: Path, succeeds: Succeeds = by_seed) -> Iterator[RunningServer]:
    policy = VlaModel(Policy.load(model), name="tiny", max_batch=8)
    store = VersionStore(folder / "versions", first=policy.fingerprint(policy.first))
    with (
        serving(policy, max_batch=8, queue=64, versions=store, admin_port=0, episodes=folder / "episodes") as server,
        working(server, succeeds),
    ):
        yield server


def config_of(folder: Path, model: Path, server: RunningServer, **changes) -> SessionConfig:
    settings = {
        "at": At(server=server.address, admin=server.admin_address),
        "model": str(model),
        "suite": "robosuite",
        "tasks": (0,),
        "ahead": 4,
        "update_every": 6,
        "offer_every": 1,
        "budget_episodes": 60,
        "lora_rank": 2,
        "gate": GateConfig(max_episodes=16, envelope=0.99),
        "learner": LearnerConfig(
            warm_up=0,
            learning_rate=1e-3,
            minibatch=8,
            target_kl=0.0,
            success_weight=0.5,
            loss=LossConfig(reference_weight=0.1),
        ),
    }
    return SessionConfig(out=folder / "lab", **settings | changes)


def until_promoted(run: SessionRun) -> None:
    """Version 1 is live."""
    while run.state.live != 1:
        assert run.step()


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "lab" / "log.json").read_text())


def episodes_of(folder: Path) -> list[Episode]:
    return [read_episode(path) for path in sorted((folder / "episodes").glob("*.episode"))]


def adapter(folder: Path, version: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "lab" / "versions" / str(version) / "adapter_model.safetensors")


def test_a_version_that_does_better_is_promoted_and_the_next_is_made_of_it(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        train_session(config_of(tmp_path, tiny_vla, server))
    verdicts = [(event["what"], event["version"]) for event in log_of(tmp_path)]
    assert verdicts[:2] == [("offer", 1), ("promote", 1)] and ("offer", 2) in verdicts
    played = Counter(episode.start.version for episode in episodes_of(tmp_path))
    assert played[0] and played[1] and {episode.start.session_id for episode in episodes_of(tmp_path)} == {"lab"}
    report = (tmp_path / "lab" / "report" / "index.html").read_text()
    assert "the candidate does not succeed less often" in report and "data:image/webp" in report


def test_plain_peft_reads_the_exported_adapter_and_answers_as_the_server_did(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        config = config_of(tmp_path, tiny_vla, server)
        with closing(SessionRun(config)) as run:
            until_promoted(run)
            list(Export(at=config.at, session="lab", out=config.out, to=tmp_path / "to").lines(run.client))
    base = load_checkpoint(tiny_vla)
    theirs = peft.PeftModel.from_pretrained(base.model, str(tmp_path / "to")).eval()
    answered = TrajectoryReader(base.config, base.tokenizer)
    [one] = answered.read(next(episode for episode in episodes_of(tmp_path) if episode.start.version == 1))
    ids_TN, mask_TN = torch.from_numpy(one.token_ids_TN), torch.from_numpy(one.mask_TN)
    with torch.no_grad():
        logits_TNV = theirs(collate(one.observations), ids_TN).logits_BNV
    temperature_T = torch.from_numpy(one.temperature_T)
    got_TN = token_logprobs(logits_TNV, ids_TN - base.config.action_begin, temperature_T, mask_TN)
    recorded_TN = torch.from_numpy(one.logprobs_TN)
    assert (got_TN - recorded_TN)[mask_TN].abs().max() < 1e-4


def test_a_version_that_does_worse_is_rolled_back_and_the_learner_with_it(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version == 0) as server:
        config = config_of(tmp_path, tiny_vla, server, update_every=30, gate=GateConfig(envelope=0.99))
        with closing(SessionRun(config)) as run:
            while not rolled_back(run):
                assert run.step()
            assert server.server.live_version == run.state.live == run.state.version == 0
            now = {name: tensor.detach() for name, tensor in lora_tensors(run.checkpoint.model).items()}
    assert adapter_equal(now, adapter(tmp_path, 0)) and not adapter_equal(now, adapter(tmp_path, 1))


def rolled_back(run: SessionRun) -> bool:
    return run.state.candidate is None and any(event.what == "roll back" for event in run.client.get("lab").log)


def adapter_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_candidate_outside_the_envelope_is_seen_by_no_robot(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path) as server:
        gate = GateConfig(envelope=1e-6)
        train_session(config_of(tmp_path, tiny_vla, server, gate=gate, budget_episodes=20))
    assert {event["what"] for event in log_of(tmp_path)} == {"refuse"}
    assert {episode.start.version for episode in episodes_of(tmp_path)} == {0}


def test_workers_go_on_until_what_is_on_trial_has_its_verdict(tiny_vla: Path, tmp_path: Path) -> None:
    """The budget is spent in the middle of a trial; there is no update more, and no other candidate."""
    with lab(tiny_vla, tmp_path) as server:
        config = config_of(tmp_path, tiny_vla, server, budget_episodes=8)
        train_session(config)
        [offered] = [event for event in log_of(tmp_path) if event["what"] == "offer"]
    verdicts = [event for event in log_of(tmp_path) if event["what"] in VERDICTS]
    assert [event["version"] for event in verdicts] == [offered["version"]]
    assert len((config.out / "curve.jsonl").read_text().splitlines()) == 1


def test_a_verdict_that_nobody_works_for_is_not_waited_for(
    tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "VERDICT_S", 0.0)
    with lab(tiny_vla, tmp_path) as server:
        train_session(config_of(tmp_path, tiny_vla, server, budget_episodes=8))
    assert [event["what"] for event in log_of(tmp_path)] == ["offer"]


def test_the_server_keeps_what_an_update_may_still_use(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path) as server, closing(SessionRun(config_of(tmp_path, tiny_vla, server))) as run:
        while not run.state.counts["updates"]:
            run.step()
        cursor = json.loads((tmp_path / "episodes" / "cursors.json").read_text())["lab"]
        assert run.state.first < cursor == min([run.state.cursor + 1, *map(int, run.state.pool)]) - 1


def test_a_session_goes_on_where_its_trainer_was_killed(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        config = config_of(tmp_path, tiny_vla, server, budget_episodes=30)
        killed = SessionRun(config)
        killed._offer = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # published, and not offered yet
        with closing(killed), pytest.raises(KeyboardInterrupt):
            killed.go()
        assert killed.state.candidate == 1
        with pytest.raises(ValueError, match="add --resume"):
            train_session(config)
        train_session(replace(config, resume=True))
        with closing(SessionClient(config.at.run_server)) as client:
            episodes = list(client.all_episodes("lab", 0))
    fields, _ = load_state(config.out / STATE)
    assert next(event["version"] for event in log_of(tmp_path) if event["what"] == "offer") == 1
    taken = [number for number, _ in episodes if number <= fields["cursor"]]
    assert fields["counts"]["episodes"] == len(taken) >= 30
    assert len({episode.start.rollout_id for episode in episodes_of(tmp_path)}) == len(episodes_of(tmp_path))


def test_a_session_that_has_learned_is_not_begun_again_from_another_folder(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        config = config_of(tmp_path, tiny_vla, server)
        with closing(SessionRun(config)) as run:
            until_promoted(run)
        cursors = (tmp_path / "episodes" / "cursors.json").read_text()
        with pytest.raises(ValueError, match="'lab' has a history already, of which this folder knows nothing"):
            SessionRun(replace(config, out=tmp_path / "other", session="lab"))
        assert (tmp_path / "episodes" / "cursors.json").read_text() == cursors, "its own trainer may have yet to read"


def test_episodes_are_read_a_few_at_a_time(tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_client, "AT_ONCE", 4)
    with lab(tiny_vla, tmp_path) as server:
        config = config_of(tmp_path, tiny_vla, server, budget_episodes=10)
        train_session(config)
        with closing(SessionClient(config.at.run_server)) as client:
            newest, some = client.episodes("lab", 0)
            numbers = [number for number, _ in client.all_episodes("lab", 0)]
            assert [number for number, _ in some] == numbers[:4] and newest == numbers[3]
            assert len(numbers) == len(episodes_of(tmp_path)) >= 10 and client.newest("lab") == numbers[-1]


def test_an_offer_that_is_refused_for_good_is_given_up(tiny_vla: Path, tmp_path: Path, capsys) -> None:
    with (
        lab(tiny_vla, tmp_path) as server,
        closing(SessionRun(config_of(tmp_path, tiny_vla, server))) as run,
    ):
        while not run._due:
            run._ask_for_practice()
            run._take_in()
            if run._new >= run.config.update_every:
                run.improve()
        run._keep_weights = lambda version: setattr(run.state, "fingerprint", "0" * 64)  # not what was published
        run._put_forward()
        assert "version 1 is not offered" in (said := capsys.readouterr().out) and "device_fingerprint" in said
        del run._keep_weights
        while not run.client.get("lab").log:
            assert run.step()
        assert [event.version for event in run.client.get("lab").log] == [2]


def test_a_success_with_help_is_none_of_the_policys_for_the_trainer_too(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: True) as server:
        config = config_of(tmp_path, tiny_vla, server, budget_episodes=8, update_every=100)
        with closing(SessionRun(config)) as run:
            read = run.client.episodes
            run.client.episodes = lambda *what: helped_out(*read(*what))
            run.go()
            assert run.state.counts["episodes"] >= 8 and not run.state.counts["successes"]


def helped_out(newest: int, found: list[tuple[int, Episode]]) -> tuple[int, list[tuple[int, Episode]]]:
    for _, episode in found:
        episode.ticks[-1].source = episode_pb2.SOURCE_HUMAN
    return newest, found


def test_a_candidate_is_so_many_updates_ahead(tiny_vla: Path, tmp_path: Path) -> None:
    with (
        lab(tiny_vla, tmp_path, lambda start: False) as server,
        closing(SessionRun(config_of(tmp_path, tiny_vla, server, offer_every=2))) as run,
    ):
        while run.state.candidate is None:
            assert run.step()
        assert run.state.counts["updates"] == 2


def test_a_person_may_go_back_and_the_trainer_goes_too(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        config = config_of(tmp_path, tiny_vla, server)
        with closing(SessionRun(config)) as run:
            until_promoted(run)
            run.client.control("lab", session_pb2.CONTROL_PAUSE)
            run.step()
            run.client.control("lab", session_pb2.CONTROL_ROLL_BACK, "it scratched the table")
            run.step()
            assert run.state.version == run.state.live == 0
            lines = list(Show(at=config.at, session="lab").lines(run.client))
            assert any("revert, version 0, by person: it scratched the table" in line for line in lines)
            assert "paused, version 0 live" in next(iter(List(at=config.at).lines(run.client)))
            out = tmp_path / "exported"
            list(Export(at=config.at, session="lab", out=config.out, to=out).lines(run.client))
            assert adapter_equal(load_file(out / "adapter_model.safetensors"), adapter(tmp_path, 0))
            with pytest.raises(ValueError, match="nothing to go back to"):
                list(Rollback(at=config.at, session="lab").lines(run.client))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"update_every": 0}, "update_every must be >= 1, got 0"),
        ({"offer_every": 0}, "offer_every must be >= 1, got 0"),
        ({"reward": "both"}, "reward_model is for"),
        (
            {"reward": "both", "reward_model": Path("r"), "shaping": ShapingConfig(rule="none")},
            "shaping.rule must be potential or paper for the reward 'both', got 'none'",
        ),
        ({"base_version": 3}, "adapter and base_version are given together"),
        ({"learner": LearnerConfig(average=0.9)}, "average must be 0"),
        ({"learner": LearnerConfig(anneal=64)}, "anneal must be 0 in a session, .* got 64"),
        ({"shaping": ShapingConfig(weight=0.5)}, "there is no reward_model"),
        ({"adapter": Path("a"), "base_version": 1, "lora_rank": 4}, "lora_rank and lora_alpha are of a fresh adapter"),
    ],
)
def test_a_session_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SessionConfig(out=tmp_path, **changes)


def test_a_session_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    config = SessionConfig(out=tmp_path)
    claim(config)
    (tmp_path / STATE).touch()
    with pytest.raises(ValueError, match="add --resume"):
        claim(config)
    claim(replace(config, resume=True, budget_episodes=10))
    with pytest.raises(ValueError, match="reuse was 1, got 5"):
        claim(replace(config, resume=True, reuse=5))


def test_a_session_keeps_its_id_where_its_folder_is_moved(tmp_path: Path) -> None:
    begun = claim(SessionConfig(out=tmp_path / "bowl"))
    (tmp_path / "bowl" / STATE).touch()
    (tmp_path / "bowl").rename(tmp_path / "cup")
    moved = SessionConfig(out=tmp_path / "cup", resume=True)
    assert claim(moved).session == claim(replace(moved, session="bowl")).session == begun.session == "bowl"
    with pytest.raises(ValueError, match="session was 'bowl', got 'plate'"):
        claim(replace(moved, session="plate"))


def test_a_session_may_begin_with_an_adapter_and_trains_that_alone(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: start.version > 0) as server:
        config = config_of(tmp_path, tiny_vla, server)
        with closing(SessionRun(config)) as run:
            until_promoted(run)
        begun = {"adapter": config.out / "versions" / "1", "base_version": 1, "lora_rank": SessionConfig.lora_rank}
        with closing(SessionRun(replace(config, out=tmp_path / "next", **begun))) as run:
            assert run.learner.policy_optimizer.masters_P.numel() == sum(
                matrix.numel() for matrix in lora_tensors(run.checkpoint.model).values()
            )
            while not run.client.get("next").log:
                assert run.step()
            [offered] = run.client.get("next").log
    assert offered.what == "offer"  # published with proof: the server's base is the learner's


def test_episodes_that_others_drove_from_end_to_end_are_learned_from_too(tiny_vla: Path, tmp_path: Path) -> None:
    with lab(tiny_vla, tmp_path, lambda start: True) as server:
        config = config_of(tmp_path, tiny_vla, server)
        taught = replace(config, learner=replace(config.learner, intervention_weight=1.0))
        with closing(SessionRun(taught)) as run:
            read = run.client.episodes
            run.client.episodes = lambda *what: driven(*read(*what))
            while run.state.candidate is None:
                assert run.step()
            assert run.lessons and not any(run._trajectories.values())
            assert "intervention_nll" in run.curve.rows[-1] and "policy_loss" not in run.curve.rows[-1]


def driven(newest: int, found: list[tuple[int, Episode]]) -> tuple[int, list[tuple[int, Episode]]]:
    """By a person, who moved a little at each tick."""
    for _, episode in found:
        for tick in episode.ticks:
            tick.source = episode_pb2.SOURCE_HUMAN
            tick.action[0] = 0.5
    return newest, found


def test_practice_that_fails_whenever_it_is_tried_is_spoken_of(tiny_vla: Path, tmp_path: Path, capsys) -> None:
    with lab(tiny_vla, tmp_path) as server, closing(SessionRun(config_of(tmp_path, tiny_vla, server))) as run:
        broken = rollout_pb2.SetAside(errors=["the scene cannot be built", "the scene cannot be built"])
        run.client.rollouts.status = lambda run: rollout_pb2.QueueStatus(waiting=4, set_aside=[broken, broken])
        run._ask_for_practice()
        run._ask_for_practice()
    assert capsys.readouterr().out.count("the scene cannot be built") == 1


def test_the_servers_own_choices_of_the_gate_are_told_in_its_help() -> None:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(GateConfig))).body
    assert isinstance(body, ast.ClassDef)
    told = {}
    for field, help_text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(help_text, ast.Expr):
            told[ast.unparse(field.target)] = float(
                ast.literal_eval(help_text.value).rpartition("(")[2].removesuffix(")")
            )
    assert told == asdict(GateRule())
