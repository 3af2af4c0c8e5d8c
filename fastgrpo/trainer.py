"""The loop, and only the loop: roll out, decode, score, update; evaluate and checkpoint every so often.

The host is asked once an iteration, at scoring: images come to it there, and the statistics of the update before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.advantages import Advantages, compute_advantages, group_spread
from fastgrpo.arithmetic import arithmetic
from fastgrpo.checkpoint import CheckpointStore, training_tensors
from fastgrpo.config import Config
from fastgrpo.errors import PreemptedError, UserError
from fastgrpo.evaluate import evaluate, heldout_prompts, record
from fastgrpo.models import check_family, load_family
from fastgrpo.objective import SUMMED
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import World, gathered, prepare_weights, residency, start_world
from fastgrpo.prompts import PromptSampler, SpreadSampler, load_prompts
from fastgrpo.resume import GOING_ON, PREEMPTED, claim_directory, listening
from fastgrpo.rewards import Scores, load_reward, release
from fastgrpo.rollout import decode, lay_out, rank_samples, rollout
from fastgrpo.schedule import plan_rollout
from fastgrpo.scoring import Gathered, gather, score_samples
from fastgrpo.telemetry import Lap, PhaseTimer, Progress, Telemetry, peak_memory_bytes
from fastgrpo.update import Updater, UpdateResult


class Trainer:
    """A run in this process: `run()` trains to train.iterations, from the checkpoint if run.resume finds one.

    Raises UserError for what the user can mend, before weights load where that is possible.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self.prompts = load_prompts(config.prompts.train)
        self.heldout = heldout_prompts(config, config.eval.images) if config.eval.every else []
        self.rewards = {spec.key: load_reward(spec) for spec in config.scored}
        check_family(config)
        self.world: World = start_world(config)
        self.store = CheckpointStore.of_run(self.dir, self.world.main)
        start = claim_directory(config, self.store, self.world)
        self.family = load_family(config.model, self.world.device)
        self._frozen = prepare_weights(self.family, config, self.world)
        total = config.train.iterations * config.update.optimizer_steps
        self.optimizer = OptimizerState(self.family.policy, config.update, total)
        self.residency = residency(config, self.family.policy, self.world)
        self.updater = Updater(self.family, config, self.world, self.optimizer, self._reference(), self.residency)
        roll = config.rollout
        self.samples = roll.prompts_per_iteration * roll.group_size
        kind = SpreadSampler if config.prompts.select == "spread" else PromptSampler
        self.sampler = kind(len(self.prompts), roll.prompts_per_iteration, config.run.seed)
        self.levels = self.family.noise_levels(roll.steps, roll.shift)
        shares = rank_samples(self.samples, config.update.optimizer_steps, self.world.size, self.world.rank)
        # In the order of the optimizer steps that take them; one order on every rank.
        self.mine = np.sort(shares.reshape(-1))
        self.weights = np.array([spec.weight for spec in config.scored])
        self.iteration, self.train_seconds = 0, 0.0
        self.best: tuple[int | None, float] = (None, -np.inf)
        self.stopping = GOING_ON
        self._pending: tuple[int, dict[str, float], Tensor, Lap] | None = None
        self._apart: dict[str, float] = {}
        if start is not None:
            self._restore(start)

    def run(self) -> None:
        """Trains, evaluates and checkpoints. A first Ctrl-C ends it after one (KeyboardInterrupt), SIGTERM and
        SIGUSR1 too (PreemptedError)."""
        config = self.config
        self.telemetry = Telemetry(self.dir, config, self.world.main)
        self.telemetry.rewind(self.iteration)
        self.timer = PhaseTimer(self.world.device)
        with (
            listening(self._stop),
            Progress(
                config.train.iterations, self.iteration, config.telemetry.progress and self.world.main
            ) as self.progress,
        ):
            self.progress.note(arithmetic(config, self.world.size))
            if self.iteration == 0 and config.eval.every:
                self._evaluate()
            saved = self.iteration if self.iteration in self.store.iterations() else -1
            while self.iteration < config.train.iterations and not self.stopping:
                begin = time.perf_counter()
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
        self.telemetry.close()
        if self.stopping == PREEMPTED:
            raise PreemptedError(f"{self.dir}: stopped at iteration {self.iteration} with a checkpoint, to be requeued")
        if self.stopping:
            raise KeyboardInterrupt

    def _stop(self, why: int) -> None:
        self.stopping = max(self.stopping, why)
        self.progress.note("stopping after this iteration, with a checkpoint; once more to stop at once")

    def iterate(self) -> None:
        """One iteration: the prompts' groups are rolled out, decoded, scored, and the weights updated."""
        config, iteration = self.config, self.iteration
        self.timer.lap()
        drawn = self.sampler.at(iteration)
        chosen = [self.prompts[i] for i in drawn]
        plan = plan_rollout(config.rollout, self.levels, self.samples, iteration, config.run.seed)
        layout = lay_out(plan, config.rollout, self.mine)
        with self.timer.phase("conditioning"):
            conditioning = self.family.encode([chosen[i] for i in layout.prompts])
        kept = gathered(self.family.modules.values(), self.residency.rollout_gathered)
        with self.timer.phase("rollout"), kept:
            trajectory = rollout(self.family, plan, layout, conditioning, config.rollout, config.run.seed, iteration)
        with self.timer.phase("decode"):
            images = decode(self.family, trajectory.latents, config.rollout.decode_batch)
        with self.timer.phase("sync"):
            images = images.cpu()
            self._flush()
        with self.timer.phase("reward"):
            prompts = [chosen[layout.prompts[i]] for i in layout.sample_prompt]
            fps = config.model.fps if images.ndim == 5 else None
            scores = score_samples(self.rewards, images, prompts, fps, self.progress.note)
            release(self.rewards.values())
        with self.timer.phase("sync"):
            scored = self._gather(scores)
        advantages = compute_advantages(
            scored.values, scored.valid, config.rollout.group_size, self.weights, config.advantage
        )
        if isinstance(self.sampler, SpreadSampler):
            self.sampler.observe(
                drawn, group_spread(scored.values, scored.valid, config.rollout.group_size, self.weights)
            )
        with self.timer.phase("update"):
            result = self.updater.run(
                plan, trajectory, conditioning, advantages.terms, advantages.valid & self._worth(advantages), iteration
            )
        self.iteration += 1
        metrics = self._metrics(scored, advantages)
        self._pending = (iteration, metrics, _packed(result), self.timer.lap())

    def _worth(self, advantages: Advantages) -> np.ndarray:
        """Samples of groups that are trained: all of them with a KL term, else those with any spread."""
        flat = advantages.zero_spread.repeat(self.config.rollout.group_size)
        return ~flat if self.config.objective.kl_weight == 0 else np.ones_like(flat)

    def _gather(self, scores: dict[str, Scores]) -> Gathered:
        """Every rank's scores. A signal that reached one rank stops them all, at the same iteration."""

        def owned(rank: int) -> np.ndarray:
            return np.sort(rank_samples(self.samples, self.config.update.optimizer_steps, self.world.size, rank), None)

        scored = gather(scores, owned, self.world, self.stopping)
        self.stopping = scored.flagged
        if not scored.valid.all(axis=0).any():
            raise UserError(f"rewards: no sample of iteration {self.iteration} could be scored; see the messages above")
        return scored

    def _metrics(self, scored: Gathered, advantages: Advantages) -> dict[str, float]:
        rewards, valid = scored.values, scored.valid
        ok = valid.all(axis=0)
        total = (self.weights[:, None] * rewards)[:, ok].sum(axis=0)
        groups = total.reshape(-1, self.config.rollout.group_size) if ok.all() else total[None]
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
            "lr": self.optimizer.learning_rate(self.optimizer.steps - 1),
        }

    def _flush(self) -> None:
        """Reads the statistics of the last update, if they are not read yet, and logs its iteration."""
        if self._pending is None:
            return
        iteration, metrics, packed, lap = self._pending
        self._pending = None
        vectors = self.world.gather(packed.cpu().numpy())
        metrics |= _unpacked(vectors)
        seconds = lap.read()
        metrics |= {f"time/{phase}": value for phase, value in (seconds | self._apart).items()}
        self._apart = {}
        metrics["samples_per_second"] = self.samples / seconds["total"]
        metrics["memory/peak_bytes"] = float(peak_memory_bytes())
        self.telemetry.log(iteration, metrics)
        self.progress.update(iteration + 1, metrics["reward/mean"])

    def _evaluate(self) -> None:
        self._flush()
        with self._aside("eval"), self.optimizer.averaged(self.config.eval.ema):
            result = evaluate(self.family, self.rewards, self.heldout, self.config, self.world)
        summary = result.summary()
        score = sum(spec.weight * summary["rewards"][spec.key] for spec in self.config.scored)
        if score > self.best[1]:
            self.best = (self.iteration, score)
            if self.iteration and self.iteration % (self.config.checkpoint.every or 1):
                self._save()
        if self.world.main:
            config = self.config
            grid = record(result, self.dir, self.iteration, config.eval.grid, config.model.fps, config.eval.mp4)
            self.telemetry.images(
                self.iteration, "heldout", grid, [p.text for p in result.prompts[: self.config.eval.grid]]
            )
            strict = "" if summary["strict_pass"] is None else f", strict pass {summary['strict_pass']:.1%}"
            self.progress.note(f"iteration {self.iteration}: held-out reward {score:.3f}{strict}")

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
            policy = self.config.checkpoint
            self.store.save(
                self.iteration, training_tensors(self.optimizer), state, policy.keep, self.best[0], policy.background
            )

    @contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """Times what is not part of an iteration; logged with the next one, outside its total."""
        begin = time.perf_counter()
        yield
        self._apart[name] = self._apart.get(name, 0.0) + time.perf_counter() - begin

    def _restore(self, iteration: int) -> None:
        state = self.store.state(iteration, verified=True)
        with torch.no_grad():
            self.store.load(iteration, training_tensors(self.optimizer))
        self.iteration, self.optimizer.steps = state["iteration"], state["optimizer_steps"]
        self.train_seconds = state["train_seconds"]
        if isinstance(self.sampler, SpreadSampler):
            self.sampler.spread[:] = np.array(state["prompt_spread"], dtype=np.float64)
        if state["best_iteration"] is not None:
            self.best = (state["best_iteration"], state["best_score"])

    def _reference(self) -> Any:
        """What gives the KL's reference components: frozen copies, or the family's own with their LoRA switched off."""
        if not self.config.objective.kl_weight:
            return None
        return self._without_lora if self._frozen is None else lambda: nullcontext(self._frozen)

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        with self.family.lora_disabled():
            yield


def _packed(result: UpdateResult) -> Tensor:
    """The update's statistics as one float64 vector on the device."""
    device = result.statistics.sums.device
    norms = [n.double() for n in result.grad_norms] or [torch.zeros((), dtype=torch.float64, device=device)]
    skipped = [s.double() for s in result.skipped_steps] or [torch.zeros((), dtype=torch.float64, device=device)]
    extremes = [result.statistics.max_deviation, result.first.max_deviation]
    tail = torch.stack([*extremes, torch.stack(norms).mean(), torch.stack(skipped).sum()])
    return torch.cat([result.statistics.sums, tail])


def _unpacked(vectors: np.ndarray) -> dict[str, float]:
    """Metrics of every rank's packed vector [world, …]."""
    sums = dict(zip(SUMMED, vectors[:, : len(SUMMED)].sum(axis=0), strict=True))
    pairs = max(sums["weight"], 1.0)
    deviation, first, norm, skipped = vectors[:, len(SUMMED) :].max(axis=0)
    return {
        "loss": sums["loss"] / pairs,
        "ratio/mean": sums["ratio"] / pairs,
        "ratio/max_deviation": deviation,
        "ratio/first_max_deviation": first,
        "clip_fraction": sums["clipped"] / pairs,
        "dppo_dropped": sums["dropped"] / pairs,
        "kl": sums["kl"] / pairs,
        "grad_norm": norm,
        "optimizer_steps/skipped": skipped,
    }


def train(config: Config) -> None:
    """A whole run from a config; what `fastgrpo train` does."""
    Trainer(config).run()
