"""What the documents say holds: programs run, links lead somewhere, every package has its page."""

import ast
import re
import shlex

import pytest

READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def examples(root, name="README.md"):
    return FENCE.findall((root / name).read_text("utf-8"))


def shape(source):
    """A program without its comments and strings: what both languages must share."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            node.values = []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            node.args = []
    return ast.dump(tree)


def pytest_generate_tests(metafunc):
    if "example" in metafunc.fixturenames:
        path = metafunc.config.rootpath
        programs = examples(path)
        ids = [re.search(r"sagellm\.[\w.]+", p)[0] for p in programs]
        metafunc.parametrize("example", programs, ids=ids)


def test_readme_example_runs(example, run_python):
    run_python("-W", "error::DeprecationWarning:__main__", "-c", example)


def test_every_package_has_an_example_of_about_ten_lines(package, root):
    fitting = [e for e in examples(root) if f"from {package.module} import" in e]

    assert fitting
    assert min(len(e.strip().splitlines()) for e in fitting) <= 12


def test_both_languages_have_the_same_programs(root):
    english, chinese = (examples(root, name) for name in READMES)

    assert [shape(e) for e in english] == [shape(e) for e in chinese]


@pytest.mark.parametrize("name", READMES)
def test_each_set_up_line_stands_alone(name, root):
    fences = re.findall(r"^```sh\n(.*?)^```", (root / name).read_text("utf-8"), re.M | re.S)
    boot = "python3 -m venv .boot && .boot/bin/pip install nox uv && .boot/bin/nox -s "

    assert f"{boot}demo\n" in fences
    assert f"{boot}lint types tests build\n" in fences


def test_the_check_of_a_change_runs_the_readmes_lines(root):
    commands = [
        shlex.split(line, comments=True)
        for line in (root / ".ci" / "run").read_text("utf-8").splitlines()
        if line.startswith("step ")
    ]
    nox = [" ".join(words[3:]) for words in commands if words[2:3] == [".boot/bin/nox"]]

    assert nox == ["-s lint types tests build", "-s docs", "-s demo", "-s lock -- --check"]


def test_links_lead_somewhere(root, tracked):
    broken = [
        f"{page.relative_to(root)}: {link}"
        for page in tracked
        if page.suffix == ".md"
        for link in LINK.findall(page.read_text("utf-8"))
        if not (page.parent / link).exists()
    ]

    assert not broken


def test_every_package_has_an_api_page(package, root):
    page = (root / "docs" / "api" / f"{package.name}.md").read_text()

    assert f".. automodule:: {package.module}\n" in page
    assert f".. aliases:: {package.module}\n" in page
    assert f'"{package.module}"' in (root / "docs" / "conf.py").read_text()
    assert f"api/{package.name}" in (root / "docs" / "index.md").read_text()


def test_every_readme_says_what_a_reader_looks_for(package):
    text = (package.path / "README.md").read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    wanted = ["The problem", "Limits", "Quick start", "Test and benchmark", "Key figures"]

    assert [w for w in wanted if w not in headings] == []
    assert f"nox -s tests-{package.name}\n" in text
    assert f"nox -s bench-{package.name} " in text


def test_key_figures_have_target_measured_and_baseline(package):
    text = (package.path / "README.md").read_text("utf-8").partition("## Key figures\n")[2]
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]

    assert header.startswith("| figure | target | measured | baseline")
    assert set(rule) <= set("|- ")
    assert rows
    for row in rows:
        figure, _, measured, _ = re.split(r"(?<!\\)\|", row.strip("|"))
        assert measured.strip(" -\u2013"), f"{figure}: a figure nobody measured says so"


def test_decisions_are_numbered_once(root):
    pages = sorted((root / "docs" / "decisions").glob("0*.md"))
    numbers = [int(p.name[:4]) for p in pages]

    assert numbers == list(range(1, len(pages) + 1))
    for number, page in zip(numbers, pages, strict=True):
        assert page.read_text().startswith(f"# {number}. ")
