"""Writes fastgrpo_kernels in the layout that the Hugging Face hub's `kernels` loads.

    python kernels/hub_layout.py DIR

One folder for each backend, without compiled code: Triton compiles where it runs, and the CPU path is ATen. Operators
get a name of their own, so that they register beside an installed fastgrpo_kernels. CONTRIBUTING.md says how a layout
is uploaded.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("cuda", "rocm", "cpu")

# Of the hub's interface: it grows where a signature changes.
INTERFACE = 1


def write_layout(out: Path) -> list[Path]:
    """Writes `build/torch-<backend>/` for every backend, and README.md, into a new folder; returns the variants.

    Raises FileExistsError where `out` has a build already.
    """
    version = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    unique = f"fastgrpo_kernels_{version.replace('.', '_')}"
    variants = []
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        shutil.copytree(HERE / "fastgrpo_kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        for path in folder.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r"\bfastgrpo_kernels::", f"{unique}::", text), encoding="utf-8")
        metadata = {
            "name": "fastgrpo-kernels",
            "id": f"_{unique}_{backend}",
            "version": INTERFACE,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
        variants.append(folder)
    shutil.copy(HERE / "README.md", out / "README.md")
    shutil.copy(HERE / "LICENSE", out / "LICENSE")
    return variants


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kernels/hub_layout.py DIR")
    for variant in write_layout(Path(sys.argv[1])):
        print(variant)
