"""Why a run's reward does not rise: findings over its metrics, evaluations and config, `fastgrpo doctor RUN`.

Each is a plain function of what `read_run` returns. Thresholds are calibrated on the runs of bench/doctor_runs.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgrpo.algorithms.guard import moved
from fastgrpo.algorithms.objectives import OBJECTIVES
from fastgrpo.commands.doctor import clip_range
from fastgrpo.commands.report.run_data import RunData, paired_interval, read_run, values_of
from fastgrpo.config import Config, validate
from fastgrpo.config.schema import Optimizer
from fastgrpo.evaluation.statistics import mean_interval
from fastgrpo.models import family_class

# Iterations whose rollouts are the base model's own.
FIRST = 1
# Before so many iterations nothing is said of why a score does not rise.
EARLY = 8
# Of the spread of held-out scores: a policy whose samples' scores change by less stands still.
STILL = 0.1
# An update of fewer prompts follows them alone, and their mean says little of all.
FEW = 4


@dataclass(frozen=True)
class Finding:
    """What was found wrong. name: its kind; number and threshold: in words; change: what to do about it."""

    name: str
    number: str
    threshold: str
    change: str


@dataclass(frozen=True)
class Evidence:
    """What the functions below ask of a run.

    config: Of the run. base, last: the trained score of each held-out sample that has one in both, at iteration 0 and
    in the latest evaluation; empty without two evaluations. retest: the correlation of the scores of two consecutive
    evaluations, the highest; NaN without two.
    """

    run: RunData
    config: Config
    base: np.ndarray
    last: np.ndarray
    retest: float

    @staticmethod
    def of(run: RunData) -> Evidence:
        config = validate(run.config)
        scores = [_trained_score(evaluation, config) for evaluation in run.evaluations]
        paired = len(scores) > 1 and len({len(score) for score in scores}) == 1 and len(scores[0]) > 1
        base, last = (scores[0], scores[-1]) if paired else (np.zeros(0), np.zeros(0))
        known = np.isfinite(base) & np.isfinite(last)
        base, last = (base[known], last[known]) if known.sum() > 1 else (np.zeros(0), np.zeros(0))
        retests = [_correlation(a, b) for a, b in itertools.pairwise(scores)] if paired else []
        return Evidence(run, config, base, last, max(retests, default=math.nan))

    def mean(self, metric: str, first: int | None = None) -> float:
        """Of a metric over the (first) iterations that have it; NaN where none has."""
        values = self.run.series(metric)[1][:first]
        return float(np.mean(values)) if values else math.nan

    @property
    def done(self) -> int:
        """Iterations behind what is known of the score: the latest evaluation, or the rollouts."""
        return self.run.evaluations[-1]["iteration"] if len(self.base) else self.run.metrics[-1]["iteration"] + 1

    @property
    def interval(self) -> tuple[float, float]:
        """Of the held-out gain, 95%; NaN without two evaluations."""
        return mean_interval(self.last - self.base) if len(self.base) else (math.nan, math.nan)

    @property
    def spread(self) -> float:
        """The standard deviation of the base's held-out scores."""
        return float(np.std(self.base)) if len(self.base) else math.nan

    @property
    def change(self) -> float:
        """The mean change of a held-out sample's score, up or down, in units of `spread`."""
        if not len(self.base):
            return math.nan
        return float(np.mean(np.abs(self.last - self.base)) / max(self.spread, 1e-12))

    @property
    def noisy(self) -> bool:
        """Whether the rollouts have stochastic steps: those of a forward process have none without shared_noise."""
        return not self.config.objective.forward or self.config.rollout.shared_noise

    @property
    def rises(self) -> bool:
        """Whether the held-out gain's interval is above 0; without evaluations, the reward of the rollouts is asked:
        whether its last quarter is three standard errors above its first."""
        if len(self.base):
            return self.interval[0] > 0
        _, rewards = self.run.series("reward/mean")
        quarter = len(rewards) // 4
        return quarter > 1 and moved(np.array(rewards[:quarter]), np.array(rewards[-quarter:])) > 3


def diagnose(directory: Path) -> tuple[str, list[Finding]]:
    """What a run's held-out score did, in a line, and the findings, the likeliest cause first."""
    evidence = Evidence.of(read_run(directory))
    return outcome(evidence), findings(evidence)


def explain(directory: Path) -> bool:
    """Prints what a run's score did and what was found; whether nothing was."""
    said, found = diagnose(directory)
    print(f"{directory}: {said}")
    for finding in found:
        print(f"{finding.name}: {finding.number} ({finding.threshold})\n  {finding.change}")
    if not found:
        print("nothing found that would keep a reward from rising")
    return not found


def findings(evidence: Evidence) -> list[Finding]:
    """Those that hold of every run; and of one that does not rise, though it had time to, what keeps it from rising."""
    asked = ALWAYS if evidence.rises or evidence.done < EARLY else (*ALWAYS, *WHERE_NOTHING_RISES)
    return [finding for ask in asked for finding in ask(evidence)]


def outcome(evidence: Evidence) -> str:
    """What the trained score did."""
    early = f"; too early to say why (before iteration {EARLY})" if evidence.done < EARLY and not evidence.rises else ""
    after = f"after {evidence.done} iteration{'s' * (evidence.done != 1)}"
    if not len(evidence.base):
        verb = "rises" if evidence.rises else "does not rise"
        return f"{after} the reward of the rollouts {verb}{early}; no held-out evaluations to compare"
    low, high = evidence.interval
    verb = "rises" if low > 0 else "falls" if high < 0 else "does not rise measurably"
    gain = float(np.mean(evidence.last - evidence.base))
    return (
        f"{after} the held-out score {verb}: {gain:+.3f}, 95% interval {low:+.3f} … {high:+.3f}, "
        f"{len(evidence.base)} samples{early}"
    )


def _ratio(e: Evidence) -> Iterator[Finding]:
    worst = max(e.run.series("ratio/first_max_deviation")[1][: _on_policy(e.config)], default=0.0)
    clip = clip_range(e.config)
    most = (clip or 0.0) / 10
    if worst > most:
        yield Finding(
            "ratio",
            f"before the first step of an update |ratio − 1| is up to {worst:.2g}",
            "exactly 0" if clip is None else f"at most {most:.2g}, a tenth of the clip range",
            "rollout and update disagree: use model.dtype=float32 and model.compile=none"
            + ("" if clip is None else ", or widen objective.clip_low and clip_high"),
        )


def _on_policy(config: Config) -> int | None:
    """Of how many first iterations the ratio is to the policy that the update starts from; None: of all."""
    objective, lora = config.objective, config.model.lora
    reference = objective.forward and OBJECTIVES.load(objective.kind, "objective.kind").against == "reference"
    if reference and lora is not None and lora.path is not None:
        return 0
    # Later an older policy rolled out, or is compared with.
    return FIRST if reference or config.scoring.staleness or not objective.old_decay.copies else None


def _failed(e: Evidence) -> Iterator[Finding]:
    rollout = e.config.rollout
    share = e.mean("samples/failed") / (rollout.prompts_per_iteration * rollout.candidates)
    if share > 0.1:
        yield Finding(
            "failed",
            f"{share:.0%} of the samples have no score",
            "at most 10%",
            f"see {e.run.directory / 'errors'} and mend the reward: a group of few scores says little",
        )


def _skipped(e: Evidence) -> Iterator[Finding]:
    share = e.mean("optimizer_steps/skipped") / e.config.update.optimizer_steps
    if share > 0.05:
        yield Finding(
            "skipped",
            f"{share:.0%} of the optimizer steps were skipped, their gradients not being finite",
            "at most 5%",
            "use model.dtype=bfloat16 or float32, or lower update.optimizer.lr",
        )


def _judges(e: Evidence) -> Iterator[Finding]:
    if not len(e.base) or not e.rises:
        return
    first, last = e.run.evaluations[0], e.run.evaluations[-1]
    for name in e.run.watched:
        interval = paired_interval(first, last, name)
        if interval is not None and interval[1] < 0:
            yield Finding(
                "judges",
                f"the held-out judge {name} fell by {interval[0]:+.3f} … {interval[1]:+.3f} (95%) while the trained "
                "score rose",
                "its interval not below 0",
                "the trained reward is being hacked: train on both, set objective.kl_weight, or guard.action=stop",
            )


def _reward_noise(e: Evidence) -> Iterator[Finding]:
    # A policy that falls apart changes all scores too, and lowers them.
    if e.retest < 0.2 and np.mean(e.base - e.last) < e.spread / 2:
        yield Finding(
            "reward_noise",
            f"the scores of the same held-out prompts and noise correlate by {e.retest:.2f} from one evaluation to the "
            "next",
            "at least 0.2",
            "the reward's noise is larger than its spread: average several answers of it, or use larger groups",
        )


def _few_prompts(e: Evidence) -> Iterator[Finding]:
    groups = e.config.rollout.prompts_per_iteration * (1 - _known(e.mean("groups/zero_spread")))
    if e.config.rollout.prompts_per_iteration < FEW:
        yield Finding(
            "few_prompts",
            f"an update learns from {groups:.1f} prompts' groups",
            f"at least {FEW}",
            "raise rollout.prompts_per_iteration: what one prompt teaches, the next one's update undoes",
        )


def _flat_groups(e: Evidence) -> Iterator[Finding]:
    flat = e.mean("groups/zero_spread")
    if flat > 0.5:
        yield Finding(
            "flat_groups",
            f"in {flat:.0%} of the groups all samples have one score",
            "at most 50%",
            "they teach nothing: use a reward with more than two values, prompts.select=spread, prompts that the model "
            f"gets right sometimes, a larger rollout.group_size{' or rollout.eta' if e.noisy else ''}",
        )


def _eta_high(e: Evidence) -> Iterator[Finding]:
    if not e.noisy or not e.spread > 0 or e.config.rollout.prompts_per_iteration < FEW:
        return
    below = (float(np.mean(e.base)) - e.mean("reward/mean", FIRST)) / e.spread
    if below > 0.5:
        yield Finding(
            "eta_high",
            f"the base's rollouts score {below:.2f} standard deviations less than samples without noise",
            "at most 0.5",
            f"the noise breaks the samples: lower rollout.eta ({e.config.rollout.eta:g}), or give rollout.steps more",
        )


def _eta_low(e: Evidence) -> Iterator[Finding]:
    if not e.noisy or not e.spread > 0 or e.config.rollout.prompts_per_iteration < FEW:
        return
    share = e.mean("reward/std", FIRST) / e.spread
    if share < 0.05:
        yield Finding(
            "eta_low",
            f"the scores of a group of the base spread {share:.1%} as far as those of all held-out samples",
            "at least 5%",
            f"the trained steps hardly change a sample: raise rollout.eta ({e.config.rollout.eta:g}), or train an "
            "earlier step",
        )


def _untrained_spread(e: Evidence) -> Iterator[Finding]:
    rollout = e.config.rollout
    # A forward process trains final samples, whatever they began from.
    if e.noisy and not rollout.shared_noise and rollout.trained.kind == "window":
        yield Finding(
            "untrained_spread",
            f"each sample of a group begins from a noise of its own, and {rollout.trained.size} of {rollout.steps} "
            "steps are trained",
            "one initial noise a group",
            "set rollout.shared_noise=true: most of the group's spread is the initial noise's, which no step learns",
        )


def _guidance(e: Evidence) -> Iterator[Finding]:
    trained, evaluated = e.config.model.guidance, e.config.evaluated_model.guidance
    if trained != evaluated:
        yield Finding(
            "guidance",
            f"trained at guidance {trained:g} and evaluated at {evaluated:g}",
            "the same",
            "set eval.guidance=null: what is learned at one guidance is not what is drawn at another",
        )
        return
    family = family_class(e.config.model.family)
    if family.guides(e.config.model):
        scale, setting = family.branch_scale(e.config.model), family.branch_setting()
        yield Finding(
            "guidance",
            f"trained with classifier-free guidance {scale:g}",
            f"{family.unguided_scale:g} is none",
            f"try model.{setting}={family.unguided_scale:g}: the model learns to do in one forward what guidance adds, "
            "which is most of the gain",
        )


def _clipped(e: Evidence) -> Iterator[Finding]:
    share = e.mean("clip_fraction")
    if share > 0.3:
        yield Finding(
            "clip",
            f"{share:.0%} of the pairs are clipped, in {e.config.update.optimizer_steps} optimizer steps a rollout",
            "at most 30%",
            "lower update.optimizer.lr or update.optimizer_steps, or widen objective.clip_low and clip_high",
        )


def _kl(e: Evidence) -> Iterator[Finding]:
    weight = e.config.objective.kl_weight
    share = weight * e.mean("kl") / max(e.mean("reward/std"), 1e-12)
    if weight > 0 and share > 1:
        yield Finding(
            "kl",
            f"the KL term is {share:.2g} times the spread of a group's rewards",
            "at most 1",
            f"lower objective.kl_weight ({weight:g}): the update goes back to the reference, not to the reward",
        )


def _nothing_moves(e: Evidence) -> Iterator[Finding]:
    """Held-out samples hardly change: whichever setting holds them."""
    if not e.change < STILL:
        return
    number = f"a held-out score changed by {e.change:.1%} of its spread"
    update = e.config.update
    left = remaining_base(e.config, e.done)
    if e.config.eval.ema and left > 0.5:
        yield Finding(
            "ema",
            f"{number}, and the EMA that is evaluated still is {left:.0%} of the base",
            "at most 50%",
            f"lower update.ema_decay ({update.ema_decay:g}), or evaluate later, or with eval.ema=false",
        )
    elif e.config.objective.kl_weight > 0:
        yield Finding(
            "kl",
            f"{number}, with objective.kl_weight {e.config.objective.kl_weight:g}",
            "at least 10%",
            "lower objective.kl_weight: it holds the policy at the base model",
        )
    else:
        yield Finding(
            "rate_low",
            f"{number} in {e.done} iterations at update.optimizer.lr {update.optimizer.lr}",
            "at least 10%",
            f"raise {_rate(update.optimizer, 3, 10)}, or train longer",
        )


def _rate_high(e: Evidence) -> Iterator[Finding]:
    # What hardly moved has not fallen for moving too far.
    if e.interval[1] < 0 and not e.change < STILL:
        change = f"{e.interval[0]:+.3f} … {e.interval[1]:+.3f}"
        yield Finding(
            "rate_high",
            f"the held-out score fell by {change} (95%), a sample's by {e.change:.0%} of their spread up or down",
            "its interval not below 0",
            f"lower {_rate(e.config.update.optimizer, 3, 10)}, or add update.optimizer.warmup",
        )


def _rate(optimizer: Optimizer, low: int, high: int) -> str:
    """What to multiply or divide, for a rate that changes by a factor of low to high."""
    if optimizer.lr == "auto":
        return f"update.optimizer.travel ({optimizer.travel:g}) by {low} to {high}"
    return f"update.optimizer.lr ({optimizer.lr:g}) by {low} to {high}"


ALWAYS: Sequence[Callable[[Evidence], Iterator[Finding]]] = (_ratio, _failed, _skipped, _judges)
WHERE_NOTHING_RISES: Sequence[Callable[[Evidence], Iterator[Finding]]] = (
    _reward_noise, _few_prompts, _flat_groups, _eta_high, _eta_low, _untrained_spread, _guidance, _clipped, _kl,
    _nothing_moves, _rate_high,
)  # fmt: skip


def remaining_base(config: Config, iterations: int) -> float:
    """How much of the EMA after so many iterations still is the base's weights; 0 without an EMA."""
    update = config.update
    if update.ema_decay is None:
        return 0.0
    count = np.arange(iterations * (update.optimizer_steps if update.ema_per == "optimizer_step" else 1)) + 1.0
    decay = np.minimum(update.ema_decay, (1 + count) / (10 + count)) if update.ema_warmup else update.ema_decay
    return float(np.prod(np.broadcast_to(decay, count.shape)))


def _trained_score(evaluation: dict, config: Config) -> np.ndarray:
    """The weighted sum of the trained rewards of each held-out sample; NaN where one failed or was not asked."""
    parts = [spec.weight * values_of(evaluation, spec.key) for spec in config.scored if spec.weight]
    return np.sum(parts, axis=0) if parts and all(map(len, parts)) else np.zeros(0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where either does not vary."""
    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 3 or a[known].std() == 0 or b[known].std() == 0:
        return math.nan
    return float(np.corrcoef(a[known], b[known])[0, 1])


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value
