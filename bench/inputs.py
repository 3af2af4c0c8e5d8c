"""Inputs as users bring them, damaged at random: each gives one line, or a right run, and never a traceback.

Reward modules (source and what `score` returns), prompt files and their pictures, pipeline directories, and scheduler
configs. A trial follows from its number, so that one can be made again.

fastgrpo bench stay inputs --count 1000
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgrpo.config import RewardSpec, validate
from fastgrpo.data.prompts import Prompt, load_prompts, open_pictures
from fastgrpo.errors import UserError
from fastgrpo.models import load_family
from fastgrpo.models.failures import component_failure
from fastgrpo.models.loading import levels_of, resolve_path
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import score_samples

SAMPLES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(f"a red circle {i}", metadata={"category": "x", "n": i}) for i in range(4)]

REWARD = """import math
import numpy as np
import torch
from fastgrpo.rewards import Scores

class Mine:
    def __init__(self{options}):
        self.seen = []

    def score(self, {arguments}):
        values = samples.flatten(1).mean(1)
        n = len(prompts)
        {line}
        return {result}

def plain({arguments}):
    values, n = samples.flatten(1).mean(1), len(prompts)
    {line}
    return {result}
"""
RESULTS = (
    "values", "values.tolist()", "values.bfloat16()", "values[:, None]", "values.numpy()", "Scores(values)", "None",
    "Scores(values, valid=values > 0.4)", "values[:2]", "values.mean()", "samples", "'good'", "{'score': values}",
    "(values, {})", "[None] * n", "['x'] * n", "[[1.0]] * n", "[float('nan')] * n", "[10 ** 400] * n", "range(n)",
    "(v for v in values)", "values.to(torch.complex64)", "values.to_sparse()", "np.array(['a'] * n)", "float('inf')",
    "Scores(values, components={'a': [1.0]})", "Scores(values, components={'a': values, 3: values})", "object()",
    "Scores(values, components=None)", "Scores(None)", "Scores(values, valid=None, asked=torch.zeros(n))", "Scores()",
    "np.full(n, np.datetime64('2024-01-01'))", "[torch.tensor(1.0)] * n", "torch.empty(0)", "[]", "[True] * n", "self",
    "values.to('meta')", "Mine", "[{}] * n", "np.ma.masked_array(values.numpy(), mask=True)",
    "torch.quantize_per_tensor"
    "(values, 0.1, 0, torch.quint8)",
)  # fmt: skip
LINES = (
    "pass", "samples.zero_()", "samples.numpy()[:] = 7", "prompts.clear()", "prompts[0].metadata.clear()", "1 / 0",
    "raise SystemExit(3)", "raise KeyError", "exit()", "assert False", "import no_such_module", "samples.resize_(1)",
    "raise Exception('a\\nb')",
    "torch.set_grad_enabled(False)", "del samples, prompts", "values = values * torch.ones((), requires_grad=True)",
    "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})", "raise RuntimeError('é' * 5000)", "n = -1",
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "raise StopIteration", "raise MemoryError",
)  # fmt: skip
ARGUMENTS = (
    "samples, prompts, fps", "samples, prompts, fps=None", "*a", "samples, prompts", "samples, prompts, *, fps",
    "samples, prompts, fps, more", "images", "samples, prompts, fps, **k", "",
)  # fmt: skip


PIECES = (b"\r", b"\n", b"\0", b'"', b",", b"{", b"\xff\xfe", b"\\ud800", b"\t")


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Damages some bytes: flips, cuts, doubles, inserts."""
    for _ in range(rng.randrange(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.randrange(1, 9) :]
        elif kind == 3:
            data = data[:at] + rng.choice(PIECES) + data[at:]
        else:
            data = data + data[at:]
    return data


def reward_module(rng: random.Random, folder: Path) -> None:
    text = REWARD.format(
        options=rng.choice(["", "", ", scale=1.0", ", needed"]), line=rng.choice(LINES), result=rng.choice(RESULTS),
        arguments=ARGUMENTS[0] if rng.random() < 0.7 else rng.choice(ARGUMENTS),
    )  # fmt: skip
    path = folder / f"reward_{rng.getrandbits(60)}.py"
    path.write_bytes(spoil(text.encode(), rng) if rng.random() < 0.3 else text.encode())
    name = rng.choice(["Mine"] * 5 + ["plain"] * 5 + ["mine", ""])
    reward = load_reward(RewardSpec(name=f"{path}:{name}", options=rng.choice([{}] * 8 + [{"scale": 2.0}, {"a": []}])))
    lines: list[str] = []
    samples = SAMPLES.clone()
    scores = score_samples({"mine": reward}, samples, PROMPTS, None, FailureLog(lines.append, folder))["mine"]
    assert scores.values.shape == scores.valid.shape == (4,)
    assert np.isfinite(scores.values).all()
    assert torch.equal(samples, SAMPLES)
    assert all(line and "\n" not in line for line in lines)
    assert lines or scores.valid.any() or not scores.counted.any()


def prompt_file(rng: random.Random, folder: Path) -> None:
    picture = folder / "first.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    rows = [{"prompt": f"a red circle {i}", "negative_prompt": "blur", "tag": i} for i in range(4)]
    rows[1]["image"] = "first.png"
    odd = [None, 3, "", [], {}, "a\ud800", "x" * 300_000, True, 1e400, ["a", "b"], " ", "a\u2028b", "\0", -0.0]
    for _ in range(rng.randrange(3)):
        rows[rng.randrange(4)][rng.choice(["prompt", "negative_prompt", "image", "tag", "Prompt", ""])] = rng.choice(
            odd
        )
    kind, end = rng.choice(["txt", "jsonl", "csv"]), rng.choice(["\n", "\r\n", "\r"])
    if kind == "txt":
        text = end.join(str(row.get("prompt")) for row in rows)
    elif kind == "jsonl":
        text = end.join(json.dumps(row) for row in rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = end.join([",".join(names), *(",".join(f'"{row.get(n, "")}"' for n in names) for row in rows)])
    data = text.encode("utf-8", "surrogatepass")
    path = folder / f"prompts.{kind}"
    path.write_bytes(spoil(data, rng) if rng.random() < 0.6 else data)
    if rng.random() < 0.4:
        picture.write_bytes(spoil(picture.read_bytes(), rng))
    prompts = load_prompts(str(path))
    assert prompts
    assert all(p.text.strip() and p.text.encode() for p in prompts)
    sizes, problems = open_pictures(prompts)
    assert set(sizes.values()) <= {(8, 8)} or problems or sizes
    if problems:
        raise UserError(problems[0])


MODELS = ("flux", "stable_diffusion", "hunyuan_video")
SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "EDMEulerScheduler", "LCMScheduler", "PNDMScheduler", "NoSuchScheduler", "FluxPipeline",
    None, 7,
)  # fmt: skip
OPTIONS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting", "invert_sigmas",
    "shift_terminal", "shift", "prediction_type", "beta_schedule", "timestep_spacing", "beta_start",
    "rescale_betas_zero_snr", "trained_betas", "num_train_timesteps", "final_sigmas_type",
)  # fmt: skip
ODD = (None, True, False, 0, -1, 1, 2, 3.5, 1e30, float("nan"), "", "x", [], {}, [1], "karras", [None, None], 10**20)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"


def _copy(rng: random.Random, folder: Path) -> tuple[str, Path]:
    family, path = rng.choice(MODELS), folder / "model"
    shutil.copytree(resolve_path(f"shapes:{family}"), path)
    return family, path


def _edit(path: Path, rng: random.Random, times: int = 1) -> None:
    """Changes places of a JSON file: drops, replaces, misspells; or damages its bytes."""
    try:
        data = json.loads(path.read_text())
    except ValueError:
        # Damaged already.
        data = None
    if not isinstance(data, dict) or not data or rng.random() < 0.15:
        path.write_bytes(spoil(path.read_bytes(), rng))
        return
    for _ in range(times):
        key = rng.choice(list(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[key]
        elif kind == 1:
            data[key + "s"] = data.pop(key)
        else:
            data[key] = rng.choice(ODD)
        if not data:
            break
    path.write_text(json.dumps(data))


def _use(family: str, path: Path) -> None:
    """Loads the pipeline, and asks it for what every run does: its levels, a prediction, an image."""
    size = {"height": 32, "width": 32, "frames": 9 if family == "hunyuan_video" else 1, "max_sequence_length": 16}
    config = validate({
        "model": {"family": family, "path": str(path), **size}, "prompts": {"train": "shapes:train"},
        "rewards": [{"name": "shapes"}], "eval": {"every": 0},
        "rollout": {"sampler": "ddim" if family == "stable_diffusion" else "dance_sde"},
    })  # fmt: skip
    model = load_family(config.model, torch.device("cpu"))
    levels = levels_of(model, 4, "pipeline")
    with torch.no_grad():
        conditioning = model.encode([Prompt("a red circle moves right" if size["frames"] > 1 else "a red circle")])
        x = torch.zeros(1, *model.latent_shape)
        time = torch.as_tensor(np.asarray(levels.times)[:1], dtype=torch.float32)
        v = model.predict(x, time, conditioning)
        images = model.decode(x)
    assert v.shape == x.shape
    assert images.shape[1] == 3


def model_directory(rng: random.Random, folder: Path) -> None:
    family, path = _copy(rng, folder)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for _ in range(rng.randrange(1, 3)):
        file = rng.choice(files)
        kind = rng.randrange(7)
        if not file.exists():
            continue
        if kind == 0:
            file.unlink()
        elif kind == 1:
            file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size + 1)])
        elif kind == 2:
            file.write_bytes(POINTER)
        elif kind == 3:
            shutil.rmtree(file.parent) if file.parent != path else file.unlink()
        elif file.suffix == ".json" and file.read_bytes()[:1] == b"{":
            _edit(file, rng)
        else:
            file.write_bytes(spoil(file.read_bytes(), rng))
    _use(family, path)


def scheduler_config(rng: random.Random, folder: Path) -> None:
    family, path = _copy(rng, folder)
    file = path / "scheduler" / "scheduler_config.json"
    if rng.random() < 0.5:
        index = json.loads((path / "model_index.json").read_text())
        name = rng.choice(SCHEDULERS)
        index["scheduler"] = rng.choice([["diffusers", name], ["diffusers", name], [name], name])
        (path / "model_index.json").write_text(json.dumps(index))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))
    if rng.random() < 0.8:
        _edit(file, rng, rng.randrange(1, 4))
    if rng.random() < 0.5:
        try:
            data = json.loads(file.read_text())
            data[rng.choice(OPTIONS)] = rng.choice([*ODD, "linear", "v_prediction", "flow_prediction", "trailing"])
            file.write_text(json.dumps(data))
        except (ValueError, TypeError):
            pass
    _use(family, path)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "reward modules": reward_module, "prompt files": prompt_file, "model directories": model_directory,
    "scheduler configs": scheduler_config,
}  # fmt: skip


def trial(kind: str, number: int) -> str:
    """What a damaged input of a kind came to: `a line`, `a run`, or the traceback's last line."""
    rng = random.Random(f"{kind} {number}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            KINDS[kind](rng, Path(folder))
        except UserError as error:
            said = str(error)
            return "a line" if said and "\n" not in said else f"several lines: {said!r}"
        except Exception as error:
            if component_failure(error) is not None:
                return "a line"
            return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "a run"


def inputs(count: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Outcomes of `count` damaged inputs from number `seed` on, the four kinds in turn, and every traceback."""
    outcomes: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    bad = []
    for number in range(seed, seed + count):
        kind = list(KINDS)[number % len(KINDS)]
        outcome = trial(kind, number)
        if outcome not in ("a line", "a run"):
            bad.append(f"{kind} {number}: {outcome}")
            print(bad[-1], file=sys.stderr, flush=True)
            outcome = "traceback"
        outcomes[kind][outcome] += 1
    return {
        "trials": count,
        "tracebacks": len(bad),
        "outcomes": {kind: dict(c) for kind, c in outcomes.items()},
        "bad": bad,
    }
