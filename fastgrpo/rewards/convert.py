"""`fastgrpo convert-reward`: published reward weights that are pickle archives, as safetensors under the same names.

The one place of the project that reads a pickle, and of it tensors and plain containers alone (`weights_only`).
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.errors import UserError

# Where checkpoints keep their tensors, when not at the top.
WRAPPERS = ("state_dict", "model", "module")
# The strings that a questionnaire consists of: VideoAlign's prompt_template.py, HPSv3's data_collator_qwen.py.
QUESTIONNAIRES = (("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",), ("INSTRUCTION", "prompt_with_special_token"))


def convert_weights(source: Path, out: Path) -> Path:
    """Writes the tensors of a .pt, .pth or .bin file to a new .safetensors file. Raises UserError."""
    from safetensors.torch import save_file

    if out.suffix != ".safetensors":
        raise UserError(f"{out}: name a .safetensors file")
    if out.exists():
        raise UserError(f"{out}: is there already; name another file")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: holds more than tensors, and is not read: {reason}") from None
    # Of what is no archive the reader makes whatever its bytes mean to it: KeyError, IndexError, EOFError …
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{source}: cannot be read: {reason}") from None
    state = _tensors(content, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Tied tensors are written twice: safetensors shares no memory.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, out)
    return out


def _tensors(content: object, source: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for wrapper in WRAPPERS:
            if isinstance(content.get(wrapper), dict):
                return _tensors(content[wrapper], source)
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
    raise UserError(f"{source}: holds no table of tensors by name")


def convert_template(source: Path, out: Path) -> Path:
    """Writes a reward's questionnaire, strings of its published Python file, to a text file; runs nothing of it."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as Python: {error}") from None
    strings = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for names in QUESTIONNAIRES:
        if all(name in strings for name in names):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(strings[name] for name in names), encoding="utf-8")
            return out
    raise UserError(f"{source}: sets no {', nor '.join(' and '.join(names) for names in QUESTIONNAIRES)}")
