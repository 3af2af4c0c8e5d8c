"""The README's picture: held-out images of an evaluated run before and after, with prompts and marks.

python bench/before_after.py RUN OUT.png [COUNT]: of the run's grid (`fastgrpo eval RUN`), which has what changed most
first, COUNT prompts spread evenly over it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from fastgrpo.observe.media import COLUMNS, MARGIN

MARKS = {1.0: ("✓", "tab:green"), 0.0: ("✗", "tab:red")}


def tiles(sheet: Path, columns: int, rows: int) -> list[Image.Image]:
    """The pictures of a grid, without the margins between them."""
    with Image.open(sheet) as opened:
        picture = opened.convert("RGB")
    width, height = ((size - MARGIN) // cells for size, cells in ((picture.width, columns), (picture.height, rows)))
    return [
        picture.crop((c * width + MARGIN, r * height + MARGIN, (c + 1) * width, (r + 1) * height))
        for r in range(rows)
        for c in range(columns)
    ]


def draw(run: Path, out: Path, count: int = 8) -> None:
    """Writes the picture: a column a prompt, base above, tuned below."""
    folder = run / "final" / "eval"
    files = sorted(folder.glob("*.json"))
    first, last = (json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1]))
    chosen = [i * len(first["prompts"]) // count for i in range(count)]
    figure, axes = plt.subplots(2, count, figsize=(1.15 * count, 3.2), squeeze=False)
    for row, (found, file) in enumerate(((first, files[0]), (last, files[-1]))):
        grid = tiles(file.with_suffix(".png"), COLUMNS, -(-len(found["prompts"]) // COLUMNS))
        strict = next(values for name, values in found["values"].items() if name.endswith(".strict"))
        for axis, place in zip(axes[row], chosen, strict=True):
            mark, color = MARKS[strict[found["shown"][place]]]
            axis.imshow(grid[place])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.text(
                0.9, 0.03, mark, color=color, fontsize=15, fontweight="bold", ha="center", transform=axis.transAxes
            )
            if row == 0:
                words = found["prompts"][place].split()
                lines = [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
                axis.set_title("\n".join(lines), fontsize=8)
        axes[row][0].set_ylabel("before" if row == 0 else "after GRPO", fontsize=10)
    before, after = first["strict_pass"], last["strict_pass"]
    figure.suptitle(
        f"{last['images']} held-out prompts, same initial noise: {before:.1%} exactly right before, {after:.1%} after",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98), h_pad=0.6, w_pad=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]), *(int(count) for count in sys.argv[3:4]))
