"""A finished or running run, opened by another command: its config, its checkpoints, its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from fastgrpo.checkpoints.store import CheckpointStore, load_weights
from fastgrpo.config import Config, RewardSpec, flatten_rewards, load_config, validate
from fastgrpo.config.sections import Section, load_settings
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models import ModelFamily
from fastgrpo.models.trainable import make_trainable


class RewardList(Section):
    """A YAML file of rewards: `rewards: [{name: clip, path: "shapes:clip"}]`."""

    rewards: list[RewardSpec]


def choose_rewards(config: Config, wanted: Sequence[str]) -> list[RewardSpec]:
    """The rewards that a command line names; without any, the config's own.

    A name is one of the config's rewards, else a registered one (or module:Class), with `name=path` its weights; a
    .yaml file lists rewards with their options. `clip` is shapes:clip for an embedded model unless it says otherwise.
    """
    if not wanted:
        return list(config.scored)
    own, found = {spec.key: spec for spec in config.scored}, []
    for text in wanted:
        if text.endswith((".yaml", ".yml")):
            found += flatten_rewards(load_settings(RewardList, text).rewards)
            continue
        name, _, path = text.partition("=")
        if not path and name in own:
            found.append(own[name])
            continue
        embedded = "shapes:clip" if name == "clip" and config.model.path.startswith("shapes:") else None
        found.append(RewardSpec(name=name, path=path or embedded))
    names = [spec.key for spec in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--reward: '{twice}' is named twice; give each a label in a .yaml file")
    return found


def open_run(run_dir: Path, checkpoint: str = "latest") -> tuple[Config, CheckpointStore, int]:
    """A run's resolved config, its checkpoints, and the iteration that `checkpoint` (latest, best, a number) names.

    The config is that of the checkpoint where config.yaml is gone or broken. Raises UserError for what is not there.
    """
    store = CheckpointStore.of_run(run_dir)
    there = store.iterations()
    written = run_dir / "config.yaml"
    if not there and not written.is_file():
        raise UserError(f"{run_dir}: not a run directory (it has no config.yaml)")
    if not there:
        raise UserError(f"{run_dir}: holds no checkpoint yet")
    if checkpoint == "latest":
        iteration = there[-1]
    elif checkpoint == "best":
        iteration = _best(run_dir, store, there)
    elif checkpoint.isdigit() and int(checkpoint) in there:
        iteration = int(checkpoint)
    else:
        raise UserError(
            f"{run_dir}: no checkpoint '{checkpoint}'; (one of: latest, best, {', '.join(map(str, there))})"
        )
    try:
        return load_config(written), store, iteration
    except ConfigError:
        return validate(store.state(iteration)["config"]), store, iteration


def make_results(out: Path) -> None:
    """Makes the directory of a command's results, before anything is drawn. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be written to: {error.strerror}; name another directory with --out") from None


def _best(run_dir: Path, store: CheckpointStore, there: list[int]) -> int:
    """The checkpoint that scored best in the run's own evaluations; never another one."""
    best = store.state(there[-1])["best_iteration"]
    others = f"name latest or an iteration (one of: {', '.join(map(str, there))})"
    if best is None:
        raise UserError(f"{run_dir}: no evaluation has said yet which checkpoint is best; {others}")
    if best == 0 and best not in there:
        raise UserError(f"{run_dir}: the base model scored best, before training, and has no checkpoint; {others}")
    if best not in there:
        raise UserError(f"{run_dir}: iteration {best} scored best, and its checkpoint is not there; {others}")
    return best


def apply_checkpoint(family: ModelFamily, config: Config, store: CheckpointStore, iteration: int) -> None:
    """Puts a checkpoint's weights (its EMA where eval.ema and there is one) into a freshly loaded family."""
    store.state(iteration)
    make_trainable(family)
    load_weights(family.policy, store, iteration, config.eval.ema and config.update.ema_decay is not None)
    family.policy.requires_grad_(False)
