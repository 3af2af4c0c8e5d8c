"""A trainer for a run directory: everything validated, the directory claimed, weights loaded, the log opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastgrpo.algorithms.objectives import forward_objective
from fastgrpo.checkpoints.resume import Claim, claim_directory
from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config import Config
from fastgrpo.config.checks import check_is_config
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.data.samplers import prompts_to_come
from fastgrpo.distributed.adamw_8bit import check_optimizer
from fastgrpo.distributed.signals import StopRequest, stop_request
from fastgrpo.distributed.world import World, launched, start_world
from fastgrpo.errors import ConfigError
from fastgrpo.evaluation.heldout import heldout_prompts
from fastgrpo.models import ModelFamily, check_family
from fastgrpo.observe.run_log import RunLog
from fastgrpo.observe.watch import warned_after
from fastgrpo.preflight.remarks import check_pictures, remarks
from fastgrpo.rewards import load_rewards
from fastgrpo.rewards.custom import new_instance
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.callbacks.finite import FiniteCallback
from fastgrpo.training.callbacks.guard import GuardCallback
from fastgrpo.training.callbacks.profiling import ProfilingCallback
from fastgrpo.training.callbacks.progress import ProgressCallback
from fastgrpo.training.callbacks.stalls import StallCallback
from fastgrpo.training.state import restore

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer

TrainerType = TypeVar("TrainerType", bound="Trainer")


def open_trainer(kind: type[TrainerType], config: Config, load: Callable[..., ModelFamily]) -> TrainerType:
    """Returns the trainer of a run, where its checkpoint left off if run.resume finds one; see Trainer.from_config."""
    check_resolved(config)
    prompts = load_prompts(config.prompts.train)
    heldout = heldout_prompts(config, config.eval.images) if config.eval.every else []
    rank, ranks = launched()[:2]
    for source, of in ((config.prompts.train, prompts), (config.prompts.heldout or "", heldout)):
        check_pictures(source, of, share=slice(rank, None, ranks))
    rewards = load_rewards(config)
    users = distinct([load_callback(name) for name in config.callbacks])
    check_family(config)
    forward_objective(config)
    check_optimizer(config.update.optimizer)
    stop = stop_request()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    with warned_after(config.telemetry.stall_seconds, f"rank {rank} of {ranks} waits for others to start, at {place}"):
        world = start_world(config)
    leave_if_asked(stop, world, config)
    # Whatever a reward or a callback makes the working directory.
    directory = Path(config.run.dir).absolute()
    store = CheckpointStore.of_run(directory, world.main)
    claim = claim_directory(config, prompts, store, world)
    with ExitStack() as on_failure:
        on_failure.callback(claim.release)
        family = load(config.model, world.device, config.parallel.load == "sharded")
        if config.model.text_encoders == "drop":
            come = prompts_to_come(config, prompts) + list(dict.fromkeys(heldout))
            family.encode_ahead(come[world.rank :: world.size])
            world.barrier()
        sources = {config.prompts.train: prompts, config.prompts.heldout or "": heldout}
        said = remarks(config, type(family), sources) if world.main else []
        callbacks = run_callbacks(config, world, heldout, store, claim, users, said)
        log = RunLog(directory, config, world.main)
        trainer = kind(config, family, world, prompts=prompts, rewards=rewards, log=log, callbacks=callbacks, stop=stop)
        if claim.start is not None:
            restore(trainer, store, claim.start)
        leave_if_asked(stop, world, config)
        on_failure.pop_all()
    return trainer


def leave_if_asked(stop: StopRequest, world: World, config: Config) -> None:
    """Before the first iteration there is nothing to save."""
    stop.agree(world)
    stop.leave(f"{config.run.dir}: stopped before its first iteration, to be requeued")


def check_resolved(config: Config) -> None:
    """Raises ConfigError for what is no config, and for an `auto` setting that only a plan can resolve."""
    check_is_config(config)
    if config.model.activation_checkpointing == "auto":
        raise ConfigError(
            "model.activation_checkpointing: auto needs a plan, which fastgrpo.train and `fastgrpo train` make; give "
            "Trainer.from_config one of none, selective, all or a number (fastgrpo.planning.plan.resolved finds it)"
        )


def run_callbacks(
    config: Config, world: World, heldout: Sequence[Prompt], store: CheckpointStore, claim: Claim,
    users: Sequence[Callback], said: Sequence[str] = (),
) -> list[Callback]:  # fmt: skip
    """Returns the callbacks of a run, in their order: a user's come after the evaluation and before the checkpoint.

    said: what the run has to say when it starts.
    """
    evaluation = EvaluationCallback(heldout)
    return [
        ProfilingCallback(store.directory.parent / "profile", config.telemetry.profile),
        ProgressCallback(config.telemetry.progress and world.main, said),
        StallCallback(store.directory.parent, config.telemetry.stall_seconds),
        GuardCallback(config),
        evaluation,
        *users,
        FiniteCallback(config.train.max_skipped_steps),
        CheckpointCallback(store, evaluation, claim),
    ]


def load_callback(name: str) -> Callback:
    """Returns a new callback of the class that `module:Class` or `file.py:Class` names. Raises ConfigError."""
    made = new_instance(name, "callbacks", Callback)
    kind = type(made)
    if ".py:" in name and kind.name == f"{kind.__module__}:{kind.__qualname__}":
        # By which a checkpoint finds its state, wherever the file lies.
        kind.name = name.rpartition("/")[2]
    return made


def distinct(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Returns a user's callbacks. Raises ConfigError where a checkpoint would keep two states under one name."""
    # Those of fastgrpo, which are imported above.
    taken = [kind.name for kind in Callback.__subclasses__() if kind.__module__.startswith(Callback.__module__)]
    for callback in callbacks:
        if callback.name in taken:
            raise ConfigError(
                f"callbacks: {type(callback).__qualname__} is not the only one whose name is '{callback.name}', under "
                "which a checkpoint keeps its state; list it once, or give its class another `name`"
            )
        taken.append(callback.name)
    return callbacks
