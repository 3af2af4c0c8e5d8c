"""The rewards by name; a package adds its own by the entry point group `fastgrpo.rewards`, anyone by module:Class or
file.py:Class (fastgrpo/rewards/custom.py)."""

from __future__ import annotations

from contextlib import chdir

from pydantic import ValidationError

from fastgrpo.config import Config, RewardSpec
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.observe.tracebacks import described
from fastgrpo.registry import Registry
from fastgrpo.rewards.base import Reward, Scores, release
from fastgrpo.rewards.custom import find, make

REGISTERED = {
    "aesthetic": "fastgrpo.rewards.clip:AestheticReward",
    "clip": "fastgrpo.rewards.clip:ClipReward",
    "geneval": "fastgrpo.rewards.geneval:GenevalReward",
    "hps": "fastgrpo.rewards.clip:HPSReward",
    "hpsv3": "fastgrpo.rewards.hpsv3:HPSv3Reward",
    "image_reward": "fastgrpo.rewards.image_reward:ImageRewardReward",
    "pickscore": "fastgrpo.rewards.clip:PickScoreReward",
    "editing": "fastgrpo.rewards.editing:EditingReward",
    "preserve": "fastgrpo.rewards.editing:PreserveReward",
    "binary": "fastgrpo.rewards.binary:BinaryReward",
    "ocr": "fastgrpo.rewards.ocr:OcrReward",
    "videoalign_mq": "fastgrpo.rewards.videoalign:MotionQualityReward",
    "videoalign_ta": "fastgrpo.rewards.videoalign:TextAlignmentReward",
    "videoalign_vq": "fastgrpo.rewards.videoalign:VisualQualityReward",
    "vlm_judge": "fastgrpo.rewards.vlm_judge:VlmJudgeReward",
    "unified_reward": "fastgrpo.rewards.unified_reward:UnifiedRewardReward",
    "edit_reward": "fastgrpo.rewards.edit_reward:EditRewardReward",
    "edit_judge": "fastgrpo.rewards.vlm_judge:EditJudgeReward",
    "composite": "fastgrpo.rewards.composite:CompositeReward",
    "moving_aesthetics": "fastgrpo.rewards.moving:MovingAestheticsReward",
    "moving_motion": "fastgrpo.rewards.moving:MovingMotionReward",
    "moving_shapes": "fastgrpo.rewards.moving:MovingShapesReward",
    "remote": "fastgrpo.rewards.served.remote:RemoteReward",
    "shapes": "fastgrpo.rewards.shapes:ShapesReward",
    "tesseract": "fastgrpo.rewards.tesseract:TesseractReward",
}

__all__ = ["REGISTERED", "Reward", "Scores", "available", "load_reward", "load_rewards", "release"]


REWARDS = Registry("reward", "fastgrpo.rewards", REGISTERED, also="module:Class, or file.py:Class")


def available() -> list[str]:
    """The names that a config can use, of installed packages too."""
    return REWARDS.available()


def load_reward(spec: RewardSpec) -> Reward:
    """The reward of a config entry; weights are loaded when it first scores.

    Raises ConfigError for an unknown name, a failing import, a path that is not there or bad options; UserError for a
    package that is not installed.
    """
    found = None if ":" in spec.name else REWARDS.load(spec.name, "rewards")
    options = spec.options if spec.path is None else {"path": spec.path, **spec.options}
    try:
        with chdir("."):
            reward = make(found or find(spec.name), spec.name, options)
    except ValidationError as error:
        raise ConfigError(f"rewards.{spec.key}: {_first(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"rewards.{spec.key}: {error}") from None
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ConfigError(f"rewards.{spec.key}: cannot be made: {described(error, spec.key)}") from None
    if not spec.when:
        return reward
    from fastgrpo.rewards.composite import Routed

    return Routed(reward, spec.when)


def load_rewards(config: Config) -> dict[str, Reward]:
    """The rewards of a run by their names in logs, with scoring.timeout. Raises ConfigError, as `load_reward` does."""
    from fastgrpo.rewards.time_limit import LimitedReward

    found = {spec.key: load_reward(spec) for spec in config.scored}
    limit = config.scoring.timeout
    return found if limit is None else {name: LimitedReward(reward, name, limit) for name, reward in found.items()}


def _first(error: ValidationError) -> str:
    """The first thing that is wrong with a reward's options, in one line."""
    first = error.errors(include_url=False)[0]
    name, given = ".".join(str(part) for part in first["loc"]), f"{first.get('input')!r:.60}"
    match first["type"]:
        case "missing_argument" | "missing_keyword_only_argument" | "missing":
            return f"{name}: this setting is required"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"options.{name}: unknown option"
        case "value_error":
            return f"{name}: {first.get('ctx', {}).get('error')}"
    return f"{name}: {given} is not valid; {first['msg'][:1].lower()}{first['msg'][1:]}"
