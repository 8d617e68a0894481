"""Settings of Sphinx for `make docs`: Markdown pages, and the API reference from the docstrings."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import fastssl

project = "fastssl"
author = "the fastssl authors"
release = version = fastssl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"fastssl {version}"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

default_role = "code"  # `x` in a docstring is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # a forward without a docstring does not show that of nn.Module
autodoc_default_options = {"members": True, "show-inheritance": True}
SECTIONS = ("Equals", "Layout", "Memory", "Source", "Sources", "Example", "Shapes", "Note")
napoleon_custom_sections = [section for section in SECTIONS if section not in ("Example", "Note")]
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

KNOWN = (*SECTIONS, "Args", "Arguments", "Attributes", "Returns", "Return", "Yields", "Raises", "Warning")
HEADER = re.compile(rf"^({'|'.join(KNOWN)}):(\s+\S.*)?$")
CODE = re.compile(r"(``.*?``|`[^`]*`)")


def plain_text(line: str) -> str:
    """A line of a docstring with reStructuredText's markup characters escaped outside of code."""
    parts = CODE.split(line)
    for i in range(0, len(parts), 2):
        text = re.sub(r"([*|\\])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)
    return "".join(parts)


def prepare(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring of this project, before napoleon reads its sections.

    A section may begin on the line of its name ("Source: He et al., 2020"); a paragraph that is indented outside of a
    section is a formula or a table, shown as it is.
    """
    result: list[str] = []
    section, literal, arguments = False, False, False
    for line in lines:
        indented = line.startswith((" ", "\t"))
        if not line.strip():
            result.append("")
            continue
        header = HEADER.match(line)
        if header:
            section, literal = True, False
            arguments = header[1] in ("Args", "Arguments", "Attributes", "Raises")
            after = (header[2] or "").strip()
            result += ["", f"{header[1]}:", *([f"    {plain_text(after)}"] if after else [])]
            continue
        if not indented:
            section = literal = False
            result.append(plain_text(line))
            continue
        if section:
            result.append(plain_text(line) if not arguments else plain_arguments(line))
            continue
        if not literal and (not result or not result[-1].strip()):
            result += ["::", ""]
            literal = True
        result.append(line if literal else plain_text(line.strip()))
    lines[:] = result
    if what in ("attribute", "property", "data"):
        attributes[name] = result


attributes: dict[str, list[str]] = {}  # docstrings of attributes, before napoleon


def restore(app, what, name, obj, options, lines: list[str]) -> None:
    """Undoes napoleon's reading of an attribute's docstring: it takes the text before a colon for a type."""
    if name in attributes:
        lines[:] = [*attributes.pop(name), ""]


def plain_arguments(line: str) -> str:
    """A line of a list of arguments or errors: the name before the colon is left to napoleon."""
    name, colon, rest = line.partition(": ")
    return f"{name}{colon}{plain_text(rest)}" if colon and re.fullmatch(r"\s+[\w, *.]+", name) else plain_text(line)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", prepare, priority=100)  # napoleon has 500
    app.connect("autodoc-process-docstring", restore, priority=900)
