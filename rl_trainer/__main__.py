"""`python -m rl_trainer sft`: behaviour cloning from demonstrations."""

from __future__ import annotations

import sys

import tyro

from policy_server.vla.checkpoint import CheckpointError
from rl_trainer.sft import SftConfig, sft

COMMANDS = {SftConfig: sft}


def main() -> int:
    """Parses the command line and runs the command; 2 for what the user can put right."""
    config = tyro.extras.subcommand_cli_from_dict({"sft": SftConfig}, prog="python -m rl_trainer", description=__doc__)
    print(config, flush=True)
    try:
        COMMANDS[type(config)](config)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
