"""The embedded world: captioned images of coloured shapes, a verifier that reads them, and tiny pipelines of the
real architectures that draw them. Importing this package imports neither torch nor diffusers."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def weights_path(name: str) -> Path:
    """The directory of the shipped pipeline `name` ("flux"), ready for `from_pretrained`.

    Raises ValueError naming the shipped pipelines where there is none of that name.
    """
    path = _WEIGHTS / name
    if not (path / "model_index.json").is_file():
        shipped = ", ".join(sorted(p.parent.name for p in _WEIGHTS.glob("*/model_index.json"))) or "none"
        raise ValueError(f"weights: no shipped pipeline named {name!r} (shipped: {shipped})")
    return path
