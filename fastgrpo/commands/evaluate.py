"""`fastgrpo eval`: a run beside its base model, or a base model alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrpo import __version__
from fastgrpo.commands.runs import apply_checkpoint, choose_rewards, make_results, open_run
from fastgrpo.config import RewardSpec, load_config
from fastgrpo.distributed.world import World
from fastgrpo.errors import MissingError
from fastgrpo.evaluation.compare import STRICT, compared, diversity, fair_sample, marks, table
from fastgrpo.evaluation.heldout import Evaluation, evaluate, heldout_prompts, record
from fastgrpo.evaluation.statistics import by_unit, mean_interval
from fastgrpo.models import load_family
from fastgrpo.observe.media import beside_sources
from fastgrpo.observe.side_by_side import Labels, write_side_by_side
from fastgrpo.rewards import Reward, load_reward
from fastgrpo.rewards.clip import ClipReward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import describe_samples


@dataclass(frozen=True)
class Request:
    """What to evaluate. images: of each model, of which `samples` are of one prompt; prompts: a source of load_prompts,
    None: the config's held-out; rewards: as `choose_rewards` takes them; embedding: the CLIP that measures diversity;
    out: a directory, None: the run's own for its own prompts and rewards, else `evaluations/` in it."""

    images: int = 480
    checkpoint: str = "latest"
    prompts: str | None = None
    rewards: Sequence[str] = ()
    samples: int = 1
    embedding: str = "shapes:clip"
    out: Path | None = None


def evaluate_target(target: str | Path, request: Request | None = None, note: Callable[[str], None] = print) -> dict:
    """Evaluates a config's base model, or a run directory beside its base; writes and gives the summary.

    Writes `summary.json`, `table.md`, and grids under `final/`. Of several rewards that the request names, one whose
    package or program is not installed is left out, and said. Raises UserError for what is not there.
    """
    target, request = Path(target), request or Request()
    run = target.is_dir()
    store, iteration = None, 0
    if run:
        config, store, iteration = open_run(target, request.checkpoint)
    else:
        config = load_config(target)
    out = _directory(target, run, request)
    chosen = choose_rewards(config, request.rewards)
    rewards = _judges(chosen, bool(request.rewards), note)
    specs = [spec for spec in chosen if spec.key in rewards]
    embedder = ClipReward(request.embedding)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    distinct = heldout_prompts(config, -(-request.images // request.samples), request.prompts)
    unit = np.arange(len(distinct)).repeat(request.samples)[: request.images]
    prompts = [distinct[i] for i in unit]

    make_results(out)
    family = load_family(config.model, world.device)
    failures = FailureLog(note)
    describe = partial(describe_samples, rewards, failures)
    base = evaluate(family, rewards, prompts, config, world, failures)
    shown: int | list[int] = config.eval.grid
    features = {"base": embedder.embed(base.images).double().numpy()}
    summary: dict[str, Any] = {"base": described(base, unit)}
    if store is not None:
        state = store.state(iteration)
        apply_checkpoint(family, config, store, iteration)
        tuned = evaluate(family, rewards, prompts, config, world, failures)
        shown = fair_sample(base.values, tuned.values, config.eval.grid)
        record(tuned, out / "final", iteration, shown, config.model.fps, config.eval.mp4, describe)
        features["tuned"] = embedder.embed(tuned.images).double().numpy()
        _side_by_side(base, tuned, shown, out / "final" / "side-by-side.png")
        summary |= {"tuned": described(tuned, unit), **compared(base, tuned, unit)}
        summary |= {"iteration": iteration, "train_seconds": state["train_seconds"]}
    record(base, out / "final", 0, shown, config.model.fps, config.eval.mp4, describe)
    summary["diversity"] = diversity(features, unit)
    summary |= {
        "prompts": request.prompts or config.prompts.heldout,
        "samples_per_prompt": request.samples,
        "embedding": request.embedding,
        "seed": config.run.seed,
        "versions": versions(),
    }
    _write(summary, specs, out)
    return summary | {"directory": str(out)}


def _judges(specs: Sequence[RewardSpec], optional: bool, note: Callable[[str], None]) -> dict[str, Reward]:
    """The rewards by their names. optional: those that are not installed are left out, unless none is left."""
    found: dict[str, Reward] = {}
    missing: list[MissingError] = []
    for spec in specs:
        try:
            found[spec.key] = load_reward(spec)
        except MissingError as error:
            missing.append(error)
    if missing and not (optional and found):
        raise missing[0]
    for error in missing:
        note(f"left out: {error}")
    return found


def described(evaluation: Evaluation, unit: np.ndarray) -> dict[str, Any]:
    """`Evaluation.summary` and the intervals of its means."""
    intervals = {name: mean_interval(by_unit(values, unit)) for name, values in evaluation.values.items()}
    return evaluation.summary() | {"interval95": intervals}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import diffusers
    import transformers

    return {
        "fastgrpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _directory(target: Path, run: bool, request: Request) -> Path:
    if request.out is not None:
        return request.out
    if run and request.prompts is None and not request.rewards:
        return target
    name = (request.prompts or "heldout").replace(":", "-").replace("/", "-")
    return (target if run else Path("runs") / target.stem) / "evaluations" / name


def _side_by_side(base: Evaluation, tuned: Evaluation, shown: list[int], path: Path) -> None:
    """base and tuned of each prompt next to each other, after the source of an edit, with the prompt and marks."""
    prompts = [base.prompts[i] for i in shown]
    pictures, none = {"before": base.images[shown], "after": tuned.images[shown]}, []
    wide = beside_sources(prompts, pictures["before"])
    if wide.shape[-1] > pictures["before"].shape[-1]:
        pictures, none = {"source": wide[..., : pictures["before"].shape[-1]], **pictures}, [("", None)]
    labels = [Labels(p.text, [*none, _mark(base, i), _mark(tuned, i)]) for p, i in zip(prompts, shown, strict=True)]
    write_side_by_side(pictures, labels, path)


def _mark(evaluation: Evaluation, place: int) -> tuple[str, bool | None]:
    """What is said under a picture, and whether it is right where that is known."""
    said = marks(evaluation.values, place)
    if said and said[0][0].endswith(STRICT):
        right = all(value >= 0.5 for _, value in said)
        return "✓" if right else "✗", right
    return ", ".join(f"{value:.2f}" for _, value in said), None


def _write(summary: dict[str, Any], specs: Sequence[RewardSpec], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    summary["scored_by"] = [spec.model_dump(mode="json") for spec in specs]
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    head, rows = table(summary)
    lines = [head, ["---"] * len(head), *rows]
    (out / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
