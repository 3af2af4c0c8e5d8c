"""Training prompts of our own: `set:images`, `set:images-heldout`, `set:videos`, `set:videos-heldout`.

A grammar of phrases, drawn with a fixed seed. The texts are this project's, under its licence, and come from no data
set. Held-out prompts name subjects that no training prompt names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

Words = Sequence[str]

# Of each kind of subject: who or what, what it does or is like, and where. The last fifth of the subjects is held out.
IMAGES: Mapping[str, tuple[Words, Words, Words]] = {
    "people": (
        ("a violin maker", "a young astronaut", "an old fisherman", "a street dancer", "a pastry cook",
         "a bicycle courier", "a deep-sea diver", "a shepherd", "a chess player", "a glass blower",
         "a lighthouse keeper", "a fencing champion", "a beekeeper", "a girl with freckles", "a carpenter",
         "a marathon runner", "a potter", "a night nurse", "a puppeteer", "a mountain guide"),
        ("smiling into the camera", "lost in thought", "hard at work", "in a bright raincoat",
         "holding a small lantern", "seen from behind", "with paint on both hands", "laughing with closed eyes"),
        ("in a workshop full of tools", "on a windy pier", "at a crowded market", "in an empty theatre",
         "under a railway bridge", "in a garden after rain", "at a kitchen table", "on a rooftop at dusk"),
    ),
    "animals": (
        ("a red fox", "a barn owl", "a sleepy tabby cat", "a border collie", "a sea turtle", "a white horse",
         "a hummingbird", "a snow leopard", "a family of hedgehogs", "an octopus", "a highland cow", "a kingfisher",
         "a tree frog", "a baby elephant", "a peacock", "a grey wolf", "a harbour seal", "a chameleon", "a flamingo",
         "a mountain goat"),
        ("looking straight ahead", "shaking off water", "half hidden by leaves", "at rest", "about to leap",
         "carrying a twig", "with its reflection", "covered in frost"),
        ("in a birch forest", "beside a still pond", "on a mossy rock", "in tall summer grass", "on a snowy slope",
         "in a flooded field", "near a wooden fence", "in the last light of the day"),
    ),
    "things": (
        ("a brass telescope", "a stack of old books", "a blue teapot", "a wooden sailing boat", "a typewriter",
         "a bowl of ripe peaches", "a pocket watch", "a glass chess set", "a red bicycle", "a leather suitcase",
         "a paper lantern", "an accordion", "a ceramic robot", "a loaf of dark bread", "a pair of worn boots",
         "a kite", "a snow globe", "a copper kettle", "a harp", "a jar of buttons"),
        ("on a linen cloth", "covered in dust", "lit by one candle", "beside a green apple", "tied with string",
         "with a long shadow", "reflected in a mirror", "half unpacked"),
        ("on a window sill", "in an attic", "on a stone floor", "at the edge of the sea", "on a workbench",
         "in a sunlit library", "on a market stall", "against a plain grey wall"),
    ),
    "places": (
        ("a mountain village", "an abandoned greenhouse", "a canal lined with boats", "a desert observatory",
         "a bamboo bridge", "a railway station", "a vineyard", "a harbour town", "a stone circle", "a glass pavilion",
         "a floating market", "a rice terrace", "a snowed-in cabin", "a spiral staircase", "a tea house",
         "a lighthouse on a cliff", "an underground cistern", "a walled garden", "a salt flat", "a ferry landing"),
        ("without a single person", "hung with paper flags", "overgrown with ivy", "full of warm light",
         "seen from far above", "seen through an archway", "mirrored in water", "crowded with visitors"),
        ("at dawn", "in thick fog", "under a full moon", "after the first snow", "during a thunderstorm",
         "at noon in summer", "in autumn colours", "on a starry night"),
    ),
    "fantasy": (
        ("a clockwork dragon", "a castle on a whale's back", "a library inside a tree", "a knight made of glass",
         "a train between the clouds", "a city of mushrooms", "a fox that wears the night sky", "a giant reading a map",
         "a garden of floating islands", "a robot that grows roses", "a ship with wings", "a moon in a birdcage",
         "a door in the middle of the sea", "a mermaid clockmaker", "a paper crane the size of a house",
         "a staircase of water", "a stone giant asleep in a valley", "a phoenix of autumn leaves",
         "a lantern that holds a storm", "a bear with antlers"),
        ("waking up", "in great detail", "small and far away", "guarded by two owls", "glowing from within",
         "wrapped in mist", "half finished", "casting a strange shadow"),
        ("above an endless plain", "in a ruined temple", "in a frozen harbour", "at the end of a canyon",
         "in a child's bedroom", "over a sleeping city", "in a crystal cave", "under two suns"),
    ),
}  # fmt: skip

LOOKS = (
    "a photo of {}", "35mm photograph of {}, shallow depth of field", "oil painting of {}", "watercolour of {}",
    "pencil drawing of {}", "linocut print of {}", "anime key visual of {}", "digital concept art of {}",
    "{}, soft window light", "{}, wide shot", "{}, close-up", "isometric illustration of {}",
)  # fmt: skip

# Prompts that ask for a number, colours or a position: what rewards for composition look at.
COUNTED = ("cups", "candles", "lemons", "keys", "pigeons", "books", "bottles", "chairs", "balloons", "boats")
HELDOUT_COUNTED = ("pears", "umbrellas")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLAIN = ("cup", "book", "chair", "vase", "clock", "bicycle", "umbrella", "suitcase", "bench", "lamp")
HELDOUT_PLAIN = ("guitar", "bucket")
NUMBERS = ("two", "three", "four", "five")
RELATIONS = ("to the left of", "to the right of", "on top of", "below", "in front of", "behind")

# Of each kind of subject: who or what, and how it moves.
VIDEOS: Mapping[str, tuple[Words, Words]] = {
    "people": (
        ("a woman in a green coat", "a small child", "an old sailor", "a street musician", "a cook", "a skater",
         "a gardener", "a boy with a kite", "a ballet dancer", "a painter"),
        ("walks across a busy square", "turns around and laughs", "runs along a beach", "lifts a steaming cup",
         "climbs a narrow staircase", "opens a large umbrella"),
    ),
    "animals": (
        ("a golden retriever", "a white horse", "a red squirrel", "a sea turtle", "a grey cat", "a heron",
         "a young fox", "a young stag", "a clownfish", "a parrot"),
        ("moves slowly from left to right", "turns its head towards the camera", "stops and looks around",
         "comes closer", "rests and then gets up", "disappears behind a rock"),
    ),
    "vehicles": (
        ("a steam train", "a cable car", "a small sailing boat", "a yellow van", "a hot-air balloon",
         "a racing bicycle", "a river barge", "an old tram", "a fire engine", "a seaplane"),
        ("comes around a bend", "passes from right to left", "slows down and stops", "drives away from the camera",
         "crosses a bridge", "appears out of the fog"),
    ),
    "nature": (
        ("a field of barley", "a waterfall", "a birch forest", "a stormy sky", "a candle flame", "a pebble beach",
         "a cherry tree in blossom", "a lava stream", "a mountain lake", "a snowed-in road"),
        ("in a strong wind", "as the light fades", "in slow motion", "while fog rolls in", "after the rain",
         "under a fast moving sky"),
    ),
}  # fmt: skip

CAMERAS = ("static camera", "slow pan to the right", "slow zoom in", "the camera follows", "aerial view", "low angle")

Entry = dict[str, Any]


def _part(words: Words, heldout: bool) -> Words:
    """The last fifth of some words is held out."""
    kept = len(words) - max(1, len(words) // 5)
    return words[kept:] if heldout else words[:kept]


def _drawn(rng: np.random.Generator, texts: list[str], count: int, category: str) -> list[Entry]:
    chosen = rng.choice(len(texts), count, replace=False)
    return [{"prompt": texts[i], "category": category} for i in chosen]


def images(per_category: int = 600, heldout: bool = False) -> list[Entry]:
    """Different image prompts, `per_category` of each kind of subject and half as many of each kind of composition."""
    rng = np.random.default_rng(11 + heldout)
    entries = []
    for category, (subjects, states, places) in IMAGES.items():
        texts = [f"{who}, {state}, {place}" for who in _part(subjects, heldout) for state in states for place in places]
        looks = [
            LOOKS[i].format(text) for i, text in zip(rng.integers(len(LOOKS), size=len(texts)), texts, strict=True)
        ]
        entries += _drawn(rng, looks, per_category, category)
    counted, plain = (HELDOUT_COUNTED, HELDOUT_PLAIN) if heldout else (COUNTED, PLAIN)
    beside = (*PLAIN, *HELDOUT_PLAIN) if heldout else PLAIN
    scenes = IMAGES["things"][2]
    compositions = {
        "counting": [f"{n} {color} {things} {place}" for n in NUMBERS for color in COLORS for things in counted
                     for place in scenes],
        "colors": [f"a {color} {a} and a {other} {b}" for color in COLORS for other in COLORS if other != color
                   for a in plain for b in beside if a != b],
        "position": [f"a {a} {relation} a {b}, {place}" for a in plain for relation in RELATIONS
                     for b in beside if a != b for place in scenes],
    }  # fmt: skip
    for category, texts in compositions.items():
        right = [text.replace("a orange", "an orange").replace("a umbrella", "an umbrella") for text in texts]
        entries += _drawn(rng, right, per_category // 2, category)
    return entries


def videos(per_category: int = 150, heldout: bool = False) -> list[Entry]:
    """Different video prompts, `per_category` of each kind of subject: a subject, its motion, a camera."""
    rng = np.random.default_rng(13 + heldout)
    entries = []
    for category, (subjects, motions) in VIDEOS.items():
        texts = [f"{who} {m}, {c}" for who in _part(subjects, heldout) for m in motions for c in CAMERAS]
        entries += _drawn(rng, texts, per_category, category)
    return entries


SETS = {
    "images": images,
    "images-heldout": partial(images, 60, True),
    "videos": videos,
    "videos-heldout": partial(videos, 24, True),
}
