"""`python -m sim evaluate | worker | demo | demos | suites | timing`: measure a policy, run queued work, watch it,
record demonstrations, list tasks, time scenes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from robot_client.errors import RobotError
from sim import catalogue, demo, demos, evaluate, leasing, timing
from sim.assets import SimulatorUnavailable
from sim.pool import PoolError

COMMANDS: dict[type, Callable[..., int | None]] = {
    evaluate.EvaluateConfig: evaluate.main,
    leasing.LeasingConfig: leasing.main,
    demo.DemoConfig: demo.main,
    demos.DemosConfig: demos.record_demos,
    catalogue.CatalogueConfig: catalogue.main,
    timing.TimingConfig: timing.main,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the command; 2 for what the user can put right."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    config = tyro.cli(
        Annotated[evaluate.EvaluateConfig, tyro.conf.subcommand("evaluate")]
        | Annotated[leasing.LeasingConfig, tyro.conf.subcommand("worker")]
        | Annotated[demo.DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[demos.DemosConfig, tyro.conf.subcommand("demos")]
        | Annotated[catalogue.CatalogueConfig, tyro.conf.subcommand("suites")]
        | Annotated[timing.TimingConfig, tyro.conf.subcommand("timing")],
        args=arguments,
        prog="python -m sim",
        description=__doc__,
    )
    logging.info("%s", config)
    try:
        return COMMANDS[type(config)](config) or 0
    except (RobotError, SimulatorUnavailable, PoolError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
