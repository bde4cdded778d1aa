"""The site of these pages, which `make docs` builds into build/site. A warning ends it, such as of a lost link."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from cospadi import Healing, Recipe, __version__

project, author, release = "CoSpaDi", "the CoSpaDi developers", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
default_role = "literal"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "CoSpaDi"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False

CONTENTS = {
    "Use": ["guide", "transformers", "vllm", "lm-eval", "peft"],
    "The method": ["method", "solvers", "format", "scaling"],
    "Figures": ["results", "results/*", "smollm2", "healing", "healing-rows", "performance", "performance/*"],
    "Trust": ["testing", "reliability", "families"],
    "Reference": ["api"],
}
"""The list of pages, by heading. It stands here so that the pages are plain ones in the repository."""


def add_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    if page == "index":
        for caption, pages in CONTENTS.items():
            names = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{names}\n```\n"


def add_fields(_app: Sphinx, _what: str, _name: str, described: Any, _options: Any, lines: list[str]) -> None:
    """What each field of a recipe is, which stands beside the field and in no docstring."""
    if described in (Recipe, Healing):
        lines += ["", *(f":param {name}: {field.description}" for name, field in described.model_fields.items())]


def inline_formula(page: HTML5Translator, formula: nodes.math) -> None:
    page.body.append(convert(formula.astext()))
    raise nodes.SkipNode


def formula_alone(page: HTML5Translator, formula: nodes.math_block) -> None:
    page.body.append(f'<div style="overflow-x: auto">{convert(formula.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Formulas become MathML, which browsers draw without a script from elsewhere."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula_alone, None))
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", add_fields)
