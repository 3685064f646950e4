"""Six distributions share one namespace and meet only through core-protocols."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SIBLING = re.compile(r"sagellm\.comm\.(\w+)")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute module an AST imports, by statement or by `import_module("…")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def without_type_checking(tree: ast.AST) -> ast.AST:
    """The tree as it runs: `if TYPE_CHECKING:` blocks emptied."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
    return tree


def relative_escapes(tree: ast.AST, depth: int) -> Iterator[int]:
    """Lines whose relative import climbs above the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            yield node.lineno


def test_package_imports_no_sibling(package):
    own = "core" if package.is_core else package.name
    found = []
    for file in package.folder.rglob("*.py"):
        tree = ast.parse(file.read_text(), str(file))
        depth = len(file.relative_to(package.folder).parts)
        found += [f"{file}:{line} climbs out" for line in relative_escapes(tree, depth)]
        for module, line in imports(tree):
            match = SIBLING.match(module)
            if match and match[1] != own:
                found.append(f"{file}:{line} imports {module}")

    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import sagellm.comm.topology",
        "from sagellm.comm import topology",
        "from sagellm.comm.topology import TopologyManager",
        "def f():\n    from sagellm.comm.topology import manager",
        'import importlib\nimportlib.import_module("sagellm.comm.topology.manager")',
    ],
)
def test_the_scan_sees_every_form_of_import(source):
    modules = [module for module, _ in imports(ast.parse(source))]

    assert any(SIBLING.match(m) and SIBLING.match(m)[1] == "topology" for m in modules)


def test_shared_levels_hold_no_file(package):
    src = package.path / "src"
    shared = [src, src / "sagellm", package.folder.parent]

    assert [f for level in shared for f in level.iterdir() if f.is_file()] == []


def test_leaf_is_typed_and_lists_its_names_once(package):
    tree = ast.parse((package.folder / "__init__.py").read_text())
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    names = next(ast.literal_eval(n.value) for n in assigned if n.targets[0].id == "__all__")

    assert (package.folder / "py.typed").is_file()
    assert len(names) == len(set(names))
    others = {n.targets[0].id for n in assigned} - {"__all__", "_NEED_TORCH"}
    assert not others, "an __init__ only re-exports, names that need torch when first asked for"


def may_import_torch(file: Path, folder: Path) -> bool:
    """`process_group` and the private package of its parts, the conformance kit, benchmarks."""
    inside = file.relative_to(folder)
    exempt = {"process_group.py", "_process_group", "testing", "benchmarks"}
    return inside.parts[0] in exempt


def test_core_imports_torch_in_one_place(packages):
    core = next(p for p in packages if p.is_core)
    found = []
    for file in core.folder.rglob("*.py"):
        if may_import_torch(file, core.folder):
            continue
        tree = without_type_checking(ast.parse(file.read_text(), str(file)))
        found += [f"{file}:{n}" for m, n in imports(tree) if m.split(".")[0] == "torch"]

    assert not found


def test_every_other_module_of_core_works_without_torch(packages, run_python):
    core = next(p for p in packages if p.is_core)
    modules = [
        ".".join(file.relative_to(core.path / "src").with_suffix("").parts)
        for file in core.folder.rglob("*.py")
        if not may_import_torch(file, core.folder) and file.name != "__main__.py"
    ]
    program = "import importlib, sys\nsys.modules['torch'] = None\n" + "\n".join(
        f"importlib.import_module({m.removesuffix('.__init__')!r})" for m in modules
    )

    run_python("-c", program)


@pytest.mark.parametrize("module", ["sagellm.core.protocols", "sagellm.comm.topology"])
def test_import_brings_no_torch(module, run_python):
    run_python("-c", f"import sys, {module}; assert 'torch' not in sys.modules")


AUDIT = """
import sys
try:
    import torch  # what torch does at import is torch's; packages that need it import it
except ImportError:
    pass
refused = ("socket.", "subprocess.", "os.system", "os.fork", "os.posix_spawn", "ctypes.dlopen")
def hook(event, arguments):
    if event.startswith(refused):
        raise RuntimeError(f"{event} at import: {arguments}")
sys.addaudithook(hook)
"""


def test_import_opens_no_socket_process_or_driver(package, run_python):
    if package.name == "topology" or package.is_core:
        prelude = AUDIT.replace("import torch  #", "pass  #")
    else:
        prelude = AUDIT

    run_python("-c", f"import socket, subprocess, ctypes\n{prelude}\nimport {package.module}")
