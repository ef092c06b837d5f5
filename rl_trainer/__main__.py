"""`python -m rl_trainer train | session | sft | reward-model | plan | doctor`: improve a policy online, or on the
robots in front of you; clone behaviour, learn a reward, predict what a run takes, find what would stop it.
"""

from __future__ import annotations

import sys

import tyro
from safetensors import SafetensorError

from policy_server.vla.checkpoint import CheckpointError
from rl_trainer.doctor import DoctorConfig, doctor
from rl_trainer.launch import ChildFailed
from rl_trainer.patience import ServerGone
from rl_trainer.plan import PlanConfig, plan
from rl_trainer.publisher import PublishMismatch
from rl_trainer.reward_model import RewardModelConfig, train_reward_model
from rl_trainer.session_commands import SessionCommand, session
from rl_trainer.sft import SftConfig, sft
from rl_trainer.train import NothingDone, train
from rl_trainer.train_config import TrainConfig

COMMANDS = {
    TrainConfig: train,
    SessionCommand: session,
    SftConfig: sft,
    RewardModelConfig: train_reward_model,
    PlanConfig: plan,
    DoctorConfig: doctor,
}
FAILURES = (NothingDone, PublishMismatch, ServerGone, ChildFailed, OSError, SafetensorError)
"""The last two: a full disk."""
FAILED = 1
"""A run that was going and cannot go on."""


def main() -> int:
    """Parses the command line and runs the command; 2 for what the user can put right."""
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "train": TrainConfig,
            "session": SessionCommand,
            "sft": SftConfig,
            "reward-model": RewardModelConfig,
            "plan": PlanConfig,
            "doctor": DoctorConfig,
        },
        prog="python -m rl_trainer",
        description=__doc__,
    )
    print(config, flush=True)
    try:
        return COMMANDS[type(config)](config) or 0
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from what train, sft or session start had saved by then", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
