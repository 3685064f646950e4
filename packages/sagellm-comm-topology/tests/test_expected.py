"""Every recorded machine is read as a person read it; skipped where the records are absent."""

import pytest

from sagellm.comm.topology.benchmarks.recorded import case_files, mismatches

CASES = case_files()


@pytest.mark.skipif(not CASES, reason="recorded machines are not beside this checkout")
@pytest.mark.parametrize("case_file", CASES, ids=lambda c: c.stem)
def test_recorded_machine_is_what_a_person_read(case_file):
    assert mismatches(case_file) == []


@pytest.mark.skipif(not CASES, reason="recorded machines are not beside this checkout")
def test_a_wrong_fact_would_be_noticed(tmp_path):
    import json

    found = {}
    for case_file in CASES:
        case = json.loads(case_file.read_text())
        folder = tmp_path / case_file.stem
        (folder / "expected").mkdir(parents=True)
        (folder / "samples").symlink_to(case_file.parent.parent / "samples")
        for key in ("link_matrix", "numa_node", "cpu_affinity", "nics", "switch_domain"):
            if case.get(key) in (None, []):
                continue
            wrong = dict(case)
            wrong[key] = spoiled(case[key])
            (folder / "expected/case.json").write_text(json.dumps(wrong))
            found[case_file.stem, key] = mismatches(folder / "expected/case.json")

    assert len(found) > 30
    assert [key for key, told in found.items() if not told] == []


@pytest.mark.skipif(not CASES, reason="recorded machines are not beside this checkout")
def test_links_of_an_input_that_states_none_would_be_noticed(tmp_path):
    import json

    (tmp_path / "expected").mkdir()
    found = {}
    for case_file in CASES:
        case = json.loads(case_file.read_text())
        if len(case["link_matrix"] or []) < 2:
            continue
        (tmp_path / "samples").unlink(missing_ok=True)
        (tmp_path / "samples").symlink_to(case_file.parent.parent / "samples")
        (tmp_path / "expected/case.json").write_text(json.dumps({**case, "link_matrix": None}))
        found[case_file.stem] = mismatches(tmp_path / "expected/case.json")

    assert len(found) > 10
    assert [stem for stem, told in found.items() if not told] == []


def spoiled(value):
    """The same kind of value with something wrong in it."""
    if isinstance(value, dict):
        return None
    first = value[0]
    if isinstance(first, dict):
        return [{**first, "name": "nobody"}, *value[1:]]
    if isinstance(first, list):
        return [[*first[:-1], "XGMI9"], *value[1:]]
    return ["7-9" if isinstance(first, str) else 99, *value[1:]]
