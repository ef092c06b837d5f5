"""The doctor: a planted fault of each kind is found, and what to do is said; a healthy setup passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_config
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos.channel import free_port
from rl_trainer import doctor as doctor_module
from rl_trainer.costs import KEPT_VERSIONS, decision_bytes
from rl_trainer.devices import Machine
from rl_trainer.doctor import (
    DoctorConfig,
    Finding,
    Patient,
    check_admin,
    check_assets,
    check_checkpoint,
    check_devices,
    check_disk,
    check_rendering,
    check_server,
    check_statistics,
    doctor,
)
from rl_trainer.plan import trained_shapes
from tests.server.running import RunningServer, serving

WEIGHTS = "model.safetensors"
CHECKED = ("devices", "rendering", "assets", "checkpoint", "statistics", "disk", "server", "admin")


def config_of(out: Path, model: Path, **changes) -> DoctorConfig:
    settings = {"out": out / "not" / "there" / "yet", "suite": "robosuite", "model": str(model), "iterations": 1}
    there = {"admin": "there:50052"} if "server" in changes else {}
    return DoctorConfig(**settings | there | changes)


def only(check: Callable, config: DoctorConfig) -> Finding:
    """The one thing that the check finds."""
    (finding,) = check(Patient(config))
    return finding


@pytest.fixture
def broken(tiny_vla: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_vla, tmp_path / "broken"))


def edit_statistics(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["norm_stats"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_a_healthy_setup_passes(tiny_vla: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=2)
    versions = VersionStore(None, first=model.fingerprint(model.first))
    with serving(model, episodes=tmp_path / "episodes", versions=versions, admin_port=0) as server:
        assert doctor(config_of(tmp_path, tiny_vla, server=server.address, admin=server.admin_address)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKED]


def test_one_failure_fails_the_whole(monkeypatch: pytest.MonkeyPatch, tiny_vla: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "CHECKS", (check_disk, check_statistics))
    assert doctor(config_of(tmp_path, tiny_vla)) == 0
    assert doctor(config_of(tmp_path, tiny_vla, free_gb=0.0)) == 1


def test_a_device_that_is_not_there_is_found_and_memory_for_no_scene(
    monkeypatch: pytest.MonkeyPatch, tiny_vla: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = only(check_devices, config_of(tmp_path, tiny_vla, device="cuda"))
    assert finding.verdict == "FAIL" and "'cuda' was asked for" in finding.text
    monkeypatch.setattr("rl_trainer.train.find_machine", lambda: Machine(memory_gb=0.5))
    for check in (check_devices, check_rendering):
        finding = only(check, config_of(tmp_path, tiny_vla))
        assert finding.verdict == "FAIL" and "a worker needs memory for one scene" in finding.text


def test_a_renderer_that_does_not_work_is_found(
    monkeypatch: pytest.MonkeyPatch, tiny_vla: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    finding = only(check_rendering, config_of(tmp_path, tiny_vla))
    assert finding.verdict == "FAIL"
    assert "nonsense" in finding.text and "set MUJOCO_GL to osmesa or egl or not at all" in finding.text
    assert only(check_rendering, config_of(tmp_path, tiny_vla, server="there:1")).verdict == "warn"  # workers elsewhere


def test_missing_assets_are_found(monkeypatch: pytest.MonkeyPatch, tiny_vla: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "nowhere"))
    finding = only(check_assets, config_of(tmp_path, tiny_vla, suite="libero_object"))
    assert finding.verdict == "FAIL"
    assert "LIBERO_ASSETS must name a folder" in finding.text and "install LIBERO" in finding.text


@pytest.mark.libero
def test_assets_of_which_only_the_folder_is_there_are_found(
    monkeypatch: pytest.MonkeyPatch, tiny_vla: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    finding = only(check_assets, config_of(tmp_path, tiny_vla, suite="libero_object"))
    assert finding.verdict == "FAIL" and "libero_object/0 cannot be built" in finding.text
    finding = only(check_assets, config_of(tmp_path, tiny_vla, suite="libero_object", server="there:1"))
    assert finding.verdict == "warn" and "needless where workers run elsewhere" in finding.text


def test_a_suite_that_cannot_be_built_here_is_found(tiny_vla: Path, tmp_path: Path) -> None:
    finding = only(check_assets, config_of(tmp_path, tiny_vla, suite="libero_moon"))
    assert finding.verdict == "FAIL" and "'libero_moon'" in finding.text and "robosuite" in finding.text


@pytest.mark.parametrize(("free", "verdict"), [(0.99, "FAIL"), (1.01, "warn"), (1.99, "warn"), (2.01, "ok")])
def test_a_disk_that_the_run_would_fill_is_found(free: float, verdict: str, tiny_vla: Path, tmp_path: Path) -> None:
    run, model = {"iterations": 20, "rollouts": 50, "evaluate_every": 0}, load_config(tiny_vla)
    shapes = trained_shapes(config_of(tmp_path, tiny_vla), model, prompt_tokens=1)
    # Chunks of 2 actions; robosuite's episodes last 300 ticks at most: 150 decisions and a last look.
    stored = 1000 * 151 * decision_bytes(model) + KEPT_VERSIONS * shapes.published_bytes
    # A state, twice while it is replaced, has masters, two moments and an average; beside it lie the last and the best.
    saved = 2 * (12 + 4) * (shapes.trained + shapes.critic_trained) + 2 * shapes.weights_bytes
    need_gb = (stored + saved) / 2**30
    finding = only(check_disk, config_of(tmp_path, tiny_vla, **run, free_gb=free * need_gb))
    assert finding.verdict == verdict
    assert ("make room" in finding.text) == (verdict != "ok")


def test_what_a_server_keeps_needs_no_room_here(tiny_vla: Path, tmp_path: Path) -> None:
    settings = {"iterations": 10**6, "free_gb": 1.0}
    assert only(check_disk, config_of(tmp_path, tiny_vla, **settings)).verdict == "FAIL"
    elsewhere = config_of(tmp_path, tiny_vla, **settings, server="there:1")
    assert only(check_disk, elsewhere).verdict == "ok"


def test_tasks_that_a_suite_has_not_are_found(tiny_vla: Path, tmp_path: Path) -> None:
    finding = only(check_assets, config_of(tmp_path, tiny_vla, tasks=(99,)))
    assert finding.verdict == "FAIL" and "tasks must be in" in finding.text


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda tensors: tensors.pop("projector.fc1.weight"), "projector.fc1.weight is missing"),
        (lambda tensors: tensors.update(more=tensors["projector.fc1.bias"].clone()), "unknown tensor more"),
        (
            lambda tensors: tensors["projector.fc1.bias"].fill_(float("nan")),
            "1 tensors are broken, the first: projector.fc1.bias must be finite",
        ),
    ],
)
def test_a_broken_checkpoint_is_found(edit: Callable, told: str, broken: Path, tmp_path: Path) -> None:
    edit_weights(broken, edit)
    finding = only(check_checkpoint, config_of(tmp_path, broken))
    assert finding.verdict == "FAIL" and told in finding.text and "again" in finding.text


@pytest.mark.parametrize("cut", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_file_cut_short_is_found(cut: str, broken: Path, tmp_path: Path) -> None:
    (broken / cut).write_bytes((broken / cut).read_bytes()[:100])
    assert only(check_checkpoint, config_of(tmp_path, broken)).verdict == "FAIL"
    assert (only(check_disk, config_of(tmp_path, broken)).verdict == "warn") == (cut == "config.json")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda s: s["tiny"]["action"]["q99"].__setitem__(2, -2.0), "action[2] must have q01 below q99, got -1 and -2"),
        (lambda s: s["tiny"]["action"]["q99"].__setitem__(0, float("nan")), "action[0] must have q01 below q99"),
        (lambda s: s["tiny"]["action"]["q01"].__setitem__(0, -float("inf")), "action[0] must have q01 below q99"),
        (
            lambda s: s["tiny"]["action"].update(q99=[-1.0] + [1.0] * 6, min=[-1.0] * 7, max=[1.0] * 7),
            "action[0] must have q01 below q99, got -1 and -1, though it moves",
        ),
        (lambda s: s["tiny"]["proprio"].update(q01=[-1.0] * 6, q99=[1.0] * 6), "proprio must have 8 numbers"),
        (lambda s: s["tiny"].pop("proprio"), "['proprio'] must hold q01 and q99"),
        (lambda s: s["tiny"]["action"].pop("q99"), "['action'] must hold q01 and q99"),
        (lambda s: s["tiny"].pop("action"), "['action'] must hold q01 and q99"),
        (lambda s: s.update(other=s["tiny"]), "of several data sets, name one of ['tiny', 'other']"),
    ],
)
def test_wrong_statistics_are_found(edit: Callable, told: str, broken: Path, tmp_path: Path) -> None:
    edit_statistics(broken, edit)
    finding = only(check_statistics, config_of(tmp_path, broken))
    assert finding.verdict == "FAIL" and told in finding.text


def test_statistics_that_are_not_there_are_found(tiny_vla: Path, tmp_path: Path) -> None:
    finding = only(check_statistics, config_of(tmp_path, tiny_vla, unnorm_key="libero_moon"))
    assert finding.verdict == "FAIL" and "one of ['tiny'], got 'libero_moon'" in finding.text


@pytest.mark.parametrize(
    "edit",
    [
        lambda action: action.update(q01=[0.0] * 7, q99=[0.0, *[1.0] * 6], min=[0.0] * 7, max=[0.0, *[1.0] * 6]),
        lambda action: action["q99"].__setitem__(6, -2.0),
    ],
)
def test_a_number_that_never_moves_or_is_not_normalised_needs_no_extent(
    edit: Callable, broken: Path, tmp_path: Path
) -> None:
    edit_statistics(broken, lambda statistics: edit(statistics["tiny"]["action"]))
    assert only(check_statistics, config_of(tmp_path, broken)).verdict == "ok"


def test_a_server_that_is_not_there_is_found(tiny_vla: Path, tmp_path: Path) -> None:
    finding = only(check_server, config_of(tmp_path, tiny_vla, server=f"127.0.0.1:{free_port()}"))
    assert finding.verdict == "FAIL" and "python -m policy_server serve" in finding.text
    assert "HOST:PORT" in only(check_server, config_of(tmp_path, tiny_vla, server="host:0")).text


def test_a_server_that_takes_no_new_weights_is_found(
    live_server: RunningServer, tiny_vla: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_vla, server=live_server.address, admin=f"127.0.0.1:{free_port()}")
    finding = only(check_admin, config)
    assert finding.verdict == "FAIL" and "--admin-port PORT" in finding.text


def test_a_server_of_another_base_that_keeps_nothing_is_found(
    live_server: RunningServer, broken: Path, tmp_path: Path
) -> None:
    edit_weights(broken, lambda tensors: tensors["projector.fc1.bias"].add_(1.0))
    findings = list(check_server(Patient(config_of(tmp_path, broken, server=live_server.address))))
    assert [finding.verdict for finding in findings] == ["FAIL", "FAIL"]
    assert "keeps no episodes" in findings[0].text and "serves another base" in findings[1].text
