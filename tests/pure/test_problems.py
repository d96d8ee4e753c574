"""What every answer says of itself."""

from __future__ import annotations

import email.utils
import time

import pytest

from imageapi.api import problems
from imageapi.errors import Problem

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("moment", [0, 951_782_400, 1_795_532_101])
def test_the_date_is_written_as_the_standard_has_it(moment: int) -> None:
    assert problems._date(moment) == f"date: {email.utils.formatdate(moment, usegmt=True)}\r\n".encode()


def test_every_answer_has_the_date_of_now() -> None:
    before = int(time.time())
    [date] = [line for line in problems.head(200, []).split(b"\r\n") if line.startswith(b"date: ")]
    told = email.utils.parsedate_to_datetime(date.removeprefix(b"date: ").decode()).timestamp()
    assert before <= told <= time.time()


def test_what_is_no_text_is_legible_wherever_a_problem_has_it() -> None:
    problem = Problem("\udcff and \ud800", detail="caf\udce9", holders=["\udc80", "é"], errno=5)
    assert problem.to_dict() == {
        "code": 500, "message": "\\xff and \\ud800", "detail": "caf\\xe9", "holders": ["\\x80", "é"], "errno": 5
    }  # fmt: skip
    assert str(problem) == problem.message
