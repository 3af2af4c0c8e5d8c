"""The loop, and only the loop: roll out, decode, score, update; evaluate and checkpoint every so often.

The host is asked once an iteration, at scoring: images come to it there, and the statistics of the update before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import Advantages, compute_advantages, group_spread
from fastgrpo.algorithms.arithmetic import arithmetic
from fastgrpo.algorithms.guard import RewardGuard
from fastgrpo.algorithms.layout import rank_samples
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.data.samplers import PromptSampler, SpreadSampler
from fastgrpo.distributed.fsdp import unsharded
from fastgrpo.distributed.world import World, start_world, this_machine
from fastgrpo.errors import PreemptedError, UserError
from fastgrpo.evaluation.heldout import evaluate, heldout_prompts, record
from fastgrpo.models import ModelFamily, check_family, load_family
from fastgrpo.models.trainable import reference_of
from fastgrpo.observe.metrics import RankMonitor, rank_metrics
from fastgrpo.observe.profiling import profiled
from fastgrpo.observe.progress import Progress
from fastgrpo.observe.run_log import Telemetry
from fastgrpo.observe.timers import Lap, PhaseTimer
from fastgrpo.planning.plan import resolved
from fastgrpo.rewards import Scores, load_reward
from fastgrpo.rewards.scoring import AllScores, gather
from fastgrpo.rollout.generator import Batch, Generator, flight_scores, flight_state, keep_extremes
from fastgrpo.rollout.trajectory import tensors
from fastgrpo.training.adamw_8bit import check_optimizer
from fastgrpo.training.checkpoint import CheckpointStore, training_tensors
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.residency import residency
from fastgrpo.training.resume import ENDS, GOING_ON, PREEMPTED, claim_directory, listening
from fastgrpo.training.update import Updater, packed, unpacked
from fastgrpo.training.weights import prepare_weights


class Trainer:
    """A run in this process: `run()` trains to train.iterations, from the checkpoint if run.resume finds one.

    Raises UserError for what the user can mend, before weights load where that is possible. load: gives the family.
    """

    def __init__(self, config: Config, load: Callable[..., ModelFamily] = load_family) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self.prompts = load_prompts(config.prompts.train)
        self.heldout = heldout_prompts(config, config.eval.images) if config.eval.every else []
        self.rewards = {spec.key: load_reward(spec) for spec in config.scored}
        check_family(config)
        check_optimizer(config.update.optimizer)
        config = self.config = resolved(config, *this_machine())
        self.world: World = start_world(config)
        self.store = CheckpointStore.of_run(self.dir, self.world.main)
        start = claim_directory(config, self.store, self.world)
        roll = config.rollout
        kind = SpreadSampler if config.prompts.select == "spread" else PromptSampler
        self.sampler = kind(len(self.prompts), roll.prompts_per_iteration, config.run.seed)
        self.family = load(config.model, self.world.device, config.parallel.load == "sharded")
        if config.model.text_encoders == "drop":
            self.family.encode_ahead(self._prompts_to_come()[self.world.rank :: self.world.size])
            self.world.barrier()
        self._frozen = prepare_weights(self.family, config, self.world)
        total = config.train.iterations * config.update.optimizer_steps
        self.optimizer = OptimizerState(self.family.policy, config.update, total)
        self.residency = residency(config, self.family.policy, self.world)
        self.updater = Updater(self.family, config, self.world, self.optimizer, self._reference(), self.residency)
        self.samples = roll.prompts_per_iteration * roll.candidates
        self.levels = self.family.noise_levels(roll.steps, roll.shift)
        shares = rank_samples(self.samples, config.update.optimizer_steps, self.world.size, self.world.rank)
        # In the order of the optimizer steps that take them; one order on every rank.
        self.mine = np.sort(shares.reshape(-1))
        if roll.best_of is not None and shares.shape[1] % roll.best_of:
            raise UserError(
                f"rollout.best_of: groups of {roll.best_of} stay whole, and {roll.prompts_per_iteration} prompts an "
                "iteration do not divide over the ranks × update.optimizer_steps"
            )
        self.weights = np.array([spec.weight for spec in config.scored])
        self.generator = Generator(
            self.family, config, self.rewards, self.mine, self.levels, self._note,
            self.world.context, self.world.context_rank,
        )  # fmt: skip
        self.guard = RewardGuard(config.guard)
        self.halted: str | None = None
        # With staleness 1: the next iteration's samples, rolled out already.
        self._ahead: Batch | None = None
        self.iteration, self.train_seconds = 0, 0.0
        self.best: tuple[int | None, float] = (None, -np.inf)
        self.stopping = GOING_ON
        self._pending: tuple[int, dict[str, float], Tensor, Lap] | None = None
        self._apart: dict[str, float] = {}
        self.monitor = RankMonitor(self.world.device)
        if start is not None:
            self._restore(start)

    def run(self) -> None:
        """Trains, evaluates and checkpoints. A first Ctrl-C ends it after one (KeyboardInterrupt), SIGTERM and
        SIGUSR1 too (PreemptedError)."""
        config = self.config
        self.telemetry = Telemetry(self.dir, config, self.world.main)
        self.telemetry.rewind(self.iteration)
        self.telemetry.event("start", self.iteration, ranks=self.world.size, device=str(self.world.device))
        self.timer = PhaseTimer(self.world.device)
        shown = config.telemetry.progress and self.world.main
        with listening(self._stop), Progress(config.train.iterations, self.iteration, shown) as self.progress:
            self._note(arithmetic(config, self.world.size))
            if self.iteration == 0 and config.eval.every:
                self._evaluate()
            saved = self.iteration if self.iteration in self.store.iterations() else -1
            while self.iteration < config.train.iterations and not (self.stopping or self.halted):
                begin = time.perf_counter()
                with self._profiled():
                    self.iterate()
                self.train_seconds += time.perf_counter() - begin
                if config.eval.every and self.iteration % config.eval.every == 0:
                    self._evaluate()
                if config.checkpoint.every and self.iteration % config.checkpoint.every == 0:
                    self._save()
                    saved = self.iteration
            self._flush()
            if saved != self.iteration:
                self._save()
            self.store.wait()
        self.telemetry.event("end", self.iteration, why=self.halted or ENDS[self.stopping])
        self.telemetry.close()
        if self.halted:
            raise UserError(self.halted)
        if self.stopping == PREEMPTED:
            raise PreemptedError(f"{self.dir}: stopped at iteration {self.iteration} with a checkpoint, to be requeued")
        if self.stopping:
            raise KeyboardInterrupt

    def _profiled(self) -> AbstractContextManager[None]:
        if self.iteration not in self.config.telemetry.profile:
            return nullcontext()
        return profiled(self.dir / "profile", self.iteration, self.world.rank)

    def _stop(self, why: int) -> None:
        self.stopping = max(self.stopping, why)
        self._note("stopping after this iteration, with a checkpoint; once more to stop at once")

    def _note(self, text: str) -> None:
        self.progress.note(text)
        self.telemetry.event("note", self.iteration, text=text)

    def iterate(self) -> None:
        """One iteration: the prompts' groups are rolled out, decoded, scored, and the weights updated."""
        config, iteration = self.config, self.iteration
        self.timer.lap()
        batch = self._ahead or self._start(iteration)
        self._ahead = self._start(iteration + 1) if config.scoring.staleness else None
        scored = self._scored(batch)
        with self.timer.phase("sync"):
            self._flush()
        self._check_failures(scored)
        group = config.rollout.candidates
        advantages = compute_advantages(scored.values, scored.valid, group, self.weights, config.advantage)
        advantages = advantages.of(self._kept(scored))
        if isinstance(self.sampler, SpreadSampler):
            self.sampler.observe(batch.drawn, group_spread(scored.values, scored.valid, group, self.weights))
        with self.timer.phase("update"):
            result = self.updater.run(
                batch.plan, batch.trajectory, batch.conditioning, advantages.terms,
                advantages.valid & self._worth(advantages), iteration,
            )  # fmt: skip
        self.iteration += 1
        metrics = self._metrics(scored, advantages) | batch.spent
        metrics |= self._watch(iteration, scored, metrics["reward/mean"])
        self._pending = (iteration, metrics, packed(result), self.timer.lap())

    def _prompts_to_come(self) -> list[Prompt]:
        """Those that the run draws: all, where their rewards decide."""
        drawn: set[int] = set(range(len(self.prompts)))
        if not isinstance(self.sampler, SpreadSampler):
            drawn = {i for n in range(self.config.train.iterations) for i in self.sampler.at(n).tolist()}
        return [self.prompts[i] for i in sorted(drawn)] + list(dict.fromkeys(self.heldout))

    def _start(self, iteration: int) -> Batch:
        """Rolls out an iteration's samples; scoring begins."""
        drawn = self.sampler.at(iteration)
        prompts = [self.prompts[i] for i in drawn]
        return self.generator.start(iteration, drawn, prompts, self.timer, self._weights_unsharded)

    def _weights_unsharded(self) -> AbstractContextManager[object]:
        return unsharded(self.family.modules.values(), self.residency.rollout_unsharded)

    def _scored(self, batch: Batch) -> AllScores:
        """Every rank's scores of a batch, as soon as they are there."""
        if batch.scored is None:
            self.generator.finish(batch, self.timer)
            with self.timer.phase("sync"):
                batch.scored = self._gather(batch.scores)
        return batch.scored

    def _kept(self, scored: AllScores) -> np.ndarray:
        """bool [N]: the samples that are trained on, all or the best and worst of each prompt."""
        everyone = np.arange(self.samples)
        if self.config.rollout.best_of is None:
            return np.ones(self.samples, dtype=bool)
        return keep_extremes(scored.values, scored.valid, self.weights, everyone, self.config)

    def _too_many_failed(self, scored: AllScores) -> bool:
        rate = scored.failure_rate(self.weights)
        return rate == 1 or rate > self.config.scoring.max_failure_rate

    def _check_failures(self, scored: AllScores) -> None:
        """Pauses the run where too many samples have no score: with a checkpoint, before they are trained on."""
        if not self._too_many_failed(scored):
            return
        rate, limit = scored.failure_rate(self.weights), self.config.scoring.max_failure_rate
        self._ahead = None
        self._save()
        self.store.wait()
        what = (
            f"rewards: no sample of iteration {self.iteration} could be scored"
            if rate == 1
            else f"scoring.max_failure_rate: {rate:.0%} of iteration {self.iteration}'s samples got no score, and the "
            f"limit is {limit:.0%}"
        )
        raise UserError(
            f"{what}; see the messages above. The run is paused with a checkpoint: mend the reward, then go on with "
            "run.resume=true"
        )

    def _watch(self, iteration: int, scored: AllScores, trained: float) -> dict[str, float]:
        """Held-out rewards beside the trained one: what the guard says of them, and does."""
        config, held = self.config, {}
        for row, spec in enumerate(config.scored):
            counted = scored.values[row][scored.valid[row] & scored.asked[row]]
            if spec.weight == 0 and len(counted):
                held[spec.key] = float(counted.mean())
        falling = self.guard.observe(iteration, trained, held)
        names = ", ".join(falling)
        if falling and config.guard.action == "stop":
            self.halted = (
                f"guard.action: stopped at iteration {self.iteration} with a checkpoint: held-out {names} fell while "
                "the trained reward rose; look at the images, then go on with run.resume=true guard.action=off, or "
                "change the rewards"
            )
        if falling and config.guard.action == "raise_kl":
            self.guard.raise_kl(falling)
            self._apply_guard()
            self._note(f"held-out {names} fell: objective.kl_weight × {self.guard.kl_scale:g} from here on")
        known = {"guard/falling": float(len(falling))} if held else {}
        if config.guard.action == "raise_kl":
            known["guard/kl_weight"] = self.updater.config.objective.kl_weight
        return known

    def _apply_guard(self) -> None:
        objective = self.config.objective
        raised = objective.model_copy(update={"kl_weight": objective.kl_weight * self.guard.kl_scale})
        self.updater.config = self.config.model_copy(update={"objective": raised})

    def _worth(self, advantages: Advantages) -> np.ndarray:
        """Samples of groups that are trained: all of them with a KL term, else those with any spread."""
        flat = advantages.zero_spread.repeat(self.config.rollout.candidates)
        return ~flat if self.config.objective.kl_weight == 0 else np.ones_like(flat)

    def _gather(self, scores: dict[str, Scores]) -> AllScores:
        """Every rank's scores. A signal that reached one rank stops them all, at the same iteration."""

        def owned(process: int) -> np.ndarray:
            rank, context_rank = divmod(process, self.world.context)
            shares = rank_samples(self.samples, self.config.update.optimizer_steps, self.world.size, rank)
            return self.generator.scores_of(np.sort(shares, None), context_rank)

        scored = gather(scores, owned, self.world, self.stopping)
        self.stopping = scored.flagged
        return scored

    def _metrics(self, scored: AllScores, advantages: Advantages) -> dict[str, float]:
        rewards, valid = scored.values, scored.valid
        ok = valid.all(axis=0)
        total = (self.weights[:, None] * rewards)[:, ok].sum(axis=0)
        groups = total.reshape(-1, self.config.rollout.candidates) if ok.all() else total[None]
        counted = np.where(valid & scored.asked, rewards, np.nan)
        columns = dict(zip(self.rewards, counted, strict=True)) | scored.components
        known = {name: column[~np.isnan(column)] for name, column in columns.items()}
        return {
            "reward/mean": float(total.mean()),
            "reward/std": float(groups.std(axis=1).mean()),
            **{f"reward/{name}": float(column.mean()) for name, column in known.items() if len(column)},
            "advantage/abs_mean": float(np.abs(advantages.values).mean()),
            "groups/zero_spread": float(advantages.zero_spread.mean()),
            "samples/trained": float((advantages.values != 0).sum()),
            "samples/failed": float((~ok).sum()),
            # Before the first step, where no group had a spread yet, that of the first.
            "lr": self.optimizer.learning_rate(max(self.optimizer.steps - 1, 0)),
        }

    def _flush(self) -> None:
        """Reads the statistics of the last update, if they are not read yet, and logs its iteration."""
        if self._pending is None:
            return
        iteration, metrics, packed, lap = self._pending
        self._pending = None
        statistics = packed.cpu().numpy()
        seconds = lap.read()
        told = self.monitor.report(seconds, lap.memory, self.timer.peak)
        vectors = self.world.gather(np.concatenate([statistics, told.vector()]))
        metrics |= unpacked(vectors[:, : len(statistics)])
        metrics |= rank_metrics(vectors[:, len(statistics) :], self.samples)
        metrics |= {f"time/{name}": value for name, value in self._apart.items()}
        self._apart = {}
        metrics["samples_per_second"] = self.samples / seconds["total"]
        self.telemetry.log(iteration, metrics)
        self.progress.update(iteration + 1, metrics)

    def _evaluate(self) -> None:
        self._flush()
        with self._aside("eval"), self.optimizer.averaged(self.config.eval.ema):
            result = evaluate(self.family, self.rewards, self.heldout, self.config, self.world, self._note)
        summary = result.summary()
        score = sum(spec.weight * summary["rewards"][spec.key] for spec in self.config.scored)
        if score > self.best[1]:
            self.best = (self.iteration, score)
            if self.iteration and self.iteration % (self.config.checkpoint.every or 1):
                self._save()
        self.telemetry.event("heldout", self.iteration, score=score, rewards=summary["rewards"])
        if self.world.main:
            config = self.config
            grid = record(result, self.dir, self.iteration, config.eval.grid, config.model.fps, config.eval.mp4)
            self.telemetry.images(
                self.iteration, "heldout", grid, [p.text for p in result.prompts[: self.config.eval.grid]]
            )
            strict = "" if summary["strict_pass"] is None else f", strict pass {summary['strict_pass']:.1%}"
            self._note(f"iteration {self.iteration}: held-out reward {score:.3f}{strict}")

    def _save(self) -> None:
        self._flush()
        with self._aside("checkpoint"):
            state = {
                "iteration": self.iteration,
                "optimizer_steps": self.optimizer.steps,
                "train_seconds": self.train_seconds,
                "best_iteration": self.best[0],
                "best_score": self.best[1] if self.best[0] is not None else None,
            }
            if isinstance(self.sampler, SpreadSampler):
                state["prompt_spread"] = [None if np.isnan(x) else x for x in self.sampler.spread.tolist()]
            state["guard"] = self.guard.state()
            state["in_flight"], flying = self._in_flight()
            policy = self.config.checkpoint
            how = policy.keep, self.best[0], policy.background, flying
            self.store.save(self.iteration, training_tensors(self.optimizer), state, *how)

    def _in_flight(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The samples rolled out ahead and their scores, for a checkpoint. Failed ones are rolled out again instead."""
        batch = self._ahead
        if batch is None or self._too_many_failed(self._scored(batch)):
            return None, {}
        return flight_state(batch, self.world.size), {f"in_flight_{self.world.rank}": tensors(batch.trajectory)}

    def _restore_in_flight(self, iteration: int, state: dict[str, Any]) -> None:
        scored = flight_scores(state, self.world.size)
        mine = self.mine[self._kept(scored)[self.mine]]
        drawn = np.array(state["drawn"])
        prompts = [self.prompts[i] for i in drawn]
        batch = self.generator.restore(state["iteration"], drawn, prompts, mine if len(mine) else self.mine[:1])
        self.store.load(iteration, {f"in_flight_{self.world.rank}": tensors(batch.trajectory)})
        batch.scored, self._ahead = scored, batch

    @contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """Times what is not part of an iteration; logged with the next one, outside its total."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._apart[name] = self._apart.get(name, 0.0) + seconds
        self.telemetry.event(name, self.iteration, seconds=seconds)
        self.monitor.skip()

    def _restore(self, iteration: int) -> None:
        state = self.store.state(iteration, verified=True)
        with torch.no_grad():
            self.store.load(iteration, training_tensors(self.optimizer))
        self.iteration, self.optimizer.steps = state["iteration"], state["optimizer_steps"]
        self.train_seconds = state["train_seconds"]
        if isinstance(self.sampler, SpreadSampler):
            self.sampler.spread[:] = np.array(state["prompt_spread"], dtype=np.float64)
        if "guard" in state:
            self.guard.restore(state["guard"])
            self._apply_guard()
        if state.get("in_flight") is not None:
            self._restore_in_flight(iteration, state["in_flight"])
        if state["best_iteration"] is not None:
            self.best = (state["best_iteration"], state["best_score"])

    def _reference(self) -> Any:
        """What gives the KL's reference components: frozen copies, or the family's own with their LoRA switched off."""
        if not self.config.objective.kl_weight:
            return None
        return reference_of(self.family.policy, self._frozen)


def train(config: Config) -> None:
    """A whole run from a config; what `fastgrpo train` does."""
    Trainer(config).run()
