"""Settings: what loads, what is refused and in which words, and a thousand mutations of a config."""

import copy
import json
import random
import re
from pathlib import Path

import pytest
import yaml

from fastgrpo.commands.main import main
from fastgrpo.config import Config, SubsetSteps, dump, load_config, validate
from fastgrpo.config.sections import load_settings
from fastgrpo.config.yaml import parse_yaml
from fastgrpo.errors import ConfigError, nearest_sizes

ROOT = Path(__file__).parents[2]

MINIMAL = {
    "model": {"family": "flux", "path": "shapes:flux"},
    "prompts": {"train": "shapes:train", "heldout": "shapes:heldout"},
    "rewards": [{"name": "shapes"}],
}
FULL = {
    **MINIMAL,
    "run": {"dir": "runs/x", "seed": 3, "resume": "auto"},
    "model": {
        "family": "flux",
        "path": "shapes:flux",
        "dtype": "float32",
        "height": 32,
        "width": 32,
        "lora": {"rank": 4, "targets": ["to_q"]},
        "activation_checkpointing": 2,
    },
    "rollout": {
        "prompts_per_iteration": 8,
        "group_size": 12,
        "steps": 10,
        "shift": 3.0,
        "trained": {"kind": "window", "size": 2, "move": "progressive"},
        "eta": 0.5,
    },
    "rewards": [{"name": "shapes", "label": None, "weight": 1.0, "path": None, "when": {}, "options": {}}],
    "update": {"optimizer_steps": 2, "optimizer": {"lr": 3e-5, "warmup": 2}, "ema_decay": 0.9},
    "train": {"iterations": 5},
    "eval": {"every": 2, "images": 16},
}


@pytest.fixture
def error_of(tmp_path):
    """The message, without the file's name, that a config text and overrides are refused with."""

    def error_of(text: str, *overrides: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.removeprefix(str(path)).removeprefix(": ")

    return error_of


def test_a_resolved_config_reads_back_equal(tmp_path):
    awkward = copy.deepcopy(FULL)
    awkward["run"]["dir"] = "1e5"
    awkward["prompts"]["train"] = "off"
    awkward["rewards"][0]["options"] = {"a": "010", "b": "1:30", "c": "null", "d": ["~", "2024-01-01", 1e-7, None, "é"]}
    for data in (MINIMAL, FULL, awkward):
        config = validate(data)
        (tmp_path / "resolved.yaml").write_text(dump(config), encoding="utf-8")
        assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5e3", -500.0),
        ("1.", 1.0),
        ("1_000", 1000),
        ("-3", -3),
        ("010", "010"),
        ("off", "off"),
        ("no", "no"),
        ("True", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("", None),
        ("~", None),
    ],
)
def test_yaml_values_are_what_people_mean(text, value):
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_overrides_reach_sections_lists_and_what_is_not_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    config = load_config(
        tmp_path / "c.yaml",
        [
            "update.optimizer.lr=1e-4",
            "rewards.0.weight=0.5",
            "rewards.0.options.strict=true",
            "model.lora.rank=8",
            "run.dir=a=b",
            'model.lora.targets=["to_q", "to_k"]',
            "rollout.trained={kind: subset, fraction: 0.5}",
        ],
    )
    assert config.update.optimizer.lr == 1e-4
    assert config.rewards[0].weight == 0.5
    assert config.rewards[0].options == {"strict": True}
    assert config.model.lora is not None
    assert config.model.lora.targets == ["to_q", "to_k"]
    assert config.model.lora.rank == 8
    assert config.run.dir == "a=b"
    assert config.rollout.trained == SubsetSteps(fraction=0.5)


SAYS = {
    "rollout.group_sise=4": "rollout.group_sise: unknown setting; did you mean 'group_size'? (one of: antithetic, "
    "best_of, …",
    "trian.iterations=3": "trian: unknown setting; did you mean 'train'? (one of: advantage, callbacks, …",
    "rollout.trained.frac=0.5": "rollout.trained.frac: unknown setting; (one of: every, kind, move, size, …",
    "rewards.0.wieght=1": "rewards.0.wieght: unknown setting; did you mean 'weight'? (one of: every, label, name, "
    "options, path, weight, when)",
    "model.lora.rnk=1": "model.lora.rnk: unknown setting; did you mean 'rank'? (one of: alpha, path, rank, targets)",
    "rollout.sampler=dancesde": "rollout.sampler: 'dancesde' is not valid; did you mean 'dance_sde'? it should be "
    "'dance_sde', 'flow_sde', 'cps' or 'ddim'",
    "rollout.shift=abc": "rollout.shift: 'abc' is not valid; it should be a number or 'pipeline'",
    "rollout.shift=-1": "rollout.shift: -1 is not valid; it should be above 0 or 'pipeline'",
    "rollout.shift=Pipline": "rollout.shift: 'Pipline' is not valid; did you mean 'pipeline'? it should be a number or "
    "'pipeline'",
    "rollout.trained=3": "rollout.trained: 3 is not valid; it should be a section",
    "rollout.trained={size: 3}": "rollout.trained.kind: this setting is required (one of: window, subset)",
    "rollout.trained.kind=windw": "rollout.trained.kind: 'windw' is not valid; did you mean 'window'? it should be "
    "'window' or 'subset'",
    "rollout.trained.size=0": "rollout.trained.size: 0 is not valid; it should be at least 1",
    "rollout.steps=4.5": "rollout.steps: 4.5 is not valid; it should be a whole number",
    "rollout.steps='8'": "rollout.steps: '8' is not valid; it should be a whole number",
    "rollout.shared_noise=yes": "rollout.shared_noise: 'yes' is not valid; it should be true or false",
    "rollout.shared_noise=1": "rollout.shared_noise: 1 is not valid; it should be true or false",
    "run.resume=always": "run.resume: 'always' is not valid; it should be true or false or 'auto'",
    "run.seed=-1": "run.seed: -1 is not valid; it should be at least 0",
    "run.dir=": "run.dir: null is not valid; it should be text",
    "run.dir=''": "run.dir: '' is not valid; it should be text that is not empty",
    "update.optimizer.lr=.nan": "update.optimizer.lr: nan is not valid; it should be a finite number or 'auto'",
    "update.optimizer=adam": "update.optimizer: 'adam' is not valid; it should be a section",
    "update.ema_decay=1": "update.ema_decay: 1 is not valid; it should be below 1",
    "model.lora=true": "model.lora: true is not valid; it should be a section",
    "model.lora.targets.0=": "model.lora.targets.0: null is not valid; it should be text",
    "model.activation_checkpointing=some": "model.activation_checkpointing: 'some' is not valid; it should be 'none', "
    "'selective', 'all', 'auto' or a whole number",
    "update.lr=1e-5": "update.lr: unknown setting; did you mean 'update.optimizer.lr'? (one of: ema_decay, …",
    "lr=1e-5": "lr: unknown setting; did you mean 'update.optimizer.lr'? (one of: advantage, …",
    "train.learning_rate=1": "train.learning_rate: unknown setting; did you mean 'update.optimizer.lr'? (one of: …",
    "update.kl_weigth=1": "update.kl_weigth: unknown setting; did you mean 'objective.kl_weight'? (one of: …",
    "model.group_size=4": "model.group_size: unknown setting; did you mean 'rollout.group_size'? (one of: …",
    "train.steps=4": "train.steps: unknown setting; did you mean 'rollout.steps' or 'eval.steps'? (one of: …",
    "rewards.0.kind=x": "rewards.0.kind: unknown setting; did you mean …",
    "rewards=[]": "rewards: [] is not valid; it should be a list of at least 1",
    "rewards=shapes": "rewards: 'shapes' is not valid; it should be a list",
    "rewards.1.name=x": "rewards.1.name: '1' is not an index of a list of 1, which counts from 0",
    "rewards.0.options={1: 2}": "rewards.0.options.1: 1 is not valid; it should be text",
    "rewards=[{name: a}, {name: a}]": "rewards: 'a' is named twice; give its weights as one, or each a label",
    "rewards.0.label=mean": "rewards: reward/mean is the metric of all trained rewards together; give 'mean' another "
    "label",
    "rewards.0.weight=0": "rewards: every weight is 0, so nothing would be learned; give one a weight",
    "run.dir.x=3": "run.dir.x: 'run.dir' is text, not a section",
    "train.iterations": "'train.iterations': an override is written key.sub=value, such as train.iterations=10",
    ".x=1": "'.x=1': an override is written key.sub=value, such as train.iterations=10",
    "run.seed={": "run.seed, line 1: not valid YAML: expected the node content, but found '<stream end>'",
    "update.optimizer_steps=5": "update.optimizer_steps: 5 does not divide the 96 samples of an iteration "
    "(rollout.prompts_per_iteration × rollout.group_size)",
    "rollout.trained.start=8": "rollout.trained: the window of 2 from step 8 reaches the last of 10 transitions, which "
    "is never trained; start + size must be at most 9",
    "rollout.trained.stop=1": "rollout.trained.stop: 1 should be from 2 (start + size) to 9 (the last of 10 "
    "transitions, which is never trained)",
    "model.trainable=[to_v]": "model.trainable: chooses among full weights, and model.lora trains none; drop one "
    "of them",
    "prompts.heldout=": "eval.every: needs prompts.heldout; give held-out prompts, or set eval.every to 0",
}


@pytest.mark.parametrize("override", SAYS)
def test_an_unusable_setting_is_named_with_what_is_allowed(error_of, override):
    message = error_of(yaml.safe_dump(FULL), override)
    # The longest lists of settings are not spelt out here.
    expected = SAYS[override].removesuffix(" …")
    assert message[: len(expected) if SAYS[override].endswith(" …") else None] == expected


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(error_of):
    data = copy.deepcopy(FULL)
    data["model"]["famly"] = data["model"].pop("family")
    assert error_of(json.dumps(data)).startswith("model.famly: unknown setting; did you mean 'family'?")


def test_every_problem_is_there_the_first_in_the_message(error_of, tmp_path):
    overrides = ["model.famly=x", "rollout.steps=0", "update.lr=1", "rollout.shift=abc", "rewards.0.weight=x"]
    first = error_of(yaml.safe_dump(FULL), *overrides)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", overrides)
    problems = caught.value.problems
    assert problems[0] == first
    assert [p.partition(":")[0] for p in problems] == [
        "model.famly", "update.lr", "rollout.steps", "rollout.shift", "rewards.0.weight"
    ]  # fmt: skip
    # Combinations too, once each setting is valid by itself.
    overrides = ["rollout.best_of=3", "update.optimizer_steps=5", "prompts.heldout=", "rewards.0.weight=0"]
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", overrides)
    assert [p.partition(":")[0] for p in caught.value.problems] == [
        "rollout.best_of", "update.optimizer_steps", "update.optimizer_steps", "eval.every", "rewards"
    ]  # fmt: skip


def test_an_override_is_taken_whole(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    config = load_config(
        tmp_path / "c.yaml",
        ["model.negative_prompt=blurry #1, low # quality", "run.dir=#x", 'prompts.train="a #b.txt"', "run.seed=3"],
    )
    assert config.model.negative_prompt == "blurry #1, low # quality"
    assert (config.run.dir, config.prompts.train, config.run.seed) == ("#x", "a #b.txt", 3)


def test_home_directories_are_expanded_wherever_a_path_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    keys = ["run.dir", "model.path", "model.embedding_cache", "prompts.train", "prompts.heldout", "rewards.0.path"]
    config = load_config("~/c.yaml", [f"{key}=~/x/{i}" for i, key in enumerate(keys)])
    found = [config.run.dir, config.model.path, config.model.embedding_cache, config.prompts.train]
    assert [*found, config.prompts.heldout, config.rewards[0].path] == [str(tmp_path / "x" / str(i)) for i in range(6)]


@pytest.mark.parametrize(
    "size, step, first, said",
    [(47, 8, 0, "is 48"), (41, 8, 0, "is 40"), (44, 8, 0, "are 40 and 48"), (3, 8, 0, "is 8"), (2, 4, 1, "is 1"),
     (7, 4, 1, "are 5 and 9"), (80, 4, 1, "is 81")],
)  # fmt: skip
def test_the_nearest_size_is_the_nearest(size, step, first, said):
    assert nearest_sizes(size, step, first) == f"the nearest {said}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: [1", ", line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2", ", line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("run: {seed: 1}\nrun: {seed: 2}", "run: given twice (line 2)"),
        ("- 1", "a config should be a mapping of sections, not a list"),
        ("", "a config should be a mapping of sections, not empty"),
        ("!!python/object:os.system x", ", line 1: not valid YAML: could not determine a constructor for the tag"),
        ("run: {}", "model: this setting is required"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_line(error_of, text, expected):
    assert error_of(text).startswith(expected)


def test_a_missing_file_gets_its_nearest_match(tmp_path):
    (tmp_path / "shapes-flux.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"No such file or directory; did you mean 'shapes-flux\.yaml'\?$"):
        load_config(tmp_path / "shape-flux.yaml")
    with pytest.raises(ConfigError, match="cannot read the config: Is a directory"):
        load_config(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_the_recipes_load(path):
    if path.name.startswith("pretrain-"):
        from fastgrpo.commands.pretrain.clip import ClipConfig
        from fastgrpo.commands.pretrain.recipe import PretrainConfig

        kind = ClipConfig if "clip" in path.name else PretrainConfig
        assert isinstance(load_settings(kind, path), kind)
    else:
        assert isinstance(load_config(path), Config)


def mutate(data: dict, rng: random.Random) -> None:
    """Changes one place of plain data: drops, misspells, replaces, nests or duplicates."""
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(data)
    if not places:
        return
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    odd = [None, True, False, 0, -1, 1, 2, 3.5, 1e-300, 1e300, 10**400, float("inf"), float("nan"), "", "x", "window"]
    odd += ["auto", "all", "è\n\u2028", "a" * 500, [], {}, [1], {"kind": "subset"}, {"kind": ["x"]}, {1: 2}, {None: 1}]
    odd += ["shapes:train", "shapes:nope", "nope.txt", "/", "nope:Class", "flux", 2**31, 2**63, -0.0]
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict) and isinstance(key, str) and key:
        at = rng.randrange(len(key))
        node[key[:at] + rng.choice("abc_. ") + key[at + 1 :]] = node.pop(key)
    elif kind == 2:
        node[key] = {str(key): node[key]}
    elif kind == 3 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = node[key] * rng.choice([-1, 0, 2, 10, 0.5])
    else:
        node[key] = copy.deepcopy(rng.choice(odd))


def mangle(text: str, rng: random.Random) -> str:
    """Changes some characters of a text."""
    characters = list(text)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(characters))
        characters[at] = rng.choice(["", "\t", ":", "{", "&a ", "*a", "!", "-", "\n", "'", '"', "%", "\x00", "é", "? "])
    return "".join(characters)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_mutated_configs_are_each_valid_or_one_clear_line(tmp_path, capsys, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    path = tmp_path / "config.yaml"
    outcomes = {0: 0, 2: 0}
    for number in range(count):
        data = copy.deepcopy(FULL)
        overrides = []
        for _ in range(rng.choice([0, 1, 1, 2])):
            mutate(data, rng)
        text = yaml.safe_dump(data, sort_keys=False)
        if rng.random() < 0.2:
            text = mangle(text, rng)
        if rng.random() < 0.2:
            overrides = [mangle(rng.choice([*SAYS, "train.iterations=3", "rollout.eta=0.2"]), rng)]
        path.write_text(text, encoding="utf-8")
        code = main(["train", str(path), "--check", "--", *overrides])
        printed = capsys.readouterr()
        outcomes[code] += 1
        if code == 2:
            what = f"mutation {number}: {printed.err!r}"
            assert re.fullmatch(r"((error|warning): [^\n]+\n)*error: [^\n]+\n", printed.err), what
            assert "Traceback" not in printed.err, what
            assert "pydantic" not in printed.err, what
            assert "constrained" not in printed.err, what
            assert max(map(len, printed.err.splitlines())) < 900, what
        else:
            assert "optimizer steps" in printed.out
    assert outcomes[0] > count / 10
    assert outcomes[2] > count / 2, outcomes
