"""What a run came to, in sentences made from its numbers; and where and when it was made."""

from __future__ import annotations

import html
import math
from typing import Any

from fastgrpo.commands.report.markup import duration, mean
from fastgrpo.commands.report.run_data import Gain, RunData


def opening(run: RunData) -> str:
    """Sentences (HTML): the model, the reward, what rose and by how much, what fell."""
    model = run.config["model"]
    lora = model.get("lora")
    what = f"a LoRA of rank {lora['rank']}" if lora else "all weights"
    rewards = " and ".join(f"<code>{html.escape(spec.key)}</code>" for spec in run.rewards if spec.weight)
    done, wanted = run.metrics[-1]["iteration"] + 1, run.config["train"]["iterations"]
    said = [
        f"Training changed {what} of <b>{html.escape(str(model['path']))}</b> for the reward {rewards}, in {done} "
        + ("iterations." if done >= wanted else f"of {wanted} iterations.")
    ]
    gains = run.gains()
    if not gains:
        before, after = training_ends(run)
        said.append(
            f"No held-out prompts were evaluated twice, so nothing says what it learned beyond its own rollouts: their "
            f"mean reward went from {before:.3f} to {after:.3f}."
        )
        return " ".join(said)
    said.append(f"On {gains[0].images} {run.noun} of held-out prompts (never trained on), {_changes(gains)}")
    said += [f"<code>{html.escape(spec.key)}</code> gave no score." for spec in run.rewards if _silent(run, spec.key)]
    said.append(_diversity(run))
    fell = [gain.name for gain in gains if gain.direction < 0]
    if not fell and gains[0].interval is not None:
        said.append("No reward that was measured fell.")
    return " ".join(filter(None, said))


def _silent(run: RunData, name: str) -> bool:
    """Whether a reward scored no sample of the last evaluation."""
    ends = run.ends()
    return ends is not None and math.isnan(ends[1]["rewards"].get(name, 0.0))


def _changes(gains: list[Gain]) -> str:
    parts = [_change(gain) for gain in gains]
    text = "; ".join(parts) + "."
    if all(gain.interval is None for gain in gains):
        text += " No interval: the evaluations did not keep the score of each sample."
    return text


def _change(gain: Gain) -> str:
    name = f"<code>{html.escape(gain.name)}</code>"
    if gain.strict:
        name = f"the share that is exactly right ({name})"
    verb = {1: "rose", -1: "fell", 0: "did not change measurably:"}[gain.direction]
    scale, style, unit = (100, "{:.1f}%", " points") if gain.strict else (1, "{:.3f}", "")
    ends = f"from {style.format(scale * gain.before)} to {style.format(scale * gain.after)}"
    difference = scale * (gain.after - gain.before)
    digits = 1 if gain.strict else 3
    by = f"{difference:+.{digits}f}{unit}"
    if gain.interval is not None:
        low, high = (scale * bound for bound in gain.interval)
        by += f", 95% interval {low:+.{digits}f} … {high:+.{digits}f}"
    return f"{name} {verb} {ends} (<b>{by}</b>)"


def _diversity(run: RunData) -> str:
    """What the closing evaluation says of the spread of samples, which a collapse lowers."""
    spread = (run.summary or {}).get("diversity") or {}
    change = (spread.get("difference") or {}).get("overall")
    if change is None:
        return ""
    low, high = change["interval95"]
    direction = int(low > 0) - int(high < 0)
    verb = {1: "rose", -1: "fell", 0: "did not change measurably:"}[direction]
    old, new = spread["overall"]["base"], spread["overall"]["tuned"]
    return (
        f"Diversity (the mean distance between {run.noun} in a CLIP) {verb} from {old:.3f} to {new:.3f} "
        f"({change['mean']:+.3f}, 95% interval {low:+.3f} … {high:+.3f})."
    )


def training_ends(run: RunData) -> tuple[float, float]:
    """The mean reward of the rollouts in the first and the last tenth of the run."""
    _, rewards = run.series("reward/mean")
    tenth = max(1, len(rewards) // 10)
    return mean(rewards[:tenth]), mean(rewards[-tenth:])


def provenance(run: RunData) -> str:
    """Where the numbers come from (HTML): date, hours, commit, machine, versions, seed."""
    starts = [event for event in run.events if event["event"] == "start"]
    first: dict[str, Any] = starts[0] if starts else {}
    last: dict[str, Any] = starts[-1] if starts else {}
    summary = run.summary or {}
    seed = run.config.get("run", {}).get("seed", summary.get("seed"))
    versions = (last.get("versions") or {}) | (summary.get("versions") or {})
    resumed = f", resumed {len(starts) - 1} times" if len(starts) > 1 else ""
    facts = {
        "trained": f"{first['time'][:16].replace('T', ' ')} UTC" if first else "the run's events do not say when",
        "took": f"{duration(run.seconds)} of iterations{resumed}",
        "commit": last.get("commit") or "not known: not a git checkout, or an older run",
        "machine": f"{last['ranks']} × {last['machine']}" if "machine" in last else versions.get("device", "not known"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if name != "device"),
        "seed": str(seed),
    }
    if (digits := facts["commit"]).endswith("+"):
        facts["commit"] = f"{digits[:-1]}, with changes that are not in it"
    items = "".join(f"<div><dt>{key}</dt><dd>{html.escape(text)}</dd></div>" for key, text in facts.items() if text)
    return f'<dl class="facts">{items}</dl>'
