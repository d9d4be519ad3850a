"""Write docs/api.md from the docstrings.

make readme
"""

import inspect
import re
from pathlib import Path
from typing import Any

import docstring_parser

import slope_fx
from slope_fx.integrations import lightning, transformers

PAGE = Path(__file__).resolve().parent / "api.md"

INTRODUCTION = """\
# API

Written by `make readme` from the docstrings.
"""

GROUPS: dict[str, list[str]] = {
    "To train": ["compile", "Schedule", "explain", "preview", "sparse_weights", "weights_changed"],
    "Checkpoints": [
        "save_pretrained", "load_pretrained", "load_training", "verify", "describe_checkpoint",
        "densify", "export_peft",
    ],
    "To compile by hand, and to look inside": ["rewriting_backend", "debug.first_difference"],
    "What they return": [
        "SparseWeight", "Pattern", "Explanation", "LinearReport", "ProductReport",
        "CheckpointReport",
    ],
}  # fmt: skip
INTEGRATIONS = {
    "slope_fx.integrations.transformers.SlopeCallback": transformers.SlopeCallback,
    "slope_fx.integrations.lightning.SlopeCallback": lightning.SlopeCallback,
}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            thing: Any = slope_fx
            for part in name.split("."):
                thing = getattr(thing, part)
            parts.append(entry(f"slope_fx.{name}", thing))
    parts.append("## In other people's trainers\n")
    parts += [entry(name, thing) for name, thing in INTEGRATIONS.items()]
    parts.append("## Errors and warnings\n")
    parts.append(
        "All errors derive from `slope_fx.errors.SlopeError`, all warnings from `slope_fx.errors.SlopeWarning`; "
        "[troubleshooting](troubleshooting.md) says what to do about each.\n"
    )
    for name in sorted(slope_fx.__all__):
        thing = getattr(slope_fx, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            parts.append(f"- `{name}`: {plain(thing.__doc__ or '')}")
    return "\n".join(parts) + "\n"


def entry(name: str, thing: Any) -> str:
    """One function or class: how it is called, what it does, what goes in and comes out."""
    parsed = docstring_parser.parse(thing.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    lines = [f"### `{name}`\n", "```\n" + signature(name, thing) + "\n```\n"]
    for text in (parsed.short_description, parsed.long_description):
        if text:
            lines.append(plain(text) + "\n")
    fields = [p for p in parsed.params if p.args[0] == "attribute"]
    for title, params in (
        ("", [p for p in parsed.params if p not in fields]),
        ("Attributes:\n", fields),
    ):
        if params:
            lines.append(
                title
                + "\n".join(f"- `{p.arg_name}`: {plain(p.description or '')}" for p in params)
                + "\n"
            )
    if parsed.returns and parsed.returns.description:
        lines.append(f"Returns: {plain(parsed.returns.description)}\n")
    if parsed.raises:
        raised = (f"- `{r.type_name}`: {plain(r.description or '')}" for r in parsed.raises)
        lines.append("Raises:\n" + "\n".join(raised) + "\n")
    if isinstance(thing, type):
        lines += methods(thing)
    return "\n".join(lines)


def methods(kind: type) -> list[str]:
    """The public methods and properties that a class has of its own, one line each."""
    lines = []
    for name, member in vars(kind).items():
        known = isinstance(member, property) or inspect.isfunction(member)
        if name.startswith("_") or not known or name.startswith("on_") or not member.__doc__:
            continue
        first = plain(docstring_parser.parse(member.__doc__).short_description or "")
        call = "" if isinstance(member, property) else "()"
        lines.append(f"- `.{name}{call}`: {first}")
    return ["\n".join(lines) + "\n"] if lines else []


def signature(name: str, thing: Any) -> str:
    """How it is called, without types, of which the text tells."""
    parameters, star = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        default = parameter.default
        shown = "" if default is parameter.empty else f"={default!r}"
        parameters.append(f"{parameter.name}{shown}")
    short = name.rpartition(".")[2]
    whole = f"{short}({', '.join(parameters)})"
    return whole if len(whole) <= 96 else f"{short}(\n    " + ",\n    ".join(parameters) + ",\n)"


def plain(text: str) -> str:
    """Markdown from what docstrings have."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"\s+", " ", text.replace("``", "`")).strip()


if __name__ == "__main__":
    PAGE.write_text(page())
