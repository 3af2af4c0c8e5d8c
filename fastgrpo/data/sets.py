"""Ready-made prompt sets for evaluation: `set:geneval`, `set:hps`, `set:videoalign`, and VBench's own as `set:vbench`.

Those to train on are in grammar.py. VBench's are in its own package. The others are drawn by us, seeded, from the
public structure of the benchmarks' prompts: they are not the benchmarks' own files, and scores on them compare runs
with each other, not with published tables.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.data import grammar
from fastgrpo.errors import UserError

# The eighty classes of COCO, which GenEval's detector knows, with their plurals where an s is not enough.
OBJECTS = tuple(
    name.replace("_", " ")
    for name in [
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "airplane",
        "bus",
        "train",
        "truck",
        "boat",
        "traffic_light",
        "fire_hydrant",
        "stop_sign",
        "parking_meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports_ball",
        "kite",
        "baseball_bat",
        "baseball_glove",
        "skateboard",
        "surfboard",
        "tennis_racket",
        "bottle",
        "wine_glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "broccoli",
        "carrot",
        "hot_dog",
        "pizza",
        "donut",
        "cake",
        "chair",
        "couch",
        "potted_plant",
        "bed",
        "dining_table",
        "toilet",
        "tv",
        "laptop",
        "computer_mouse",
        "tv_remote",
        "computer_keyboard",
        "cell_phone",
        "microwave",
        "oven",
        "toaster",
        "sink",
        "refrigerator",
        "book",
        "clock",
        "vase",
        "scissors",
        "teddy_bear",
        "hair_drier",
        "toothbrush",
    ]
)

PLURALS = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "knife": "knives",
           "computer mouse": "computer mice", "broccoli": "broccoli", "bus": "buses", "bench": "benches",
           "couch": "couches", "sandwich": "sandwiches", "toothbrush": "toothbrushes", "wine glass": "wine glasses",
           "tv": "tvs"}  # fmt: skip

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
Entry = dict[str, Any]


def article(name: str) -> str:
    """`a dog`, `an apple`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


def geneval(per_category: int = 100) -> list[Entry]:
    """GenEval's six categories (arXiv 2310.11513): its templates, its metadata, our own draws.

    Single objects are the eighty classes once each; of the others `per_category` different prompts.
    """
    rng = np.random.default_rng(0)

    def two() -> tuple[str, str]:
        first, second = rng.choice(len(OBJECTS), 2, replace=False)
        return OBJECTS[first], OBJECTS[second]

    def tint(but: str = "") -> str:
        return str(rng.choice([color for color in COLORS if color != but]))

    def some_of(category: str, draw: Callable[[], tuple[str, list[Entry], list[Entry]]]) -> list[Entry]:
        found: dict[str, Entry] = {}
        while len(found) < per_category:
            words, include, exclude = draw()
            text = f"a photo of {words}"
            found[text] = {"prompt": text, "tag": category, "category": category, "include": include}
            if exclude:
                found[text]["exclude"] = exclude
        return list(found.values())

    def two_object() -> tuple[str, list[Entry], list[Entry]]:
        a, b = two()
        return f"{article(a)} and {article(b)}", [_thing(a), _thing(b)], []

    def counting() -> tuple[str, list[Entry], list[Entry]]:
        a, number = two()[0], int(rng.integers(2, 5))
        return f"{NUMBERS[number]} {plural(a)}", [_thing(a, number)], [_thing(a, number + 1)]

    def colors() -> tuple[str, list[Entry], list[Entry]]:
        a, color = two()[0], tint()
        return f"{article(color)} {a}", [{**_thing(a), "color": color}], []

    def position() -> tuple[str, list[Entry], list[Entry]]:
        (a, b), relation = two(), str(rng.choice(RELATIONS))
        return f"{article(a)} {relation} {article(b)}", [_thing(b), {**_thing(a), "position": [relation, 0]}], []

    def color_attr() -> tuple[str, list[Entry], list[Entry]]:
        (a, b), first = two(), tint()
        second = tint(first)
        include = [{**_thing(a), "color": first}, {**_thing(b), "color": second}]
        return f"{article(first)} {a} and {article(second)} {b}", include, []

    single = [
        {"prompt": f"a photo of {article(name)}", "tag": "single_object", "category": "single_object",
         "include": [_thing(name)]}
        for name in OBJECTS
    ]  # fmt: skip
    draws = (two_object, counting, colors, position, color_attr)
    return single + [entry for draw in draws for entry in some_of(draw.__name__, draw)]


def _thing(name: str, count: int = 1) -> Entry:
    return {"class": name, "count": count}


SUBJECTS = (
    "an old lighthouse keeper", "a girl with a red umbrella", "a fox in the snow", "a robot gardener",
    "a street market",
    "a sailing ship", "a mountain village", "a knight in worn armour", "a bowl of ripe peaches", "a black cat",
    "a floating castle", "two friends on a bench", "a desert caravan", "a jazz trumpeter", "an abandoned greenhouse",
    "a whale above a city", "a bicycle against a wall", "an astronaut", "a dancer in a yellow dress", "a forest shrine",
    "a grandmother baking bread", "a dragon asleep on books", "a wolf pack", "a rainy railway station", "a honey bee",
)  # fmt: skip

SETTINGS = (
    "at dawn", "in heavy rain", "under a full moon", "in soft window light", "at the edge of the sea",
    "in thick fog", "in the last light of the day", "after the first snow",
)  # fmt: skip

STYLES = {
    "anime": ("cel-shaded anime key visual of {}", "anime film still, {}", "hand-drawn anime background with {}"),
    "concept-art": ("digital concept art of {}", "matte painting of {}, wide shot", "game concept sheet, {}"),
    "paintings": ("oil painting of {}", "watercolour of {}", "impressionist painting of {}"),
    "photo": ("a photo of {}", "35mm photograph of {}", "close-up photograph of {}"),
}


def hps(per_style: int = 100) -> list[Entry]:
    """HPS's four styles (arXiv 2306.09341), `per_style` different prompts each."""
    rng = np.random.default_rng(1)
    entries = []
    for style, templates in STYLES.items():
        every = [f"{t.format(subject)} {place}" for t in templates for subject in SUBJECTS for place in SETTINGS]
        chosen = rng.choice(len(every), per_style, replace=False)
        entries += [{"prompt": every[i], "category": style} for i in chosen]
    return entries


ACTORS = {
    "people": ("a woman in a blue coat", "two children", "an old fisherman", "a street dancer", "a cook"),
    "animals": ("a golden retriever", "a flock of starlings", "a white horse", "a red squirrel", "a sea turtle"),
    "vehicles": ("a steam train", "a cable car", "a racing bicycle", "a small sailing boat", "a delivery van"),
    "nature": ("a waterfall", "a field of barley", "a lava stream", "a birch forest", "storm clouds"),
}

ACTIONS = {
    "people": ("walks through a crowded market", "turns around and laughs", "runs along the beach", "lifts a glass",
               "climbs a narrow staircase"),
    "animals": ("moves slowly across a meadow", "turns towards the camera", "crosses a shallow river",
                "rests and then gets up", "circles once and leaves"),
    "vehicles": ("comes around a bend", "stops at a crossing", "passes under a stone bridge", "overtakes slowly",
                 "disappears into a tunnel"),
    "nature": ("moves in a strong wind", "fills with the first light", "changes as fog rolls in", "glows at night",
               "under a fast moving sky"),
}  # fmt: skip

CAMERAS = ("static camera", "slow pan to the right", "the camera follows", "aerial view", "slow zoom in")


def videoalign(per_category: int = 50) -> list[Entry]:
    """Prompts of the kind that VideoAlign (arXiv 2501.13918) rates: a subject, its motion, a camera; four subjects."""
    rng = np.random.default_rng(2)
    entries = []
    for category, actors in ACTORS.items():
        every = [f"{a} {m}, {c}" for a in actors for m in ACTIONS[category] for c in CAMERAS]
        entries += [
            {"prompt": every[i], "category": category} for i in rng.choice(len(every), per_category, replace=False)
        ]
    return entries


def vbench() -> list[Entry]:
    """VBench's prompts (arXiv 2311.17982), from the list in the package of that name, which is read and not imported;
    what a prompt is judged for is its `dimension`, and joined, its `category`.

    Raises:
        UserError: Without the package.
    """
    found = importlib.util.find_spec("vbench")
    if found is None or found.origin is None:
        raise UserError("set:vbench: its prompts are in the package 'vbench'; pip install --no-deps vbench")
    listed = json.loads((Path(found.origin).parent / "VBench_full_info.json").read_text(encoding="utf-8"))
    return [
        {"prompt": e["prompt_en"], "category": "+".join(e["dimension"]), "dimension": e["dimension"]} for e in listed
    ]


SETS: dict[str, Callable[[], list[Entry]]] = {
    "geneval": geneval, "hps": hps, "videoalign": videoalign, "vbench": vbench,
    **grammar.SETS,
}  # fmt: skip
