"""What one iteration of a config comes to: prompts, samples, pairs, micro-batches, optimizer steps."""

from __future__ import annotations

from fastgrpo.config import Config, WindowSteps


def arithmetic(config: Config, world: int = 1) -> str:
    """The table printed before anything runs, as planned: groups without spread are skipped later."""
    roll, steps = config.rollout, config.update.optimizer_steps
    samples = roll.prompts_per_iteration * roll.group_size
    drawn = roll.prompts_per_iteration * roll.candidates
    if isinstance(roll.trained, WindowSteps):
        trained, start = roll.trained.size, f"from step {roll.trained.start}"
    else:
        trained, start = int(roll.trained.fraction * roll.subset_candidates), "drawn per sample"
    pairs = rows = samples * trained
    if roll.shared_noise and roll.share_prefix and isinstance(roll.trained, WindowSteps):
        # The first stochastic step is one row a prompt, not one a sample.
        rows = samples * (trained - 1) + roll.prompts_per_iteration
    lines = [
        ("prompts", roll.prompts_per_iteration, "an iteration"),
        ("samples", drawn, f"= {roll.prompts_per_iteration} prompts × {roll.candidates} of each group"),
        *[("trained samples", samples, f"the {roll.group_size // 2} best and worst of each group")]
        * bool(roll.best_of),
        ("trained pairs", pairs, f"= {samples} samples × {trained} of {roll.steps} steps, {start}"),
        (
            "rows evaluated",
            rows,
            "with gradients" + (", the group's common step once a prompt" if rows < pairs else ""),
        ),
        ("micro-batches", -(-rows // roll.forward_batch), f"of {roll.forward_batch} rows"),
        ("optimizer steps", steps, f"of {samples // steps} samples; {steps * config.train.iterations} in the run"),
    ]
    width = max(len(name) for name, _, _ in lines)
    text = [f"{name:<{width}}  {number:>7,}  {note}" for name, number, note in lines]
    each = f"{drawn // world} samples each" if world > 1 else "all of it"
    return "\n".join([f"one iteration, {world} rank{'s' * (world > 1)} ({each}):", *text])
