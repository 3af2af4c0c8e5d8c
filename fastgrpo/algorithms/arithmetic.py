"""What one iteration of a config comes to: prompts, samples, pairs, micro-batches, optimizer steps."""

from __future__ import annotations

from fastgrpo.algorithms.objectives import forward_objective
from fastgrpo.config import Config, WindowSteps

Line = tuple[str, int, str]


def arithmetic(config: Config, world: int) -> str:
    """The table printed before anything runs; groups without spread are skipped later."""
    roll, update = config.rollout, config.update
    samples, drawn = (roll.prompts_per_iteration * size for size in (roll.group_size, roll.candidates))
    steps = update.optimizer_steps * update.epochs
    trained = forward_lines(config) if config.objective.forward else transition_lines(config)
    epochs = f"in each of {update.epochs} epochs, " if update.epochs > 1 else ""
    lines: list[Line] = [
        ("prompts", roll.prompts_per_iteration, "an iteration"),
        ("samples", drawn, f"= {roll.prompts_per_iteration} prompts × {roll.candidates} of each group"),
        *[("trained samples", samples, f"the {roll.group_size // 2} best and worst of each group")]
        * bool(roll.best_of),
        *trained,
        ("micro-batches", -(-trained[-1][1] // roll.forward_batch), f"{epochs}of {roll.forward_batch} rows"),
        (
            "optimizer steps",
            steps,
            f"of {samples // update.optimizer_steps} samples; {steps * config.train.iterations} in the run",
        ),
    ]
    width = max(len(name) for name, _, _ in lines)
    text = [f"{name:<{width}}  {number:>7,}  {note}" for name, number, note in lines]
    ranks = f"{world} ranks ({drawn // world} samples each)" if world > 1 else "1 rank"
    return "\n".join([f"One iteration on {ranks}:", *text])


def trained_samples(config: Config) -> int:
    """How many of an iteration's samples are trained, where every group has a spread."""
    group = config.rollout.group_size
    return config.rollout.prompts_per_iteration * min(config.advantage.keep or group, group)


def transition_lines(config: Config) -> list[Line]:
    """What is trained of trajectories; the last line is of rows."""
    roll, samples = config.rollout, trained_samples(config)
    if isinstance(roll.trained, WindowSteps):
        trained, start = roll.trained.size, f"from step {roll.trained.start}"
    else:
        trained, start = int(roll.trained.fraction * roll.subset_candidates), "drawn per sample"
    pairs = rows = samples * trained
    if roll.shared_noise and roll.share_prefix and isinstance(roll.trained, WindowSteps):
        # The first stochastic step is one row a prompt, not one a sample.
        rows = samples * (trained - 1) + roll.prompts_per_iteration
    note = "with gradients" + (", the group's common step once a prompt" if rows < pairs else "")
    return [
        ("trained pairs", pairs, f"= {samples} samples × {trained} of {roll.steps} steps, {start}"),
        ("rows evaluated", rows, note),
    ]


def forward_lines(config: Config) -> list[Line]:
    """What is trained of the forward process; the last line is of rows."""
    objective, draws = forward_objective(config), config.objective.times.count
    assert objective is not None
    samples, what = trained_samples(config), "samples"
    if objective.paired:
        samples = 2 * config.objective.pairs * config.rollout.prompts_per_iteration
        what = "samples of pairs"
    return [("rows evaluated", samples * draws, f"with gradients = {samples} {what} × {draws} noise levels")]
