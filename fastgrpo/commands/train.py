"""`fastgrpo train` and `fastgrpo.train`: a whole run from a config."""

from __future__ import annotations

from fastgrpo.config import Config
from fastgrpo.distributed.world import this_machine
from fastgrpo.planning.plan import resolved
from fastgrpo.training.result import TrainResult
from fastgrpo.training.trainer import Trainer


def train(config: Config) -> TrainResult:
    """Trains to train.iterations, from the checkpoint in run.dir where run.resume says so.

    `auto` settings that need a plan are resolved here, for the devices of this process.

    Args:
        config: As `fastgrpo.load_config` returns it.

    Returns:
        The run's directory, last metrics, best checkpoint and evaluations.

    Raises:
        UserError: For what the user can mend, before weights load where that is possible.
        PreemptedError: After SIGTERM or SIGUSR1, with a checkpoint.
        KeyboardInterrupt: After a first Ctrl-C, with a checkpoint.
    """
    return Trainer.from_config(resolved(config, *this_machine())).run()
