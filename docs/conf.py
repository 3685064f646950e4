"""Sphinx settings; `nox -s docs` builds with every warning as an error."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import docstrings

MODULES = (
    "sagellm.core.protocols",
    "sagellm.comm.topology",
    "sagellm.comm.collective_ops",
    "sagellm.comm.kv_transfer",
    "sagellm.comm.overlap",
    "sagellm.comm.domestic",
)

project = "sagellm-comm"
author = "sageLLM contributors"
copyright = "sageLLM contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name`, as Markdown does
html_theme = "furo"
html_title = "sagellm-comm"

autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# an annotation `bytes` finds every attribute of that name and calls them ambiguous
suppress_warnings = ["ref.python"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3


def read_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turn Markdown's `code` into reStructuredText's, before napoleon reads the lines."""
    lines[:] = [docstrings.as_rst(line) for line in lines]


class Aliases(SphinxDirective):
    """`.. aliases:: MODULE`: the public aliases, which automodule leaves out."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Parse what `docstrings` makes of the module."""
        return self.parse_text_to_nodes(docstrings.alias_directives(self.arguments[0]))


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every public name that no page documents."""
    documented = set(env.domains["py"].data["objects"])
    for name in MODULES:
        for public in importlib.import_module(name).__all__:
            if public != "__version__" and f"{name}.{public}" not in documented:
                logging.getLogger(__name__).warning("%s.%s is in no page", name, public)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect what is above."""
    app.add_directive("aliases", Aliases)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("env-check-consistency", check_public_names)
    return {"parallel_read_safe": True}
