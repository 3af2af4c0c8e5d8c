"""The command line: `fastgrpo --help`. Modules that import torch are imported by the command that needs them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from fastgrpo import __version__
from fastgrpo.distributed.signals import stop_listening
from fastgrpo.errors import EXTRAS, REQUEUE, ConfigError, PreemptedError, UserError, missing, require_extra
from fastgrpo.observe.quiet import quiet_libraries

app = typer.Typer(
    help="GRPO for visual generators: diffusion models and rectified flows, images and video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastgrpo {__version__}")
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What all commands share; the help is the application's."""


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as those of configs/.")]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="Settings of the config, such as run.dir=runs/mine.")
]

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Checkpoint = Annotated[str, typer.Option(help="latest, best, or an iteration.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is wrong, all at once, and the arithmetic.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to assume in --check; else what the config's name says.")
    ] = None,
) -> None:
    """Train from a config. Ctrl-C leaves a checkpoint that run.resume=true continues.

    So do SIGTERM and SIGUSR1, with exit code 75: start the same command again.
    """
    if not check:
        # Before torch is imported, which takes a while.
        from fastgrpo.distributed.signals import listen

        listen()
    require_extra("train", "fastgrpo train")
    if check:
        from fastgrpo.commands.check import check as preflight

        raise typer.Exit(0 if preflight(config, overrides or (), ranks) else 2)
    from fastgrpo.commands.train import train as run
    from fastgrpo.config import load_config

    run(load_config(config, overrides or ()))


Rewards = Annotated[
    list[str] | None, typer.Option("--reward", help="A reward: name, name=path, or a .yaml list; else the config's.")
]


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run directory, or a config: its base model.")],
    images: Annotated[int, typer.Option(min=2, help="Images of each model.")] = 480,
    checkpoint: Checkpoint = "latest",
    prompts: Annotated[str | None, typer.Option(help="A file, shapes:heldout, set:geneval …; else held-out.")] = None,
    reward: Rewards = None,
    samples: Annotated[int, typer.Option(min=1, help="Images of one prompt: shows diversity within it.")] = 1,
    embedding: Annotated[str, typer.Option(help="The CLIP that measures diversity.")] = "shapes:clip",
    out: Annotated[Path | None, typer.Option(help="Directory of the results.")] = None,
) -> None:
    """Evaluate a run beside its base model, or a base model: same prompts, same initial noise, no sampling noise."""
    require_extra("train", "fastgrpo eval")
    from rich.console import Console

    from fastgrpo.commands.evaluate import Request, evaluate_target

    console = Console(stderr=True)
    request = Request(images, checkpoint, prompts, reward or (), samples, embedding, out)
    with console.status(f"drawing {images} images with each model"):
        summary = evaluate_target(
            target, request, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
        )
    _print_comparison(summary)


@app.command()
def sample(
    run: RunDir,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="Prompts, or one file of them.")],
    out: Annotated[Path, typer.Option(help="Directory of the images.")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the initial noise; else the run's.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, best, an iteration, or base.")] = "latest",
    mp4: Annotated[bool, typer.Option("--mp4", help="Videos as MP4, which needs PyAV (fastgrpo[video]).")] = False,
    best_of: Annotated[int | None, typer.Option(min=1, help="Draw so many of each prompt, write the best.")] = None,
    reward: Rewards = None,
) -> None:
    """Draw images with a run's weights, or with its base model's; with --best-of the best by a reward."""
    require_extra("train", "fastgrpo sample")
    from fastgrpo.commands.sample import sample_run

    written = sample_run(
        run, prompts, out, count=count, seed=seed, checkpoint=checkpoint, mp4=mp4, best_of=best_of,
        rewards=reward or (), note=_note,
    )  # fmt: skip
    for path in written:
        typer.echo(path)


@app.command("best-of")
def best_of_curve(
    run: RunDir,
    most: Annotated[int, typer.Option(min=2, help="Samples of each prompt: the largest N.")] = 256,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 24,
    source: Annotated[str | None, typer.Option(help="Of the prompts; else held-out.")] = None,
    reward: Rewards = None,
    checkpoint: Checkpoint = "latest",
    out: Annotated[Path | None, typer.Option(help="Directory of best-of.json and best-of.png; else the run's.")] = None,
) -> None:
    """Measure what the best of N samples scores, N = 1, 2, 4 …, for a run and its base: the first reward chooses."""
    require_extra("train", "fastgrpo best-of")
    from fastgrpo.commands.best_of import best_of_run

    result = best_of_run(run, most, prompts, source, reward or (), checkpoint, out, _note)
    for name in result["curves"]["base"]:
        for model, curves in result["curves"].items():
            means = "  ".join(f"{n}: {x:.3f}" for n, x in zip(result["sizes"], curves[name]["mean"], strict=True))
            typer.echo(f"{name}, {model}  {means}")
    typer.echo((out or run) / "best-of.png")


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    checkpoint: Checkpoint = "latest",
    merge: Annotated[bool, typer.Option("--merge", help="A LoRA run: write the whole pipeline, merged.")] = False,
    comfyui: Annotated[bool, typer.Option("--comfyui", help="A LoRA also under the names that ComfyUI reads.")] = False,
) -> None:
    """Write what diffusers loads: a LoRA or a pipeline directory, with a model card."""
    require_extra("train", "fastgrpo export")
    from fastgrpo.commands.export import export_run

    typer.echo(export_run(run, out, checkpoint=checkpoint, merge=merge, comfyui=comfyui))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; else report.html in the first run.")] = None,
) -> None:
    """Write a self-contained HTML report: curves, time by phase, images before and after, the config."""
    require_extra("train", "fastgrpo report")
    from fastgrpo.commands.report import write_report

    typer.echo(write_report(runs, out))


@app.command()
def watch(
    run: RunDir,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the loopback interface; 0: any free one.")] = 8008,
) -> None:
    """Serve the report of a run that goes on, on this machine alone; it is made again every minute."""
    require_extra("train", "fastgrpo watch")
    from fastgrpo.commands.watch import watch as serve

    serve(run, port, _note)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200, b200, mi300x, rtx4090 or rtx5090.")] = "h100",
    world: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 8,
    node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node; else 8, or all where fewer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    scaling: Annotated[
        str | None, typer.Option(help="Plan the same samples on several numbers of GPUs, such as 8,16,…,512.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Of --scaling, a PNG.")] = None,
) -> None:
    """Say whether a config fits, and what an iteration costs, by running the trainer on fake tensors: no GPU, no
    weights."""
    require_extra("train", "fastgrpo plan")
    import json

    from fastgrpo.config import load_config
    from fastgrpo.planning import plan as planning
    from fastgrpo.planning.gpus import gpu_named

    resolved, device = load_config(config, overrides or ()), gpu_named(gpu)
    if scaling is not None:
        from fastgrpo.planning import scaling as planned

        curve = planned.scaling(resolved, device, planned.sizes_of(scaling), node or 8, _note)
        typer.echo(json.dumps(planned.as_json(curve), indent=1) if as_json else planned.as_markdown(curve))
        if picture is not None:
            planned.draw(curve, picture)
        return
    found = planning.plan(resolved, device, world, node)
    fit = None if found.fits else planning.nearest_fit(found, lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(planning.as_json(found, fit), indent=1) if as_json else planning.as_text(found, fit))
    if not found.fits:
        raise typer.Exit(1)


@app.command("plan-table")
def plan_table(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="CONFIG…", help="Configs named …-<n>x<gpu>.yaml, or a folder of them.")
    ],
) -> None:
    """Plan recipes on the hardware that their names say, as a Markdown table, a line as soon as it is known."""
    require_extra("train", "fastgrpo plan-table")
    from fastgrpo.planning import plan as planning

    paths = [path for given in recipes for path in (planning.recipes_in(given) if given.is_dir() else [given])]
    for path in paths:
        planning.recipe_hardware(path)
    for line in planning.TABLE_HEAD:
        typer.echo(line)
    for path in paths:
        typer.echo(planning.table_row(path))
        sys.stdout.flush()


@app.command()
def assets(
    config: ConfigPath,
    overrides: Overrides = None,
    get: Annotated[bool, typer.Option("--download", help="Get what is missing and on the hub.")] = False,
) -> None:
    """List what a config needs: model, rewards and prompts, where they are, their sizes, and what is missing.

    Exit code 2 where something is.
    """
    require_extra("train", "fastgrpo assets")
    from fastgrpo.commands.assets import assets as listed
    from fastgrpo.config import load_config

    lines, missing = listed(load_config(config, overrides or ()), get, _note)
    typer.echo("\n".join(lines))
    for line in missing:
        print(f"missing: {line.replace('assets CONFIG', f'assets {config}')}", file=sys.stderr)
    if missing:
        raise typer.Exit(2)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    recipe: Annotated[
        Path | None, typer.Option("--from", help="A config to take model and sizes from; else the embedded FLUX.")
    ] = None,
) -> None:
    """Write a config, a reward of your own and prompts to begin from, and a script that loads the result."""
    require_extra("train", "fastgrpo new")
    from fastgrpo.commands.new import new as written

    for path in written(folder, recipe):
        typer.echo(path)
    typer.echo(
        f"\nNext: fastgrpo reward-test {quote(f'{folder}/reward.py:warmth')}\n"
        f"      fastgrpo train {quote(f'{folder}/config.yaml')} --check\n"
        f"      fastgrpo train {quote(f'{folder}/config.yaml')}\n      python {quote(f'{folder}/draw.py')}"
    )


@app.command("config")
def show_config(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A section or setting; else all of them.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, for editors.")] = False,
) -> None:
    """Print what a setting is, what it takes and its default; without KEY the whole reference, as Markdown."""
    from fastgrpo.config import reference

    text = reference.as_schema() if schema else reference.as_markdown() if key is None else reference.as_text(key)
    typer.echo(text, nl=not text.endswith("\n"))


@app.command("reward-test")
def reward_test(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A reward, module:Class, file.py:Class, or a .yaml file.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="Its settings, such as path=… or options.scale=2.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples to score.")] = 4,
    prompts: Annotated[str | None, typer.Option(help="A file, shapes:heldout …; else the samples' own.")] = None,
    images: Annotated[str | None, typer.Option(help="A folder of pictures; else scenes of coloured shapes.")] = None,
    video: Annotated[bool, typer.Option("--video", help="Score videos.")] = False,
) -> None:
    """Score a few samples with a reward and print what it says; where it fails, the traceback goes to a file."""
    require_extra("train", "fastgrpo reward-test")
    from fastgrpo.commands.reward_test import a_few_samples, shown, specs_of, try_reward

    samples, texts = a_few_samples(count, prompts, images, video)
    for spec in specs_of(name, settings or ()):
        scores, seconds = try_reward(spec, samples, texts, _note)
        typer.echo("\n".join(shown(spec, scores, texts, seconds)))


@app.command("convert-reward")
def convert_reward(
    source: Annotated[Path, typer.Argument(help="A .pt, .pth or .bin file of weights, or VideoAlign's template.")],
    out: Annotated[Path, typer.Argument(help="A new .safetensors file; of a template, a .txt file.")],
) -> None:
    """Write published reward weights that are a pickle archive as safetensors; docs/rewards.md says which."""
    require_extra("rewards", "fastgrpo convert-reward")
    from fastgrpo.rewards.convert import convert_template, convert_weights

    typer.echo((convert_template if source.suffix == ".py" else convert_weights)(source, out))


@app.command("serve-rewards")
def serve_rewards(config: ConfigPath, overrides: Overrides = None) -> None:
    """Serve rewards over HTTP to trainers elsewhere (their reward `remote`)."""
    require_extra("serve", "fastgrpo serve-rewards")
    from fastgrpo.config.sections import load_settings
    from fastgrpo.rewards.served.service import ServiceConfig, serve

    serve(load_settings(ServiceConfig, config, overrides or ()))


@app.command()
def doctor(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG|RUN]", help="A config to test on policy, or a run directory to explain."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has and can do; with a config, whether its rollout and update agree; of a run, why its
    reward does not rise, with exit code 1 where something was found."""
    if target is not None:
        require_extra("train", "fastgrpo doctor CONFIG or RUN")
    if target is not None and target.is_dir():
        from fastgrpo.commands.findings import explain

        if overrides:
            raise UserError(f"'{overrides[0]}': settings are for a config, and {target} is a run directory")
        raise typer.Exit(0 if explain(target) else 1)
    from fastgrpo.commands.doctor import examine

    if not examine(target, overrides or ()):
        raise typer.Exit(1)


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train an embedded model of fastgrpo/shapes from scratch, as its shipped weights were."""
    require_extra("train", "fastgrpo pretrain")
    from fastgrpo.commands.pretrain import main as run

    typer.echo(run(config, overrides or ()))


@app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Time the kernels, and read what the compiler made of them."""
    from fastgrpo.commands.bench import app as benchmarks

    benchmarks(args=context.args, prog_name="fastgrpo bench")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _quiet() -> None:
    quiet_libraries()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default); gives the exit code: 2 for what the user can mend,
    75 (REQUEUE) for a run that a signal ended after its checkpoint."""
    _quiet()
    try:
        _command()(args=None if arguments is None else list(arguments), prog_name="fastgrpo")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except PreemptedError as end:
        if os.environ.get("RANK", "0") == "0":
            print(end, file=sys.stderr)
        return REQUEUE
    except UserError as error:
        _complain(error)
    except Exception as error:
        if (line := _line(error)) is None:
            raise
        _complain(UserError(line))
        if _lost_rank(error):
            sys.stderr.flush()
            # Tearing the process group down would wait for the rank that is gone.
            os._exit(1)
    else:
        return 0
    finally:
        if arguments is not None:
            # Called from Python: what comes after this command is not its run.
            stop_listening()
    return 2


def _line(error: Exception) -> str | None:
    """What a library's error means to a user; None where only its traceback says it."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return str(missing(package)) if package in EXTRAS else None
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror
    if _lost_rank(error):
        said = str(error).partition(". ")[0]
        return f"another rank ended, or was silent for parallel.timeout; its own message says why: {said}"
    if "torch" not in sys.modules:
        return None
    from fastgrpo.models.failures import component_failure

    return component_failure(error)


def _lost_rank(error: Exception) -> bool:
    """Whether a collective failed: gloo's errors have no class of their own."""
    if not isinstance(error, RuntimeError):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return os.environ.get("WORLD_SIZE", "1") != "1" and bool(kinds & {"DistError"} or "gloo" in str(error))


def _complain(error: UserError) -> None:
    """One line on stderr. All ranks read the same config, and one says so; what else fails may fail on one only."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not isinstance(error, ConfigError):
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr)


def _print_comparison(summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastgrpo.evaluation.compare import table

    head, rows = table(summary)
    trained = f", iteration {summary['iteration']}" if "iteration" in summary else ""
    title = f"{summary['base']['images']} images{trained}; intervals of 95%"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    # 80 columns hold all of it with short heads.
    short = {"difference": "diff", "95% interval": "interval", "win rate": "wins"}
    for place, column in enumerate(head):
        # A reward that is named by its file has a long name, which leaves the numbers their columns.
        shown.add_column(
            short.get(column, column), justify="right" if place else "left", no_wrap=place > 0, overflow="fold"
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console()
    console.print(shown)
    typer.echo(f"written to {summary['directory']}: summary.json, table.md, final/")
