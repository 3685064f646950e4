"""Nothing in the repository depends on where it is built or where packages come from."""

import re

# Written in pieces, so that this file does not contain what it looks for.
HOST = re.compile(r"\b(pypi|pythonhosted|npmjs|debian)\." + r"(org|com|net|io)\b")
MACHINE_PATH = re.compile(r"(?<![\w./$-])/" + r"(tmp|root|work|home|Users)/\w")


def test_lock_names_no_address(root):
    text = (root / "uv.lock").read_text()

    assert "://" not in text
    assert 'source = { registry = "." }' in text
    assert "hash = " in text


def test_no_file_names_a_package_index(tracked, root):
    found = [str(f.relative_to(root)) for f in tracked if HOST.search(f.read_text("utf-8"))]

    assert not found


def test_no_file_names_a_path_of_one_machine(tracked, root):
    text = {".py", ".toml", ".yml", ".yaml", ".cfg", ".sh", ""}
    found = [
        f"{f.relative_to(root)}: {match[0]}"
        for f in tracked
        if f.suffix in text
        for match in MACHINE_PATH.finditer(f.read_text("utf-8"))
    ]

    assert not found


def test_every_lock_entry_of_an_index_has_hashes(root):
    entries = (root / "uv.lock").read_text().split("[[package]]")[1:]
    remote = [e for e in entries if "\nsource = { registry" in e]

    assert remote
    assert [e.splitlines()[1] for e in remote if "sha256:" not in e] == []
