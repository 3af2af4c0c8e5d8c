"""mkdocs hook: the front page from README.md, a page for every command from the parsers, the Python interface's pages,
and the order of all of them. Links that leave the documents become names of files of the repository."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# The documents in the order in which they are read; what is in none of these lists comes last.
ORDER = {
    "Train": ["training.md", "config.md", "rewards.md", "video.md", "editing.md", "switching.md"],
    "Add": ["adding-a-model.md", "adding-an-objective.md"],
    "Run by the book": ["run-24gb.md", "run-flux-8.md", "run-hunyuan-video-32.md", "first-real-run.md"],
    "Run at scale": ["scale.md", "staying-up.md", "watching.md", "troubleshooting.md"],
    "How it works": ["design.md", "kernels.md", "drop-in.md"],
    "Measured": ["results.md", "benchmarks.md"],
}

# Pages of the Python interface: title, what it says first, and the names that it documents.
INTERFACE = {
    "fastgrpo": (
        "What `import fastgrpo` gives.",
        [
            "fastgrpo.commands.train.train",
            "fastgrpo.config.load_config",
            "fastgrpo.training.trainer.Trainer",
            "fastgrpo.models.load_family",
            "fastgrpo.evaluation.heldout.evaluate",
            "fastgrpo.commands.export.export_run",
            "fastgrpo.training.callbacks.Callback",
            "fastgrpo.data.prompts.Prompt",
            "fastgrpo.rewards.base.Scores",
            "fastgrpo.errors.UserError",
        ],
    ),
    "rewards": (
        "What a reward is given; it gives [`Scores`][fastgrpo.rewards.base.Scores].",
        ["fastgrpo.rewards.base.Reward", "fastgrpo.rewards.base.FunctionReward"],
    ),
    "models": ("What a model family is: encode, predict, decode.", ["fastgrpo.models.protocol"]),
    "objectives": (
        "What an objective is, advantages, and the schedule of trained steps.",
        ["fastgrpo.algorithms.objectives.base", "fastgrpo.algorithms.advantages", "fastgrpo.algorithms.schedule"],
    ),
    "kernels": (
        "Operators of `fastgrpo_kernels`, for any trainer.",
        [
            "fastgrpo_kernels.gaussian_step.op",
            "fastgrpo_kernels.shift_moments.op",
            "fastgrpo_kernels.log_prob.op",
            "fastgrpo_kernels.clipped_loss.op",
            "fastgrpo_kernels.clipped_loss.fused",
            "fastgrpo_kernels.on_policy_gradient.op",
            "fastgrpo_kernels.StoredStep",
            "fastgrpo_kernels.MatchingTarget",
            "fastgrpo_kernels.noise",
            "fastgrpo_kernels.transitions",
        ],
    ),
    "compat": (
        "Other trainers' step functions, with their signatures.",
        [
            "fastgrpo_kernels.compat.dance_grpo",
            "fastgrpo_kernels.compat.flow_grpo",
            "fastgrpo_kernels.compat.flow_factory",
            "fastgrpo_kernels.compat.ddpo",
            "fastgrpo_kernels.compat.diffusion_nft",
            "fastgrpo_kernels.compat.awm",
            "fastgrpo_kernels.compat.gaussian",
            "fastgrpo_kernels.compat.loss",
        ],
    ),
}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


@functools.cache
def generated() -> dict[str, str]:
    """Every page that is made here, by its path among the documents."""
    pages = {"index.md": within_documents((ROOT / "README.md").read_text(encoding="utf-8"), "")}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        pages[f"{name.lower()}.md"] = within_documents((ROOT / f"{name}.md").read_text(encoding="utf-8"), "")
    pages |= dict(command_pages())
    for title, (intro, names) in INTERFACE.items():
        blocks = "\n\n".join(f"::: {name}" for name in names)
        pages[f"reference/{title}.md"] = f"# {title}\n\n{intro}\n\n{blocks}\n"
    return pages


def within_documents(text: str, folder: str) -> str:
    """A Markdown text of `folder` of the repository as a page of the documents' root.

    A link to another document leads there; one to anything else of the repository becomes the name of that file.
    """

    def replaced(match: re.Match[str]) -> str:
        image, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return f"{image}[{words}]({path.removeprefix('docs/')}{anchor})"
        if path in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
            page = "index.md" if path == "README.md" else path.lower()
            return f"[{words}]({page}{anchor})"
        return f"`{path}`" if image or words == path else f"{words} (`{path}`)"

    return LINK.sub(replaced, text)


def command_pages() -> Iterator[tuple[str, str]]:
    """A page for every command, from its parser, and the list of them."""
    from typer.main import get_command

    from fastgrpo.commands.main import app

    group: Any = get_command(app)
    rows = []
    for name, command in sorted(group.commands.items()):
        yield f"commands/{name}.md", command_page(name, command)
        rows.append(f"| [`fastgrpo {name}`]({name}.md) | {summary(command)} |")
    head = "# Commands\n\n`fastgrpo --help` lists them, and `fastgrpo COMMAND --help` says what is below.\n\n"
    yield "commands/index.md", head + "\n".join(["| command | what it does |", "| --- | --- |", *rows, ""])


def command_page(name: str, command: Any) -> str:
    """What a command does, and its arguments and options with their defaults."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["fastgrpo", name, *(["[OPTIONS]"] if options else []), *(shown(p) for p in arguments)])
    said = " ".join((command.help or "").split())
    lines = [f"# fastgrpo {name}", "", said, "", "```text", usage, "```"]
    for title, params in (("Arguments", arguments), ("Options", options)):
        if params:
            lines += ["", f"## {title}", "", f"| {title.lower()[:-1]} | what it is | default |", "| --- | --- | --- |"]
            lines += [f"| `{shown(p)}` | {cell(p.help)} | {default(p)} |" for p in params]
    return "\n".join([*lines, ""])


def summary(command: Any) -> str:
    """The first sentence."""
    text = " ".join((command.help or "").split())
    return cell(re.split(r"(?<=[.:]) ", text)[0])


def shown(param: Any) -> str:
    """An argument or option as it is typed."""
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    flags = ", ".join([*param.opts, *param.secondary_opts])
    return flags if param.is_flag else f"{flags} {param.metavar or param.name.upper()}"


def default(param: Any) -> str:
    if param.required:
        return "required"
    empty = param.default is None or param.default is False or callable(param.default) or param.default == ()
    return "" if empty else f"`{param.default}`"


def cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def navigation(pages: dict[str, str]) -> list[Any]:
    """The order of all pages; a document that ORDER does not know comes under More."""
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    nav: list[Any] = [{"Start": "index.md"}]
    nav += [{title: [name for name in names if name in there]} for title, names in ORDER.items() if there & set(names)]
    nav.append(
        {"Commands": sorted((p for p in pages if p.startswith("commands/")), key=lambda p: ("index" not in p, p))}
    )
    nav.append({"Python": [path for path in pages if path.startswith("reference/")]})
    known = {name for names in ORDER.values() for name in names}
    nav.append({"More": [*sorted(there - known), "contributing.md", "changelog.md"]})
    return nav


def on_config(config: Any) -> Any:
    config.nav = navigation(generated())
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the documents that leave their folder."""
    path = page.file.src_uri
    return markdown if path in generated() else _outward(markdown)


def _outward(text: str) -> str:
    """Of a document, only what leaves docs/ is changed."""
    return LINK.sub(lambda m: within_documents(m[0], "docs") if m[3].startswith("..") else m[0], text)
