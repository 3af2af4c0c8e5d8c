"""The loop, and only the loop: roll out, decode, score, update; evaluate and checkpoint every so often.

The host is asked once an iteration, at scoring: images come to it there, and the statistics of the update before.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from fastgrpo.advantages import Advantages, compute_advantages
from fastgrpo.arithmetic import arithmetic
from fastgrpo.checkpoint import CheckpointStore, training_tensors
from fastgrpo.config import Config, dump
from fastgrpo.errors import UserError
from fastgrpo.evaluate import evaluate, heldout_prompts, record
from fastgrpo.models import load_family
from fastgrpo.objective import SUMMED
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import World, checkpoint_activations, shard, start_world
from fastgrpo.prompts import Prompt, PromptSampler, load_prompts
from fastgrpo.rewards import Scores, load_reward
from fastgrpo.rollout import Layout, decode, lay_out, rank_samples, rollout
from fastgrpo.schedule import plan_rollout
from fastgrpo.telemetry import Lap, PhaseTimer, Progress, Telemetry, peak_memory_bytes
from fastgrpo.update import Updater, UpdateResult

# A checkpoint of another value of these does not continue the same run.
FIXED = ("run.seed", "model", "prompts.train", "rollout", "rewards", "advantage", "objective", "update")


class Trainer:
    """A run in this process: `run()` trains to train.iterations, from the checkpoint if run.resume finds one.

    Raises UserError for what the user can mend, before weights load where that is possible.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self.prompts = load_prompts(config.prompts.train)
        self.heldout = heldout_prompts(config, config.eval.images) if config.eval.every else []
        self.rewards = {spec.name: load_reward(spec) for spec in config.rewards}
        self.world: World = start_world(config)
        self.store = CheckpointStore.of_run(self.dir, self.world.main)
        start = self._claim_directory()
        self.family = load_family(config.model, self.world.device)
        self._prepare_weights()
        total = config.train.iterations * config.update.optimizer_steps
        self.optimizer = OptimizerState(self.family.transformer, config.update, total)
        self.updater = Updater(self.family, config, self.world, self.optimizer, self._reference())
        roll = config.rollout
        self.samples = roll.prompts_per_iteration * roll.group_size
        self.sampler = PromptSampler(len(self.prompts), roll.prompts_per_iteration, config.run.seed)
        self.levels = self.family.noise_levels(roll.steps, roll.shift)
        shares = rank_samples(self.samples, config.update.optimizer_steps, self.world.size, self.world.rank)
        # In the order of the optimizer steps that take them; one order on every rank.
        self.mine = np.sort(shares.reshape(-1))
        self.weights = np.array([spec.weight for spec in config.rewards])
        self.iteration, self.train_seconds = 0, 0.0
        self.best: tuple[int | None, float] = (None, -np.inf)
        self.stopping = False
        self._pending: tuple[int, dict[str, float], Tensor, Lap] | None = None
        self._apart: dict[str, float] = {}
        if start is not None:
            self._restore(start)

    def run(self) -> None:
        """Trains, evaluates and checkpoints. A first Ctrl-C or SIGTERM ends it after one (KeyboardInterrupt)."""
        config = self.config
        self.telemetry = Telemetry(self.dir, config, self.world.main)
        self.telemetry.rewind(self.iteration)
        self.timer = PhaseTimer(self.world.device)
        with (
            _signals(self),
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
        self.telemetry.close()
        if self.stopping:
            raise KeyboardInterrupt

    def iterate(self) -> None:
        """One iteration: the prompts' groups are rolled out, decoded, scored, and the weights updated."""
        config, iteration = self.config, self.iteration
        self.timer.lap()
        chosen = [self.prompts[i] for i in self.sampler.at(iteration)]
        plan = plan_rollout(config.rollout, self.levels, self.samples, iteration, config.run.seed)
        layout = lay_out(plan, config.rollout, self.mine)
        with self.timer.phase("conditioning"):
            conditioning = self.family.encode([chosen[i] for i in layout.prompts])
        with self.timer.phase("rollout"):
            trajectory = rollout(self.family, plan, layout, conditioning, config.rollout, config.run.seed, iteration)
        with self.timer.phase("decode"):
            images = decode(self.family, trajectory.latents, config.rollout.decode_batch)
        with self.timer.phase("sync"):
            images = images.cpu()
            self._flush()
        with self.timer.phase("reward"):
            scores = self._score(images, [chosen[layout.prompts[i]] for i in layout.sample_prompt])
        with self.timer.phase("sync"):
            rewards, valid, components = self._gather(scores, layout)
        advantages = compute_advantages(rewards, valid, config.rollout.group_size, self.weights, config.advantage)
        with self.timer.phase("update"):
            result = self.updater.run(
                plan, trajectory, conditioning, advantages.values, advantages.valid & self._worth(advantages), iteration
            )
        self.iteration += 1
        metrics = self._metrics(rewards, valid, components, advantages)
        self._pending = (iteration, metrics, _packed(result), self.timer.lap())

    def _worth(self, advantages: Advantages) -> np.ndarray:
        """Samples of groups that are trained: all of them with a KL term, else those with any spread."""
        flat = advantages.zero_spread.repeat(self.config.rollout.group_size)
        return ~flat if self.config.objective.kl_weight == 0 else np.ones_like(flat)

    def _score(self, images: Tensor, prompts: list[Prompt]) -> dict[str, Scores]:
        """Scores of every reward. One that raises has failed for these samples; they are masked, never invented."""
        scores = {}
        for name, reward in self.rewards.items():
            try:
                scores[name] = reward.score(images, prompts)
            except Exception as error:
                self.progress.note(
                    f"reward '{name}' failed for {len(prompts)} samples: {type(error).__name__}: {error}"
                )
                scores[name] = Scores(np.zeros(len(prompts)), np.zeros(len(prompts), dtype=bool))
        return scores

    def _gather(
        self, scores: dict[str, Scores], layout: Layout
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Every rank's scores in the order of the global samples: values, valid [R, N] and components [N]."""
        names = [(name, component) for name in scores for component in sorted(scores[name].components)]
        rows = [scores[name].values for name in scores] + [scores[name].valid for name in scores]
        rows += [scores[name].components[component] for name, component in names]
        mine = np.concatenate([np.stack(rows).astype(np.float64).reshape(-1), [float(self.stopping)]])
        everyone = self.world.gather(mine)
        # A signal that reached one rank stops them all, at the same iteration.
        self.stopping = bool(everyone[:, -1].any())
        table = np.empty((len(rows), self.samples))
        for rank, vector in enumerate(everyone):
            owned = rank_samples(self.samples, self.config.update.optimizer_steps, self.world.size, rank).reshape(-1)
            table[:, np.sort(owned)] = vector[:-1].reshape(len(rows), -1)
        count = len(scores)
        values, valid = table[:count], table[count : 2 * count] > 0
        if not valid.all(axis=0).any():
            raise UserError(f"rewards: no sample of iteration {self.iteration} could be scored; see the messages above")
        return values, valid, {f"{name}.{component}": table[2 * count + i] for i, (name, component) in enumerate(names)}

    def _metrics(
        self, rewards: np.ndarray, valid: np.ndarray, components: dict[str, np.ndarray], advantages: Advantages
    ) -> dict[str, float]:
        ok = valid.all(axis=0)
        total = (self.weights[:, None] * rewards)[:, ok].sum(axis=0)
        groups = total.reshape(-1, self.config.rollout.group_size) if ok.all() else total[None]
        per_reward = {
            f"reward/{name}": float(r[v].mean()) for name, r, v in zip(self.rewards, rewards, valid, strict=True)
        }
        return {
            "reward/mean": float(total.mean()),
            "reward/std": float(groups.std(axis=1).mean()),
            **per_reward,
            **{f"reward/{name}": float(values[ok].mean()) for name, values in components.items()},
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
        score = sum(spec.weight * summary["rewards"][spec.name] for spec in self.config.rewards)
        if score > self.best[1]:
            self.best = (self.iteration, score)
            if self.iteration and self.iteration % (self.config.checkpoint.every or 1):
                self._save()
        if self.world.main:
            grid = record(result, self.dir, self.iteration, self.config.eval.grid)
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
            self.store.save(self.iteration, training_tensors(self.optimizer), state)
            self.store.prune(self.config.checkpoint.keep, self.best[0])

    @contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """Times what is not part of an iteration; logged with the next one, outside its total."""
        begin = time.perf_counter()
        yield
        self._apart[name] = self._apart.get(name, 0.0) + time.perf_counter() - begin

    def _restore(self, iteration: int) -> None:
        state = self.store.state(iteration)
        with torch.no_grad():
            self.store.load(iteration, training_tensors(self.optimizer))
        self.iteration, self.optimizer.steps = state["iteration"], state["optimizer_steps"]
        self.train_seconds = state["train_seconds"]
        if state["best_iteration"] is not None:
            self.best = (state["best_iteration"], state["best_score"])

    def _claim_directory(self) -> int | None:
        """The iteration to continue from, or None to start; writes the resolved config. Raises UserError."""
        resume, there = self.config.run.resume, self.store.iterations()
        if resume is True and not there:
            raise UserError(f"run.resume: {self.dir} holds no checkpoint to continue; drop run.resume to start anew")
        used = (self.dir / "config.yaml").exists()
        if resume is False and used:
            raise UserError(
                f"run.dir: {self.dir} already holds a run; continue it with run.resume=true, or name another"
            )
        if used and there:
            self._compare(yaml.safe_load((self.dir / "config.yaml").read_text()))
        self.world.barrier()
        if self.world.main:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                (self.dir / "config.yaml").write_text(dump(self.config), encoding="utf-8")
            except OSError as error:
                raise UserError(f"run.dir: cannot write to {self.dir}: {error.strerror}") from None
        self.world.barrier()
        return there[-1] if there and resume is not False else None

    def _compare(self, before: dict[str, Any]) -> None:
        now = self.config.model_dump(mode="json")
        for key in FIXED:
            old: Any = before
            new: Any = now
            for part in key.split("."):
                old, new = old.get(part), new.get(part)
            if old != new:
                raise UserError(
                    f"run.resume: {key} differs from the run in {self.dir} ({_difference(old, new)}); "
                    "put it back, or start anew in another run.dir"
                )

    def _prepare_weights(self) -> None:
        torch.manual_seed(self.config.run.seed)
        family, model = self.family, self.config.model
        self._frozen = None
        if model.lora:
            family.add_lora()
        else:
            if self.config.objective.kl_weight:
                self._frozen = copy.deepcopy(family.transformer).to(family.dtype)
            family.transformer.requires_grad_(True)
        checkpoint_activations(family.blocks(), model.activation_checkpointing)
        shard(family.transformer, family.blocks(), self.world, model.dtype)

    def _reference(self) -> Any:
        """What gives the KL's reference transformer: a frozen copy, or the model with its LoRA switched off."""
        if not self.config.objective.kl_weight:
            return None
        return self._without_lora if self._frozen is None else lambda: nullcontext(self._frozen)

    @contextmanager
    def _without_lora(self) -> Iterator[nn.Module | None]:
        with self.family.lora_disabled():
            yield None


def _difference(old: Any, new: Any) -> str:
    """The first setting of a section that differs, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"{old!r} then, {new!r} now"


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


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """A first SIGINT or SIGTERM asks for a checkpoint and an end; a second one is taken as it is."""

    def ask(number: int, _frame: Any) -> None:
        trainer.stopping = True
        signal.signal(number, before[signal.Signals(number)])
        trainer.progress.note("stopping after this iteration, with a checkpoint; once more to stop at once")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, ask)
    except ValueError:
        # Not the main thread (a notebook, a server): signals stay as they are.
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: Config) -> None:
    """A whole run from a config; what `fastgrpo train` does."""
    Trainer(config).run()
