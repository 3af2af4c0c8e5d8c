"""What outlives an iteration, in one place: a trainer to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastgrpo.checkpoints.store import CheckpointStore, plain_states
from fastgrpo.training.optimizer import OptimizerState

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


def save(trainer: Trainer, store: CheckpointStore, best: int | None, identity: Mapping[str, Any]) -> None:
    """Writes a checkpoint of everything that training changes.

    Args:
        trainer: Between two iterations.
        store: Where the checkpoint goes; in the background with checkpoint.background.
        best: The iteration of the best evaluation, whose checkpoint stays beside the latest ones.
        identity: What the checkpoint says of its run (fastgrpo/checkpoints/resume.py).

    Raises:
        UserError: If the checkpoint before this one could not be written (disk full, no permission).
    """
    rollouts, flying = trainer.rollouts.state(trainer.stop.wished(trainer.halted))
    state = {
        **identity,
        "iteration": trainer.iteration,
        "optimizer_steps": trainer.optimizer.steps,
        "learning_rate": trainer.optimizer.rate.state(),
        "train_seconds": trainer.train_seconds,
        "best_iteration": best,
        "rollouts": rollouts,
        "callbacks": plain_states({callback.name: callback.state() for callback in trainer.callbacks}),
    }
    settings = trainer.config.checkpoint
    extra = {f"in_flight_{trainer.world.rank}": flying} if flying else {}
    state["replay"], replayed = trainer.replay.state(trainer.world.ranks)
    if replayed:
        extra[f"replay_{trainer.world.process}"] = replayed
    store.save(
        trainer.iteration, training_tensors(trainer.optimizer), state, settings.keep, best, settings.background, extra
    )


def restore(trainer: Trainer, store: CheckpointStore, iteration: int) -> None:
    """Puts a trainer where the checkpoint of `iteration` left off, to the bit.

    Raises:
        UserError: If the checkpoint is of another model, or holds samples in flight of other ranks.
    """
    state = store.state(iteration, verified=True)
    with torch.no_grad():
        store.load(iteration, training_tensors(trainer.optimizer))
    trainer.iteration, trainer.optimizer.steps = state["iteration"], state["optimizer_steps"]
    trainer.train_seconds = state["train_seconds"]
    # Checkpoints from before a rate could be found have none.
    if "learning_rate" in state:
        trainer.optimizer.rate.restore(state["learning_rate"])
    if flying := trainer.rollouts.restore(state["rollouts"]):
        store.load(iteration, {f"in_flight_{trainer.world.rank}": flying})
    # Checkpoints from before there was a replay have none.
    replayed = trainer.replay.restore(state.get("replay", {"rollouts": []}), trainer.rollouts, trainer.world.ranks)
    if replayed:
        store.load(iteration, {f"replay_{trainer.world.process}": replayed})
    for callback in trainer.callbacks:
        if callback.name in state["callbacks"]:
            callback.restore(state["callbacks"][callback.name])


def training_tensors(optimizer: OptimizerState) -> dict[str, Any]:
    """Every tensor that training changes, by parameter name: weights, AdamW's state, EMA, old policy. DTensors stay
    sharded."""
    named = list(zip(optimizer.names, optimizer.parameters, strict=True))
    tensors: dict[str, Any] = {"model": dict(named)}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        tensors[key] = {name: optimizer.adamw.state[parameter][key] for name, parameter in optimizer.full.items()}
    if optimizer.eight_bit is not None:
        tensors["adamw_8bit"] = optimizer.eight_bit.state()
    if optimizer.loss_scale is not None:
        tensors["loss_scale"] = {"scale": optimizer.loss_scale.scale, "growth": optimizer.loss_scale.growth}
    if optimizer.ema is not None:
        tensors["ema"] = dict(zip(optimizer.names, optimizer.ema, strict=True))
    if optimizer.old is not None:
        tensors["old"] = dict(zip(optimizer.names, optimizer.old.parameters, strict=True))
    return tensors
