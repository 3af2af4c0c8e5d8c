"""Evidence while a run goes on: the report, written after each held-out evaluation that has training behind it.

`callbacks: ["fastgrpo.commands.report.while_training:ReportCallback"]` in a config; the demo's has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgrpo.commands.report import write_report
from fastgrpo.commands.report.run_data import Gain, read_run
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class ReportCallback(Callback):
    """Writes report.html after every evaluation but the first, and says what has been gained, with its interval."""

    def after_iteration(self, trainer: Trainer) -> None:
        every, directory = trainer.config.eval.every, trainer.log.directory
        if directory is None or not every or trainer.iteration % every:
            return
        page = write_report(directory)
        gains = read_run(directory).gains()
        said = [f"{gain_text(gains[0])}; "] if gains else []
        ends = trainer.iteration == trainer.config.train.iterations
        trainer.note("".join([*said, f"report: {page}", "" if ends else "; training goes on"]))


def gain_text(gain: Gain) -> str:
    """'shapes.strict 52.5% → 64.2% of 120 held-out images, +11.7 points (95% interval +4.2 … +19.2)'."""
    scale, digits = (100, 1) if gain.strict else (1, 3)
    mark, unit = ("%", " points") if gain.strict else ("", "")
    before, after = (f"{scale * value:.{digits}f}{mark}" for value in (gain.before, gain.after))
    text = f"{gain.name} {before} → {after} of {gain.images} held-out samples, "
    text += f"{scale * (gain.after - gain.before):+.{digits}f}{unit}"
    if gain.interval is None:
        return text
    low, high = (scale * bound for bound in gain.interval)
    return f"{text} (95% interval {low:+.{digits}f} … {high:+.{digits}f})"
