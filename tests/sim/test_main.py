"""The command line: what the user can put right is one clear line and exit code 2."""

from __future__ import annotations

from protos import policy_pb2
from sim.__main__ import main
from tests.sim.scripted_policy import ScriptedPolicy, served


class WantsAnotherCamera(ScriptedPolicy):
    def GetSpec(self, request, context):
        spec = super().GetSpec(request, context)
        spec.images.append(policy_pb2.ImageSpec(name="left_shoulder", height=32, width=32))
        return spec


def test_a_policy_that_does_not_fit_is_refused_before_anything_is_built(capsys):
    with served(WantsAnotherCamera()) as address:
        assert main(["evaluate", "--server", address, "--suite", "robosuite"]) == 2
    (line, *more) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "left_shoulder" in " ".join(more)


def test_an_unknown_task_is_refused_before_anything_is_built(capsys):
    with served(ScriptedPolicy()) as address:
        assert main(["evaluate", "--server", address, "--suite", "robosuite", "--tasks", "7"]) == 2
    assert "must be in 0..2, got [7]" in capsys.readouterr().err
