"""Bytes and times, as every line and page shows them."""

import pytest

from lwo_dist.units import byte_unit, human_bytes, human_seconds


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (99_900, "99.9 KB"),
        (100_000, "100 KB"),
        (1_340_000_000, "1.3 GB"),
        (80e9, "80.0 GB"),
        (2.5e12, "2.5 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_are_decimal_with_three_digits_or_less(size: float, shown: str) -> None:
    assert human_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s"), (3725, "1h02m")],
)
def test_times_in_their_two_largest_units(seconds: float, shown: str) -> None:
    assert human_seconds(seconds) == shown


def test_the_unit_of_an_axis() -> None:
    assert byte_unit(24 * 10**9) == ("GB", 10**9)
    assert byte_unit(10**9 - 1) == ("MB", 10**6)
    assert byte_unit(0) == byte_unit(0.5) == ("B", 1)
