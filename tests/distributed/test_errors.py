"""What one rank raises, every rank raises, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lwo_dist import distributed
from lwo_dist.distributed import errors_on_all_ranks, on_rank_0
from lwo_dist.errors import UserError
from tests.ranks import run_ranks

ERRORS: dict[str, Callable[[], Exception]] = {
    "user": lambda: UserError("a bad value"),
    "program": lambda: KeyError("name"),
    "silent": ValueError,
}


def _outcomes(cases: list[dict[int, str]]) -> list[str]:
    """Of each case (rank -> what it raises): what this rank saw."""
    return [_outcome(case) for case in cases]


def _outcome(case: dict[int, str]) -> str:
    try:
        with errors_on_all_ranks():
            if distributed.rank() in case:
                raise ERRORS[case[distributed.rank()]]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def test_every_rank_raises_the_error_of_the_lowest() -> None:
    cases = [{}, {1: "user"}, {2: "program"}, {1: "silent"}, {2: "user", 1: "program"}]
    found = list(zip(*run_ranks(_outcomes, 3, cases), strict=True))
    assert found == [
        ("well", "well", "well"),
        ("UserError: a bad value",) * 3,
        (
            "RuntimeError: rank 2 failed: 'name'",
            "RuntimeError: rank 2 failed: 'name'",
            "KeyError: 'name'",
        ),
        (
            "RuntimeError: rank 1 failed: ValueError()",
            "ValueError: ",
            "RuntimeError: rank 1 failed: ValueError()",
        ),
        (
            "RuntimeError: rank 1 failed: 'name'",
            "KeyError: 'name'",
            "RuntimeError: rank 1 failed: 'name'",
        ),
    ]


def test_one_process_raises_its_own() -> None:
    with pytest.raises(KeyError, match="name"), errors_on_all_ranks():
        raise ERRORS["program"]()
    with errors_on_all_ranks():
        pass


def _on_rank_0() -> tuple[int, str]:
    value = on_rank_0(lambda: distributed.rank() + 7)
    try:
        on_rank_0(_fail)
    except Exception as error:
        return value, f"{type(error).__name__}: {error}"
    return value, "well"


def _fail() -> None:
    assert distributed.rank() == 0
    raise UserError("a bad value")


def test_on_rank_0() -> None:
    assert run_ranks(_on_rank_0, 2) == [(7, "UserError: a bad value")] * 2
