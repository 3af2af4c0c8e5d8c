"""`fastgrpo train` and `fastgrpo.train`: a whole run from a config."""

from __future__ import annotations

from fastgrpo.config import Config
from fastgrpo.config.checks import check_is_config
from fastgrpo.distributed.world import this_machine
from fastgrpo.planning.advice import explained, is_out_of_memory
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
        UserError: For what the user can mend, before weights load where that is possible; for memory that ran out, with
            the phase, the peak and the nearest settings that fit by a plan.
        PreemptedError: After SIGTERM or SIGUSR1, with a checkpoint.
        KeyboardInterrupt: After a first Ctrl-C, with a checkpoint.
    """
    check_is_config(config)
    config, trainer = resolved(config, *this_machine()), None
    try:
        trainer = Trainer.from_config(config)
        return trainer.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Without the traceback's frames, which hold tensors, and what is held in reserve.
        lost = explained(error.with_traceback(None), config, 0 if trainer is None else trainer.timer.peak)
    raise lost
