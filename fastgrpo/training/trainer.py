"""The loop: take a batch, collect its scores, compute advantages, update, emit. Everything else is a callback.

The host is asked once an iteration, at scoring: images come to it there, and the statistics of the update before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.distributed.residency import residency
from fastgrpo.distributed.signals import ENDS, HALTED, StopRequest, listening, stop_request
from fastgrpo.distributed.world import World
from fastgrpo.errors import RunPausedError, UserError
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.observe.iteration_log import IterationLog
from fastgrpo.observe.metrics import advantage_metrics
from fastgrpo.observe.provenance import provenance
from fastgrpo.observe.run_log import RunLog
from fastgrpo.observe.timers import PhaseTimer
from fastgrpo.rewards import Reward, load_rewards
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import AllScores
from fastgrpo.rollout.generator import Batch
from fastgrpo.rollout.rollouts import Rollouts
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.finite import raise_if_not_finite
from fastgrpo.training.forward import ForwardTraining
from fastgrpo.training.optimizer import OptimizerState, optimizer_steps
from fastgrpo.training.replay import Replay
from fastgrpo.training.result import TrainResult, result_of
from fastgrpo.training.setup import open_trainer
from fastgrpo.training.update import Updater, UpdateResult, packed
from fastgrpo.training.weights import prepare_weights, rolling_out


class Trainer:
    """Trains a family with GRPO: `run()` to train.iterations, or one iteration at a time with `step()`.

    Constructing one reads prompts and makes the family's weights ready to train; it writes nothing and joins no
    process group. `Trainer.from_config` does all that a run on disk needs.

    Args:
        config: Of the run. `auto` settings that need a plan are resolved (`fastgrpo.train` does that).
        family: The model, loaded (`fastgrpo.load_family`).
        world: This process among its peers (`fastgrpo.distributed.world`).
        prompts: What is trained on; None: prompts.train of the config.
        rewards: The rewards by name; None: those of the config.
        log: Where metrics and events go; None: nowhere.
        callbacks: What happens around iterations, in this order.
        stop: What signals ask for; None: one of its own, which `run` listens with.

    Raises:
        UserError: For what the user can mend in config, prompts or rewards.
    """

    def __init__(
        self, config: Config, family: ModelFamily, world: World, *, prompts: Sequence[Prompt] | None = None,
        rewards: Mapping[str, Reward] | None = None, log: RunLog | None = None, callbacks: Sequence[Callback] = (),
        stop: StopRequest | None = None,
    ) -> None:  # fmt: skip
        self.config, self.family, self.world = config, family, world
        self.rewards = load_rewards(config) if rewards is None else dict(rewards)
        self.log = RunLog(None, config) if log is None else log
        self.callbacks = list(callbacks)
        self.timer = PhaseTimer(world.device)
        errors = None if log is None else Path(config.run.dir).absolute() / "errors"
        self.failures = FailureLog(self.note, errors, world.process)
        prompts = load_prompts(config.prompts.train) if prompts is None else prompts
        copies, steps = prepare_weights(family, config, world), optimizer_steps(config)
        self.optimizer = OptimizerState(
            family.policy, config.update, steps, loss_scaling=config.model.dtype == "float16", old=copies.old,
            old_decay=config.objective.old_decay,
        )  # fmt: skip
        self.residency = residency(config, family.policy, world, copies.old_modules())
        acting = partial(rolling_out, family, config, copies, self.residency)
        self.rollouts = Rollouts(family, config, world, prompts, self.rewards, self.timer, self.failures, acting)
        forward = None
        if config.objective.forward:
            held = self.residency.update_unsharded
            forward = ForwardTraining(family, config, world, self.rollouts.levels, copies, held)
        self.updater = Updater(family, config, world, self.optimizer, copies.reference, self.residency, forward=forward)
        self.replay = Replay(config.update.replay, self.optimizer)
        self.kl_weight = config.objective.kl_weight
        self.iteration, self.train_seconds = 0, 0.0
        # Why the run ends before its last iteration: a callback's reason on this rank, or what all ranks agree on.
        self.halted: str | None = None
        self.stop = stop_request() if stop is None else stop
        self.iterations = IterationLog(self.log, world, self.timer, self.rollouts.samples, self._observe)

    @classmethod
    def from_config(cls, config: Config, load: Callable[..., ModelFamily] = load_family) -> Trainer:
        """Validates everything, then claims the run directory, loads the weights and opens the log.

        Args:
            config: The resolved config; its `auto` settings that need a plan are resolved (`fastgrpo.train` does it).
            load: What loads the family, called as `fastgrpo.load_family` is.

        Returns:
            A trainer at the iteration of the newest good checkpoint, or at iteration 0.

        Raises:
            UserError: For what the user can mend, before weights load where that is possible.
        """
        return open_trainer(cls, config, load)

    def run(self) -> TrainResult:
        """Trains to train.iterations, from where the trainer is.

        Returns:
            The run's directory, the metrics of its last iteration, its best checkpoint and its evaluations.

        Raises:
            PreemptedError: After SIGTERM or SIGUSR1, with a checkpoint.
            KeyboardInterrupt: After a first Ctrl-C, with a checkpoint.
            UserError: Where a callback halted the run, or too many samples failed; with a checkpoint.
        """
        self.log.rewind(self.iteration)
        self.log.event("start", self.iteration, ranks=self.world.size, **provenance(self.world.device))
        with ExitStack() as stack:
            stack.callback(self.log.close)
            stack.enter_context(listening(self.stop))
            for callback in self.callbacks:
                stack.callback(callback.close)
            self._each("on_start")
            try:
                while self.iteration < self.config.train.iterations and not self.stop.agreed:
                    self._each("before_iteration")
                    if not self._iterate():
                        break
                    self._each("after_iteration")
            except RunPausedError:
                self._each("on_end")
                raise
            self.flush()
            self._each("on_end")
            self.stop.agree(self.world, self.halted)
            self.log.event("end", self.iteration, why=self.halted or ENDS[self.stop.agreed])
        if self.stop.agreed == HALTED:
            raise UserError(self.halted or "a callback halted the run on another rank, which says why")
        self.stop.leave(
            f"{self.config.run.dir}: stopped at iteration {self.iteration} with a checkpoint, to be requeued"
        )
        return self.result()

    def step(self) -> dict[str, float]:
        """Runs one iteration and returns its metrics, which it waits for; no callback's `after_iteration` is called."""
        self._iterate()
        return self.flush()

    def flush(self) -> dict[str, float]:
        """Reads the statistics of the last update, if they are not read yet, logs them, and returns the metrics."""
        return self.iterations.flush()

    def result(self) -> TrainResult:
        """Returns what the run has come to so far."""
        return result_of(self)

    def note(self, text: str) -> None:
        """Says a line: into the log, and to the callbacks.

        Args:
            text: The line, without its end.
        """
        self._each("on_note", text)
        self.log.event("note", self.iteration, text=text)

    def _iterate(self) -> bool:
        """Returns whether there was an update: none where the ranks agree to stop before it."""
        begin, iteration = time.perf_counter(), self.iteration
        self.timer.lap()
        batch = self.rollouts.take(iteration)
        scored = self.rollouts.collect(batch, self.stop.wished(self.halted))
        with self.timer.phase("sync"):
            self.flush()
        if self.stop.take(scored.stop) and not self.config.scoring.staleness:
            # A resumed run rolls the same samples out again, to the bit; with staleness it could not.
            return False
        self._check(scored)
        advantages = self.rollouts.advantages(scored)
        self.rollouts.observe(batch, scored)
        with self.timer.phase("update"):
            kept = self.replay.keep(batch, advantages, self.rollouts.kept(scored))
            result = self.updater.run(batch, advantages, self.kl_weight, self.replay)
            self.replay.push(kept)
        self._emit(batch, scored, advantages, result)
        self.train_seconds += time.perf_counter() - begin
        return True

    def _check(self, scored: AllScores) -> None:
        """Pauses where too many samples have no score, before they are trained on."""
        if (wrong := self.rollouts.failure(scored, self.iteration)) is not None:
            raise_if_not_finite(self, wrong)
            self.rollouts.drop_ahead()
            paused = "The run is paused with a checkpoint: mend the reward, then go on with run.resume=true"
            raise RunPausedError(f"{wrong}; see the messages above. {paused}")

    def _emit(self, batch: Batch, scored: AllScores, advantages: Advantages, result: UpdateResult) -> None:
        """The iteration is done but for its statistics, which are read while the next one runs."""
        self.iteration += 1
        metrics = self.rollouts.metrics(scored) | advantage_metrics(advantages)
        metrics |= {"lr": self.optimizer.latest_rate} | batch.spent
        for callback in self.callbacks:
            metrics |= callback.on_scored(self, batch.iteration, scored, metrics)
        self.iterations.keep(batch.iteration, metrics, packed(result))

    def _observe(self, iteration: int, metrics: dict[str, float]) -> None:
        self.optimizer.rate.observe(metrics)
        self._each("on_metrics", iteration, metrics)

    def _each(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
