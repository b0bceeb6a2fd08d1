"""Which form "auto" takes: the record of this machine, and what stands in for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest

from moelocal import machine, metal
from moelocal.errors import ConfigError
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import choice
from moelocal.ops.choice import Choice, Entry, Stamp
from moelocal.ops.op import Op, force

STAMP = Stamp("Apple M4 Max", "15.3.1", "0.32.4", "abc")
WON = Entry("double", "1 row", "float32[2,3]", "metal", 1.25, 5e-6, 4e-6, 0.0, 1e-4)
LOST = replace(WON, form="portable", ratio=0.8)
WRONG = Entry("double", "2 rows", "float32[4,3]", "portable", None, None, None, 0.5, 1e-4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[None]:
    """A cache of the test's own, a device that never runs anything, and the machine `STAMP`."""
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(Stamp, "here", classmethod(lambda cls: STAMP))
    with metal.executing(lambda **_: pytest.fail("no kernel is run here")), choice.using(None):
        yield


def double(**options) -> Op:
    return Op(
        "double",
        reference=lambda x: ("reference", x),
        portable=lambda x: ("portable", x),
        metal=lambda x: ("metal", x),
        supports=options.pop("supports", lambda x: True),
        **options,
    )


def form(rows: int = 2, op: Op | None = None) -> str:
    return (op or double())(mx.zeros((rows, 3)))[0]


def test_without_a_record_no_unproven_kernel_runs():
    assert form() == "portable"


def test_without_a_record_a_proven_kernel_runs():
    with choice.using(Choice(proven=frozenset({"double"}))):
        assert form() == "metal"
        assert form(op=double(supports=lambda x: False)) == "portable"


def test_a_kernel_runs_for_the_shapes_where_it_won():
    with choice.using(Choice([WON])):
        assert form() == "metal"
        assert form(rows=5) == "portable"


def test_a_proven_kernel_does_not_run_where_it_lost():
    with choice.using(Choice([LOST], proven=frozenset({"double"}))):
        assert form() == "portable"
        assert form(rows=5) == "metal"


def test_a_kernel_that_was_wrong_for_one_shape_runs_for_none():
    with choice.using(Choice([WON, WRONG], proven=frozenset({"double"}))):
        assert {form(rows) for rows in (2, 4, 5)} == {"portable"}
        with force("metal"):
            assert form() == "metal"


def test_without_a_device_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(metal, "available", lambda: False)
    monkeypatch.setattr(choice, "current", lambda: pytest.fail("the record was read"))
    assert form() == "portable"


@pytest.mark.parametrize("name", ["reference", "portable", "metal"])
def test_the_override_holds_against_the_record(name: str):
    with force(name), choice.using(Choice([LOST if name == "metal" else WON])):
        assert form() == name


def test_a_key_of_its_own_joins_shapes():
    op = double(key=lambda x: choice.size_class(x.shape[0]))
    with choice.using(Choice([replace(WON, shapes="4")])):
        assert [form(rows, op) for rows in (3, 4, 7, 8)] == ["portable", "metal", "metal", "portable"]


def test_no_key_is_made_for_an_op_without_a_chance():
    op = double(key=lambda x: pytest.fail("a key was made"))
    with choice.using(Choice([LOST])):
        assert form(op=op) == "portable"


def test_size_classes():
    assert [choice.size_class(n) for n in (0, 1, 2, 3, 4, 1023, 1024, 5000)] == [
        0,
        1,
        2,
        2,
        4,
        512,
        1024,
        4096,
    ]


def test_a_key_has_dtypes_and_shapes_in_words():
    scales = mx.zeros((8, 1), mx.bfloat16)
    packed = QuantizedArray(mx.zeros((8, 8), mx.uint32), scales, None, QuantSpec(4, 32, "mxfp4"))

    def key(x: mx.array, eps: float) -> tuple:
        return choice.shapes(x, packed, None, 8, True, eps, mx.array(3), [x], packed.spec, mx.float16)

    assert choice.words(key(mx.zeros((1, 2)), 1e-6)) == (
        "float32[1,2] (uint32[8,8] bfloat16[8,1]) - 8 True - int32[] (float32[1,2]) "
        "QuantSpec(bits=4, group=32, mode='mxfp4') float16"
    )
    assert hash(key(mx.zeros((1, 2)), 1e-6)) == hash(key(mx.ones((1, 2)), 0.5))
    assert choice.words((mx.float32, 7)) == "float32 7"


def test_the_record_comes_back_as_it_was_written():
    choice.write(STAMP, [WON, WRONG])
    assert choice.read(STAMP) == (WON, WRONG)
    assert STAMP.file == machine.cache_folder() / "choices" / "apple-m4-max-macos-15.3.1-mlx-0.32.4.json"
    assert [file.name for file in STAMP.file.parent.iterdir()] == [STAMP.file.name]
    text = STAMP.file.read_text()
    assert '"chip": "Apple M4 Max"' in text and text.count("\n") > 20  # for people, too
    with choice.using(None):
        assert form(rows=2) == "portable"  # WRONG stands beside WON


def test_the_record_is_used():
    choice.write(STAMP, [WON])
    with choice.using(None):
        assert form() == "metal"


@pytest.mark.parametrize(
    "other", [{"chip": "Apple M4"}, {"macos": "15.4"}, {"mlx": "0.33.0"}, {"code": "other kernels"}]
)
def test_a_record_of_another_machine_or_version_is_not_used(other: dict[str, str]):
    choice.write(replace(STAMP, **other), [WON])
    assert choice.read(STAMP) is None
    with choice.using(None):
        assert form() == "portable"


def test_a_failed_write_leaves_the_old_record_and_nothing_else(monkeypatch):
    choice.write(STAMP, [WON])
    monkeypatch.setattr(
        choice.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(ConfigError, match=r"choices/apple-m4-max.*\.json: cannot be written: No space left"):
        choice.write(STAMP, [LOST])
    assert choice.read(STAMP) == (WON,)
    assert len(list(STAMP.file.parent.iterdir())) == 1


def damaged(**changes) -> str:
    raw = {"format": "moelocal kernel choices, 1", "chip": STAMP.chip, "macos": STAMP.macos, "mlx": STAMP.mlx}
    entry = {name: getattr(WON, name) for name in Entry.__slots__}
    return json.dumps({**raw, "code": STAMP.code, "entries": [entry], **changes})


ENTRY = json.loads(damaged())["entries"][0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"format": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "no record of kernel choices ('moelocal kernel choices, 1' is missing)"),
        ('{"format": "x"}', "no record of kernel choices ('moelocal kernel choices, 1' is missing)"),
        (
            damaged(chip="Apple M1"),
            "the record of another machine (Apple M1, macOS 15.3.1, MLX 0.32.4); "
            "this one is Apple M4 Max, macOS 15.3.1, MLX 0.32.4",
        ),
        (damaged(entries={}), "entries: expected a list, got {}"),
        (damaged(entries=[3]), f"entry 1: expected the keys {', '.join(ENTRY)}"),
        (damaged(entries=[ENTRY, ENTRY | {"x": 1}]), f"entry 2: expected the keys {', '.join(ENTRY)}"),
        (damaged(entries=[ENTRY | {"ratio": "1"}]), "entry 1: ratio: unexpected value '1'"),
        (damaged(entries=[ENTRY | {"error": True}]), "entry 1: error: unexpected value True"),
        (
            damaged(entries=[ENTRY | {"form": "host"}]),
            "entry 1: form: expected metal or portable, got 'host'",
        ),
    ],
)
def test_a_damaged_record_is_reported_in_one_line_and_ignored(text: str, reason: str, caplog):
    STAMP.file.parent.mkdir(parents=True)
    STAMP.file.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING), choice.using(None):
        assert form() == "portable"
        assert form() == "portable"
    expected = f"moelocal: {STAMP.file}: {reason}; ignored, `moelocal doctor --tune` writes a new one"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_the_undamaged_control_is_used():
    STAMP.file.parent.mkdir(parents=True)
    STAMP.file.write_text(damaged())
    with choice.using(None):
        assert form() == "metal"


def test_an_unreadable_record_is_reported(caplog):
    STAMP.file.mkdir(parents=True)
    with choice.using(None):
        assert form() == "portable"
    assert f"{STAMP.file}: cannot be read: Is a directory" in caplog.text


def test_the_stamp_of_this_machine_changes_with_kernels_and_ops(monkeypatch, tmp_path):
    monkeypatch.undo()
    before = Stamp.here()
    assert before == Stamp.here()
    assert before.mlx == mx.__version__
    (tmp_path / "new.metal").write_text("// a kernel")
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    assert Stamp.here().code != before.code
