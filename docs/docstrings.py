"""What Sphinx needs to read our docstrings, which write `code` as Markdown does."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

_CODE_OR_BAR = re.compile(r"``[^`]+``|`(?P<code>[^`]+)`(?P<joined>\w?)|\|")


def as_rst(line: str) -> str:
    r"""The line with `x` as a literal and with |x|, a length, kept from being a substitution.

    >>> as_rst("`abort`s when |C| is 0")
    '``abort``\\ s when \\|C\\| is 0'
    """

    def replace(match: re.Match[str]) -> str:
        if code := match["code"]:
            return f"``{code}``" + (rf"\ {match['joined']}" if match["joined"] else "")
        return r"\|" if match[0] == "|" else match[0]

    return _CODE_OR_BAR.sub(replace, line)


def public_aliases(module: str) -> Iterator[tuple[str, str, list[str]]]:
    """Name, value and docstring of each public alias; autodoc finds only classes and functions.

    An alias such as `Axis = Literal[…]` has no docstring of its own: the string below it is read
    from the source of whichever file of the package assigns it.
    """
    package = importlib.import_module(module)
    found: dict[str, list[str]] = {}
    for file in sorted(Path(typing.cast("str", package.__file__)).parent.glob("*.py")):
        docs = ModuleAnalyzer.for_file(file, f"{module}.{file.stem}").find_attr_docs()
        found |= {name: lines for (scope, name), lines in docs.items() if not scope}
    for name in package.__all__:
        value = getattr(package, name)
        alias = not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value))
        if alias and name != "__version__":
            text = str(value).replace("typing.", "")
            yield name, text, found.get(name, [])


def alias_directives(module: str) -> str:
    """The aliases of a package as reStructuredText."""
    blocks = []
    for name, value, lines in public_aliases(module):
        body = [f".. py:data:: {name}", f"   :module: {module}", f"   :value: {value}", ""]
        blocks.append("\n".join([*body, *(f"   {as_rst(line)}" for line in lines), ""]))
    return "\n".join(blocks)
