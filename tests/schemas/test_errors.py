"""Messages of exceptions in one line."""

import pytest
from pydantic import BaseModel, ValidationError

from weighted_mtp.schemas.errors import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (OSError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
    ],
)
def test_the_first_line_or_the_type(error: Exception, expected: str) -> None:
    assert first_line(error) == expected


class Inner(BaseModel):
    count: int


class Outer(BaseModel):
    inner: list[Inner]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"inner": [{"count": 1}, {}]}, "inner.1.count: Field required"),
        ([], "Input should be a valid dictionary or instance of Outer"),
    ],
)
def test_the_first_problem_of_a_record_and_its_field(value: object, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    assert first_line(caught.value) == expected
