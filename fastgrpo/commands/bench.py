"""`fastgrpo bench …`: the command line of the checkout's bench/ folder, which no wheel carries."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fastgrpo.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "bench"
_PACKAGE = "fastgrpo_bench"

app = typer.Typer(
    help="What the compiler made of the kernels, how fast they and whole iterations are here, what a run survives.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def benchmarks() -> None:
    """What the compiler made of the kernels, how fast they and whole iterations are here, what a run survives."""


def load(module: str) -> ModuleType:
    """A module of the checkout's bench/ folder, as fastgrpo_bench.<module>: the folder never lands on sys.path."""
    _load_package(FOLDER)
    return importlib.import_module(f"{_PACKAGE}.{module}")


@cache
def _load_package(folder: Path) -> None:
    """The folder as the package fastgrpo_bench, once."""
    init = folder / "__init__.py"
    if not init.exists():
        raise UserError(
            "fastgrpo bench: no wheel carries it; clone the repository and pip install -e ./kernels -e '.[dev]' there"
        )
    spec = importlib.util.spec_from_file_location(_PACKAGE, init, submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)


@app.command()
def static(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, sm_120 or gfx942; else all.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="A case of bench/static_cases.py; else all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; else all.")] = None,
    write: Annotated[bool, typer.Option(help="Put the rows into bench/data/static.csv.")] = True,
) -> None:
    """Compile every kernel ahead of time, without a GPU: registers, spills, widths, bytes, roofline."""
    load("static").run(target, case, dtype, write=write)


Ops = Annotated[list[str] | None, typer.Option("--op", help="step, log_prob, loss or on_policy; else all.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", help="sd, flux, hunyuan or skyreels; else all.")]
Repeats = Annotated[int, typer.Option(min=3, help="Timed runs of each.")]


@app.command()
def kernels(
    op: Ops = None,
    shape: Shapes = None,
    provider: Annotated[list[str] | None, typer.Option(help="ours, eager or compile; else all.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="no_grad, forward, backward or full; else all.")] = None,
    repeats: Repeats = 20,
) -> None:
    """Time the operations on this device, and their peak memory, beside PyTorch as trainers write it."""
    load("kernels").run(op, shape, provider, mode, repeats)


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="The git ref to compare with.")],
    op: Ops = None,
    shape: Shapes = None,
    repeats: Repeats = 20,
) -> None:
    """Time our kernels as they are at a git ref, and as they are in this tree."""
    load("kernels").compare(base, op, shape, repeats)


Models = Annotated[list[str] | None, typer.Option("--model", help="flux, wan …; else all families.")]


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; none: the suite.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE…")] = None,
    model: Models = None,
    size: Annotated[str, typer.Option(help="tiny, or real: the real configuration, random weights, a GPU.")] = "tiny",
    sweep: Annotated[list[str] | None, typer.Option(help="batch, steps, window, resolution … or all.")] = None,
    compare: Annotated[str | None, typer.Option(help="sequential: beside DanceGRPO's loop, at batch 1.")] = None,
    base: Annotated[str | None, typer.Option(help="A git ref, whose code is timed beside this tree's.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Timed iterations of each.")] = 3,
    write: Annotated[bool, typer.Option(help="Put the rows into bench/data, and the page into docs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time whole iterations: of every family's recipe on this device, or of a CONFIG beside the sequential baseline."""
    if compare not in (None, "sequential"):
        raise UserError(f"--compare: unknown baseline '{compare}'; (one of: sequential)")
    settings = overrides or []
    if config is not None and "=" not in config:
        result = load("sequential").compare(Path(config), settings, iterations)
        text = load("sequential").table(result)
        typer.echo(json.dumps(result, indent=1) if as_json else text)
        return
    settings = [config, *settings] if config is not None else settings
    suite = load("train")
    sweeps = list(suite.SWEEPS) if sweep == ["all"] else sweep
    if base is not None:
        rows = suite.compare(base, model, size, sweeps, settings, iterations)
    else:
        rows = suite.run(model, size, sweeps, settings, iterations, compare is not None, write)
    suite.tell(rows, as_json)


@app.command()
def planned(model: Models = None) -> None:
    """Plan the suite's real recipes for GPUs that nobody measured them on; minutes each."""
    load("planned").run(model)


@app.command()
def curves(iterations: Annotated[int, typer.Option(min=1, help="Timed iterations of each place.")] = 3) -> None:
    """What an iteration of the tiny FLUX costs against samples, steps, tokens and ranks; minutes."""
    load("curves").run(iterations)


@app.command()
def objectives(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="The recipe of all; else the demo's.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE…")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Of bench/objectives.py, such as grpo or nft.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Each runs every setting in turn; else 0.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Processor seconds of training that each setting gets.")] = 180,
    every: Annotated[float, typer.Option(min=0.001, help="Processor seconds between evaluations.")] = 30,
    images: Annotated[int, typer.Option(min=1, help="Of an evaluation.")] = 240,
    label: Annotated[str | None, typer.Option(help="What the rows call it, where a setting has other numbers.")] = None,
    write: Annotated[bool, typer.Option(help="Put rows into bench/data, picture and table into docs.")] = True,
) -> None:
    """Held-out score of each objective, and of reusing samples, against processor seconds, samples and forwards."""
    given = overrides or []
    if "=" in config:
        given, config = [config, *given], ""
    path = Path(config) if config else FOLDER.parent / "configs" / "shapes-flux.yaml"
    load("objectives").run(path, setting, seed or [0], seconds, every, images, given, label, write)


@app.command()
def stay(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="kills, signals, pairs, inputs, ranks, corruptions …")],
    count: Annotated[int | None, typer.Option(min=1, help="Trials; for ranks, iterations; for soak, seconds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the trials; for inputs, the first one's number.")] = None,
) -> None:
    """Measure what a run survives (kills, signals, corruption, other world sizes), and what staying up costs."""
    measures = load("stay").MEASURES
    if what not in measures:
        raise UserError(f"bench stay: unknown measure '{what}'; (one of: {', '.join(measures)})")
    if seed is not None and "seed" not in inspect.signature(measures[what]).parameters:
        raise UserError(f"--seed: nothing of `bench stay {what}` is random; leave it out")
    result = measures[what](*([] if count is None else [count]), **({} if seed is None else {"seed": seed}))
    typer.echo(json.dumps(result, indent=1))


@app.command()
def rewards(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="overlap, throughput, fuzz or faults.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="Iterations; for throughput, seconds; for fuzz, requests.")
    ] = None,
) -> None:
    """Measure what scoring costs an iteration, a reward server's rate, and what malice and failures do to it."""
    measures = load("rewards").MEASURES
    if what not in measures:
        raise UserError(f"bench rewards: unknown measure '{what}'; (one of: {', '.join(measures)})")
    result = measures[what](*([] if count is None else [count]))
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    app(prog_name="fastgrpo bench")
