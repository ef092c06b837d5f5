"""Requests at random against a live server, with a well-behaved neighbour (benchmarks/fuzz.py fires ten thousand)."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, given, settings

from policy_server.version_store import VersionStore
from tests.server.fake_admin import FakeWeights, administered
from tests.server.fuzzing import Neighbour, Range, shots
from tests.server.running import eventually

SHOTS = 400


def test_every_request_is_answered_or_rightly_refused_and_no_neighbour_notices(tmp_path, caplog):
    model = FakeWeights()
    versions = VersionStore(tmp_path / "versions", first=model.fingerprint(model.first), keep=4)
    with administered(model, versions=versions, episodes=tmp_path / "episodes") as (server, _):
        with Neighbour(server.address) as neighbour:
            target = Range(server.address, server.admin_address)

            @settings(
                max_examples=SHOTS,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )
            @given(shots(target.spec))
            def fire(shot) -> None:
                wrong = target.fire(shot)
                assert not wrong, f"{shot}: {wrong}\n{shot.requests}"

            gc.freeze()  # Hypothesis collects before each shot, and what earlier tests have left here takes a second
            try:
                fire()
            finally:
                gc.unfreeze()
            assert target.alive()
            eventually(lambda: server.server.waiting == 0)  # a client that hung up may not have been noticed yet
        target.close()
    assert neighbour.answers > 0 and not neighbour.disturbed
    assert set(target.fired) == {"valid", "spoiled", "mutated", "arbitrary", "corrupted", "noise"}
    assert "Traceback" not in caplog.text
