"""A vendor's tool is asked within the deadline, and everything it does wrong is a sentence."""

from pathlib import Path

import pytest

from sagellm.core.protocols import CommandResult, DetectionContext
from sagellm.core.protocols.detection import ask_tool


@pytest.fixture
def ask(tmp_path):
    def asked(answers, *, deadline_s=5.0, **kwargs):
        calls = []

        def run(command, timeout_s):
            calls.append((list(command), timeout_s))
            answer = answers.get(command[0], FileNotFoundError(command[0]))
            if isinstance(answer, Exception):
                raise answer
            return answer

        warnings = []
        ctx = DetectionContext(Path(tmp_path), {}, run, lambda: 0.0, deadline_s, True)
        return ask_tool(ctx, "toy", ["topo", "-m"], warnings, **kwargs), warnings, calls

    return asked


def test_an_answer_comes_back_without_a_word(ask):
    done, warnings, calls = ask({"toy": CommandResult(0, "table")})

    assert (done.stdout, warnings) == ("table", [])
    assert calls == [(["toy", "topo", "-m"], 5.0)]


def test_a_wait_is_bounded_although_the_deadline_is_far(ask):
    _, _, calls = ask({"toy": CommandResult(0, "")}, deadline_s=900.0, longest_s=7.0)

    assert calls[0][1] == 7.0


def test_a_missing_tool_is_no_warning_and_is_looked_for_in_its_places(ask, tmp_path):
    place = tmp_path / "opt/toy"
    place.parent.mkdir()
    place.write_text("")

    assert ask({}, places=["opt/toy", "opt/other"])[:2] == (None, [])
    done, _, calls = ask({"/opt/toy": CommandResult(0, "x")}, places=["opt/toy", "opt/other"])

    assert done.stdout == "x"
    assert [c[0] for c, _ in calls] == ["toy", "/opt/toy"]


@pytest.mark.parametrize(
    ("answer", "deadline_s", "words"),
    [
        (TimeoutError(), 5.0, "`toy topo -m` did not answer within 5.0 s"),
        (PermissionError("no"), 5.0, "`toy topo -m` could not be run: no"),
        (CommandResult(0, ""), 0.0, "no time left to run `toy topo -m`"),
        (CommandResult(3, "out", "\n  err "), 5.0, "`toy topo -m` ended with 3: 'err'"),
        (CommandResult(-9, " \n" + "x" * 500), 5.0, f"ended with -9: '{'x' * 120}'"),
        (CommandResult(1, " \n"), 5.0, "ended with 1: nothing"),
    ],
)
def test_what_goes_wrong_is_said(ask, answer, deadline_s, words):
    done, warnings, _ = ask({"toy": answer}, deadline_s=deadline_s)

    assert (done is None) == (not isinstance(answer, CommandResult) or deadline_s == 0)
    assert len(warnings) == 1
    assert words in warnings[0]
