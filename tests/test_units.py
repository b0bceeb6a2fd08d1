"""Sizes in bytes, written and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.errors import RequestError
from moelocal.units import GIB, memory_size, parse_memory, parse_size, size, size_above


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.0 kB"),
        (7_400, "7.4 kB"),
        (1_000_000, "1.0 MB"),
        (512_300_000, "512.3 MB"),
        (1_000_000_000, "1.00 GB"),
        (71_900_000_000, "71.90 GB"),
    ],
)
def test_sizes_are_decimal(nbytes: int, text: str):
    assert size(nbytes) == text


@given(st.integers(1, 10**12))
def test_a_size_rounded_up_is_enough_and_hardly_more(nbytes: int):
    said = parse_size(size_above(nbytes).removesuffix(" bytes"))
    assert nbytes <= said < 1.1 * nbytes  # the last digit of "1.0 kB" is a tenth
    assert size_above(said) == size(said) == size_above(nbytes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20.9GB", 20_900_000_000),
        ("20.9 GB", 20_900_000_000),
        (" 19.5GiB ", 20_937_965_568),
        ("800MB", 800_000_000),
        ("1kB", 1000),
        ("7", 7),
        ("7B", 7),
        ("0.001kB", 1),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, expected: int):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e9", "20,9GB", "20.9gb", "1.GB", ".5GB", "0", "٣GB", "1" * 20, "nanGB"]
)
def test_sizes_that_are_none(text: str):
    with pytest.raises(RequestError) as error:
        parse_size(text, "--target-size")
    assert str(error.value) == (
        f"--target-size: expected a size like 20.9GB (1e9 bytes) or 19.5GiB (2^30), got {text!r}"
    )


def test_memory_is_counted_as_it_is_sold():
    assert parse_memory("24GB") == parse_memory("24 GiB") == 24 * GIB
    assert memory_size(24 * GIB) == "24 GB" and memory_size(int(23.6 * GIB)) == "24 GB"
    assert parse_memory("512MB") == 512_000_000
    with pytest.raises(RequestError) as error:
        parse_memory("much", "--memory")
    assert str(error.value) == "--memory: expected a size like 24GB, as a Mac's memory is named, got 'much'"
