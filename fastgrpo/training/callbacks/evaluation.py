"""Held-out evaluation every so many iterations, and which one was best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastgrpo.data.prompts import Prompt
from fastgrpo.evaluation.heldout import evaluate, record
from fastgrpo.rewards.scoring import describe_samples
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class EvaluationCallback(Callback):
    """Draws and scores held-out prompts before the first iteration and after every `eval.every`.

    With `eval.every: 0` it never does, but keeps what a resumed run had.

    `history` has a row for each evaluation: iteration, score (the weighted sum of the trained rewards' means), rewards.
    """

    name = "evaluation"

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)
        self.history: list[dict[str, Any]] = []

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the highest score, the first of equal ones; one that could not be scored (NaN) is none."""
        scored = [row for row in self.history if not math.isnan(row["score"])]
        return max(scored, key=lambda row: row["score"], default=None)

    def on_start(self, trainer: Trainer) -> None:
        if trainer.iteration == 0 and trainer.config.eval.every:
            self.evaluate(trainer)

    def after_iteration(self, trainer: Trainer) -> None:
        every = trainer.config.eval.every
        if every and trainer.iteration % every == 0:
            self.evaluate(trainer)

    def evaluate(self, trainer: Trainer) -> None:
        """Evaluates the weights as they are (their EMA with eval.ema), and records it."""
        config, iteration = trainer.config, trainer.iteration
        trainer.flush()
        with trainer.iterations.outside("eval", iteration), trainer.optimizer.averaged(config.eval.ema):
            result = evaluate(trainer.family, trainer.rewards, self.prompts, config, trainer.world, trainer.failures)
        summary = result.summary()
        # A watched reward that fails (NaN) says nothing of the score.
        score = sum(spec.weight * summary["rewards"][spec.key] for spec in config.scored if spec.weight)
        self.history.append({"iteration": iteration, "score": score, "rewards": summary["rewards"]})
        trainer.log.event("heldout", iteration, score=score, rewards=summary["rewards"])
        if trainer.log.directory is not None:
            describe = partial(describe_samples, trainer.rewards, trainer.failures)
            eval_, fps = config.eval, config.model.fps
            sheet = record(result, trainer.log.directory, iteration, eval_.grid, fps, eval_.mp4, describe)
            trainer.log.images(iteration, "heldout", sheet, [p.text for p in result.prompts[: config.eval.grid]])
        strict = "" if summary["strict_pass"] is None else f", strict pass {summary['strict_pass']:.1%}"
        if trainer.world.main:
            trainer.note(f"iteration {iteration}: held-out reward {score:.3f}{strict}")
        # An evaluation takes a while: signals that came during it stop the run here.
        trainer.stop.agree(trainer.world, trainer.halted)

    def state(self) -> dict[str, Any]:
        best = self.best
        return {"best_iteration": None if best is None else best["iteration"], "history": self.history}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.history = list(state["history"])
