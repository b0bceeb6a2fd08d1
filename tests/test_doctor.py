"""`moelocal doctor`: measuring with a clock and a device of the test's own, and what is printed and written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import mlx.core as mx
import pytest

import moelocal
import offmetal
from moelocal import metal
from moelocal.cli import main
from moelocal.config import MoESpec
from moelocal.doctor import command, measure
from moelocal.doctor.cases import LENGTH, SAMPLING, Case, cases
from moelocal.doctor.measure import PAIRS, WARM_UP, Agreement, agreement, chain, supported, tune
from moelocal.doctor.shapes import Shapes, arrays, flagship, of_checkpoint, packed_experts, random_weight
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.hub import EMBEDDED
from moelocal.ops import choice
from moelocal.ops.add_norm import add_norm
from moelocal.ops.attend import attend
from moelocal.ops.choice import PROVEN, Stamp
from moelocal.ops.experts import experts
from moelocal.ops.group_search import group_search
from moelocal.ops.op import Op, force
from parity.checkpoints import SMALL, Recipe, write

TWICE = 2 * mx.eye(8)
STAMP = Stamp("Apple M4 Max", "15.3.1", "0.32.4", "abc")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[None]:
    """A cache of the test's own on the machine `STAMP`, which has no Metal device unless a test puts one there. Without
    compilation, which on a CPU takes seconds."""
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path))
    monkeypatch.setattr(metal, "_on_metal", lambda: False)
    monkeypatch.setattr(Stamp, "here", classmethod(lambda cls: STAMP))
    mx.disable_compile()
    yield
    mx.enable_compile()


class Machine:
    """A device whose forms take as long as told, and the clock that sees it. Times are of a chain, in seconds."""

    def __init__(self, portable: Callable[[int], float], metal: Callable[[int], float]) -> None:
        self.now, self.order = 0.0, []
        self.broken: dict[tuple[str, str], BaseException] = {}  # what a case raises in a form
        self.seconds = {"portable": portable, "metal": metal}

    def clock(self) -> float:
        return self.now

    def prepare(self, case: Case, form: str) -> Callable[[], str]:
        if error := self.broken.get((case.name, form)):
            raise error
        return lambda: form

    def evaluate(self, form: str) -> None:
        self.now += self.seconds[form](self.order.count(form))
        self.order.append(form)

    def tune(self, *cases: Case, check: Callable[[Case], Agreement] = lambda case: Agreement(0.0, 1e-4)):
        return [tune(case, self.clock, self.prepare, self.evaluate, check) for case in cases]


def case(op: Op | None = None, name: str = "1 row") -> Case:
    return Case(op or double(), name, lambda i, last: (mx.ones((1, 8)) if last is None else last,), LENGTH)


def double(metal: Callable | None = lambda x: x * 2, **options) -> Op:
    return Op("double", reference=lambda x: x + x, portable=lambda x: x @ TWICE, metal=metal, **options)


@pytest.mark.parametrize(("gain", "form"), [(1.029, "portable"), (1.031, "metal"), (0.5, "portable")])
def test_a_kernel_is_kept_from_three_percent_on(gain: float, form: str):
    [(entry, _)] = Machine(lambda i: gain, lambda i: 1.0).tune(case())
    assert entry.form == form
    assert entry.ratio == pytest.approx(gain)
    assert entry.portable_seconds == pytest.approx(gain / LENGTH)
    assert entry.metal_seconds == pytest.approx(1 / LENGTH)
    assert (entry.op, entry.case, entry.shapes) == ("double", "1 row", "float32[1,8]")


def test_a_few_slow_moments_decide_nothing():
    # ten of the pairs, and the mean with them, speak for the kernel; the median does not
    noisy = Machine(lambda i: 100.0 if i % 2 == 0 and i < 2 * 10 else 1.0, lambda i: 1.0)
    [(entry, _)] = noisy.tune(case())
    assert entry.form == "portable" and entry.ratio == 1.0
    slow = Machine(lambda i: 1.05, lambda i: 50.0 if i % 3 == 0 else 1.0)
    assert slow.tune(case())[0][0].form == "metal"


def test_a_machine_that_slows_down_meanwhile_decides_nothing():
    # both forms take longer and longer: pairs are compared with each other, not early ones with late ones
    [(entry, _)] = Machine(lambda i: 1.05 * 1.1**i, lambda i: 1.1**i).tune(case())
    assert entry.form == "metal" and entry.ratio == pytest.approx(1.05)


def test_the_forms_take_turns_and_the_first_runs_do_not_count():
    machine = Machine(lambda i: 50.0 if i < WARM_UP else 1.0, lambda i: 1.0)
    [(entry, _)] = machine.tune(case())
    assert (
        machine.order
        == (["portable", "metal", "metal", "portable"] * (WARM_UP + PAIRS))[: 2 * (WARM_UP + PAIRS)]
    )
    assert entry.portable_seconds == 1.0 / LENGTH


def test_a_wrong_kernel_is_never_kept_nor_timed():
    machine = Machine(lambda i: 100.0, lambda i: 1.0)
    [(entry, found)] = machine.tune(case(), check=lambda case: Agreement(0.2, 1e-4))
    assert (entry.form, entry.ratio, entry.error, entry.bound) == ("portable", None, 0.2, 1e-4)
    assert not found.right
    assert machine.order == []


def test_only_what_a_kernel_supports_is_measured():
    none = double(metal=None)
    other = double(supports=lambda x: x.shape[0] > 1)
    assert [supported(case(op)) for op in (double(), none, other)] == [True, False, False]


def test_agreement_sees_wrong_values_shapes_dtypes_and_failures():
    def found(metal: Callable) -> Agreement:
        return agreement(case(double(metal)))

    assert found(lambda x: x * 2) == Agreement(0.0, 1e-4)
    assert found(lambda x: x * 2.002).error == pytest.approx(1e-3, rel=0.1)
    assert not found(lambda x: x * 2.002).right
    assert found(lambda x: x * 2 + 1e-5).right
    assert found(lambda x: x[:, :4] * 2).problem == "outputs of another shape or dtype than the reference"
    assert found(lambda x: (x * 2).astype(mx.float16)).problem == found(lambda x: x[:, :4] * 2).problem
    assert found(lambda x: x / 0).problem == "gives NaN or infinite values"
    assert not found(lambda x: x / 0).right

    def broken(x: mx.array) -> mx.array:
        raise RuntimeError("program_source:3: error: no such function\nmore of it")

    assert found(broken) == Agreement(None, 0.0, "program_source:3: error: no such function more of it")


def test_agreement_is_that_of_the_worst_output():
    op = Op(
        "two",
        reference=lambda x: (x, mx.array([1, 2, 3, 4]), x.astype(mx.bfloat16)),
        portable=lambda x: x,
        metal=lambda x: (x + 5e-5, mx.array([1, 2, 4, 4]), x.astype(mx.bfloat16)),
    )
    assert agreement(case(op)) == Agreement(0.25, 0.0)


def test_a_lost_expert_is_seen_at_the_sizes_and_the_dtype_of_the_flagship():
    mx.random.seed(1)
    shapes = flagship()
    layer = shapes.config.layers[0]
    assert isinstance(layer.mlp, MoESpec)
    eight = replace(layer.mlp, experts=8)  # the others are not chosen
    config = replace(shapes.config, layers=(replace(layer, mlp=eight),))
    kind = packed_experts(eight, config.hidden, shapes.dtype)
    [measured] = [c for c in cases(Shapes(config, shapes.dtype, (kind,)), length=1) if c.op is experts]

    def without(lost: int | None, with_shared: bool = True) -> Agreement:
        def metal(x, routed, chosen, weights, shared, share, residual):
            weights = weights if lost is None else mx.where(chosen == lost, 0, weights)
            share = share if with_shared else share * 0
            return experts.reference(x, routed, chosen, weights, shared, share, residual)

        op = Op("experts", reference=experts.reference, portable=experts.portable, metal=metal)
        return agreement(replace(measured, op=op))

    assert without(None) == Agreement(0.0, 2**-8)
    assert [without(expert).right for expert in range(8)] == [False] * 8
    assert not without(None, with_shared=False).right


def test_a_kernel_that_forgets_how_long_a_context_is_is_seen():
    mx.random.seed(2)
    [measured] = [c for c in cases(flagship(), length=1) if c.name == "1 token, 256 keys"]

    def off_by(keys: int) -> Agreement:
        def metal(q, k, v, scale, hidden, gate, length):
            return attend.reference(q, k, v, scale, hidden, gate, length + keys)

        op = Op("attend", reference=attend.reference, portable=attend.portable, metal=metal)
        return agreement(replace(measured, op=op))

    assert off_by(0).right
    assert [off_by(keys).right for keys in (-1, 1, 128)] == [False] * 3


def test_a_chain_reads_what_the_call_before_wrote():
    mx.enable_compile()
    start = chain(replace(case(), length=5), "portable")
    first, second = start(), start()
    mx.eval(first, second)
    assert [a[0, 0].item() for a in first] == [2, 4, 8, 16, 32] == [a[0, 0].item() for a in second]


# --- the cases ---


@pytest.fixture(scope="module")
def small() -> list[Case]:
    """At the shapes of the embedded model, whose experts are not packed, and of packed ones."""
    shapes = of_checkpoint(EMBEDDED, mx.float32)
    mlp = shapes.config.layers[0].mlp
    assert isinstance(mlp, MoESpec)
    packed = packed_experts(mlp, shapes.config.hidden, mx.float32)
    return list(cases(replace(shapes, experts=(*shapes.experts, packed)), length=3))


def keys(of: list[Case]) -> set[tuple[str, str]]:
    return {(c.op.name, choice.words(c.op.key(*c.step(0, None)))) for c in of}


def listen(monkeypatch) -> set[tuple[str, str]]:
    """From now on collects what every call of an op looks up."""
    asked: set[tuple[str, str]] = set()
    call = Op.__call__

    def listening(self: Op, *args, **kwargs):
        asked.add((self.name, choice.words(self.key(*args, **kwargs))))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", listening)
    return asked


@pytest.mark.parametrize(
    ("family", "kv_bits"),
    [
        *((family, None) for family in ("embedded", "qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")),
        *(("embedded", bits) for bits in (8, 4)),
    ],
)
def test_cases_are_what_a_decode_step_asks_for(family, kv_bits, tmp_path, monkeypatch):
    """Otherwise the record would hold entries that nothing looks up."""
    folder = EMBEDDED if family == "embedded" else write(tmp_path / "model", Recipe(family, **SMALL))
    measured = list(cases(of_checkpoint(folder, mx.float32), length=2))
    model = moelocal.load(folder, dtype="float32", kv_bits=kv_bits)
    cache = model.new_cache()
    mx.eval(model(mx.array([[5] * 300]), cache))
    asked = listen(monkeypatch)
    mx.eval(model(mx.array([[5]]), cache))
    of_interest = {pair for pair in asked if pair[0] in {c.op.name for c in measured}}
    expected = {"prologue", "attend" if kv_bits is None else "attend_packed"}
    expected |= set() if family == "qwen3_moe" else {"delta_net"}
    expected |= set() if family == "qwen3_5" else {"router", "route", "experts"}
    assert {name for name, _ in of_interest} >= expected
    assert of_interest <= keys(measured)


@pytest.mark.parametrize("position", [1, 254, 255, 256, 300, 600])
def test_attention_finds_its_choice_however_full_the_cache_is(position, small, monkeypatch):
    """The choice goes by the room of the buffer, of which a step gets all."""
    entries = [
        choice.Entry("attend", c.name, words, "metal", 2.0, 2e-6, 1e-6, 0.0, 1e-4)
        for c in small
        for name, words in keys([c])
        if name == "attend"
    ]
    model = moelocal.load(dtype="float32")
    cache = model.new_cache()
    mx.eval(model(mx.array([[5] * position]), cache))
    asked = []
    with choice.using(choice.Choice(entries)):
        monkeypatch.setattr(attend, "supports", lambda *args: asked.append(args))  # None: not here, after all
        with metal.executing(lambda **binding: None):
            mx.eval(model(mx.array([[5]]), cache))
    assert asked
    for args in asked:
        assert len(args) == len(measured_arguments(small)) and args[6].item() == position + 1


def measured_arguments(of: list[Case]) -> tuple:
    return next(c.step(0, None) for c in of if c.op is attend)


def test_every_call_has_experts_of_its_own(small):
    """Else they would come from a cache."""
    for measured in (c for c in small if c.op is experts):
        blocks = [measured.step(i, None)[4] for i in range(3)]
        if blocks[0] is not None:
            assert len({id(array) for block in blocks for array in block.arrays}) == 3 * len(blocks[0].arrays)
        chosen = [set(measured.step(i, None)[2].reshape(-1).tolist()) for i in range(2)]
        assert not chosen[0] & chosen[1]


def test_cases_are_what_a_draw_asks_for(small, monkeypatch):
    model = moelocal.load(dtype="float32")
    asked = listen(monkeypatch)
    for top_k, top_p in SAMPLING:
        sampling = moelocal.Sampling(temperature=1, top_k=top_k, top_p=top_p)
        moelocal.generate(model, "Hi", sampling=sampling, max_tokens=2, seed=1)
    drawn = {pair for pair in asked if pair[0] == "sample"}
    assert len(drawn) == len(SAMPLING)
    assert drawn <= keys(small)


FORMATS = [
    *(QuantSpec(bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    *(QuantSpec(4, 32, "mxfp4"), QuantSpec(8, 32, "mxfp8"), QuantSpec(4, 16, "nvfp4")),
]


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_random_weights_keep_outputs_of_the_size_of_inputs(spec: QuantSpec):
    template = QuantizedArray(
        *mx.quantize(mx.zeros((64, 256)), spec.group, spec.bits, mode=spec.mode)[:2], None, spec
    )
    if spec.has_biases:
        template = replace(template, biases=template.scales)
    y = mx.random.normal((8, 256)) @ random_weight(template).dequantize(mx.float32).T
    assert 0.1 < mx.std(y).item() < 10


def test_every_op_with_a_kernel_has_a_case(small):
    assert {op.name for op in command.all_ops() if op.metal is not None} <= {c.op.name for c in small}


def runs(case: Case) -> None:
    outputs = chain(case, "portable")()
    outputs = outputs() if callable(outputs) else outputs
    mx.eval(outputs)
    assert all(mx.all(mx.isfinite(a.astype(mx.float32))).item() for a in outputs)
    expected = arrays(case.op.reference(*case.step(0, None)))
    assert [a.shape for a in outputs[: len(expected)]] == [a.shape for a in expected]


def test_every_case_runs_in_its_stock_form(small):
    for case in small:
        runs(case)


@pytest.fixture(params=["simulator", pytest.param("device", marks=pytest.mark.metal)])
def runs_kernels(request, monkeypatch) -> Iterator[None]:
    """The simulator, and where there is one the device."""
    if request.param == "device":
        if not mx.metal.is_available():
            pytest.skip("there is no Metal device here")
        monkeypatch.setattr(metal, "_on_metal", lambda: True)
        yield
    elif sys.platform == "darwin":
        pytest.skip("the simulator has run on Linux only; -m metal takes the device")
    else:
        with metal.executing(offmetal.emulated_kernel), offmetal.options(checked=False):
            yield


def test_every_kernel_agrees_at_the_sizes_of_the_embedded_model(small, runs_kernels):
    """By the bounds that `doctor` has; those of tests/kernels are tighter."""
    found = {f"{c.op.name} ({c.name})": agreement(c) for c in small if supported(c)}
    assert {name.split()[0] for name in found} == {op.name for op in command.all_ops() if op.metal}
    assert all(each.right for each in found.values()), found


@pytest.mark.slow
def test_every_kernel_agrees_at_the_sizes_of_the_flagship(monkeypatch, runs_kernels):
    monkeypatch.setattr("moelocal.doctor.cases.CONTEXTS", (4096,))
    count = 0
    for each in cases(flagship(), length=2):
        assert supported(each), each.name
        if each.op is group_search:  # a minute in the simulator, and no shape of the model
            continue
        found = agreement(each)
        assert found.right, (each.op.name, each.name, found)
        count += 1
    assert count == 14


@pytest.mark.slow
def test_every_case_runs_compiled(small):
    mx.enable_compile()
    for case in small:
        runs(case)


def test_the_calls_of_a_chain_differ(small):
    """Equal calls would be computed once: the compiled form would do less than a decode step."""
    for case in (c for c in small if c.lazy):
        outputs = chain(case, "portable")()
        each = len(outputs) // 3
        floats = [i for i in range(each) if outputs[i].dtype == mx.float32]
        for i in floats:
            assert not mx.array_equal(outputs[i], outputs[i + each]), f"{case.op.name}, output {i}"


def test_the_flagship_is_measured_at_its_sizes():
    shapes = flagship()
    [kind] = shapes.experts
    assert kind.shared is not None and kind.router.stored is not None
    routed, shared, router = (
        sum(a.nbytes for a in weights.arrays) for weights in (kind.routed, kind.shared, kind.router.stored)
    )
    # over 40 layers: 566.2 MB of routed and 70.8 MB of shared experts, 22.4 MB of routers
    assert routed * 40 * 8 // 256 == pytest.approx(566.2e6, rel=1e-3)
    assert shared * 40 == pytest.approx(70.8e6, rel=1e-3)
    assert router * 40 == pytest.approx(22.4e6, rel=1e-2)
    assert len(shapes.config.layers) == 40
    assert {type(layer.mixer).__name__ for layer in shapes.config.layers} == {"AttentionSpec", "DeltaNetSpec"}


# --- the command ---


def test_doctor_explains_itself_without_metal(capsys, monkeypatch):
    monkeypatch.setattr(command, "on_cpu", lambda: True)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "machine   Apple M4 Max" in out
    assert "Metal     no: stock MLX and host forms are used" in out
    assert "record    none\n" in out
    assert re.search(r"^add_norm +portable +no Metal device$", out, re.MULTILINE)
    assert re.search(r"^linear +portable +has no kernel; host for many rows of float32$", out, re.MULTILINE)

    monkeypatch.setattr(command, "on_cpu", lambda: False)
    assert main(["doctor"]) == 0
    assert re.search(r"^linear +portable +has no kernel$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("flag", ["--tune", "--kernels"])
def test_without_metal_there_is_nothing_to_measure(flag: str, capsys):
    assert main(["doctor", flag]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == f"moelocal: error: doctor {flag}: there is no Metal device here, so there is no kernel to run\n"
    )


def test_tune_does_not_look_for_a_model_without_metal(capsys):
    assert main(["doctor", "--tune", "no/such"]) == 1
    assert "no Metal device" in capsys.readouterr().err


def reference_of_add_norm(**binding):
    """An executor whose kernel is always right."""
    return lambda *, inputs, **launch: add_norm.reference(*inputs)


@pytest.fixture
def device(monkeypatch) -> Iterator[Machine]:
    """A device that can add and norm, a clock on which its kernel takes half the time, and the cases of `add_norm`."""
    machine = Machine(lambda i: 2e-3, lambda i: 1e-3)

    def only_add_norm(shapes: Shapes) -> Iterator[Case]:
        return (c for c in islice(cases(shapes, length=3), 2) if c.op is add_norm)

    timed = {"clock": machine.clock, "prepare": machine.prepare, "evaluate": machine.evaluate}
    monkeypatch.setattr(command, "cases", only_add_norm)
    monkeypatch.setattr(command, "tune", partial(tune, **timed))
    monkeypatch.setattr(command, "speed", partial(measure.speed, **timed))
    with metal.executing(reference_of_add_norm), choice.using(None):
        yield machine


def test_tune_keeps_what_wins_and_doctor_says_so(device, capsys):
    assert main(["doctor", "--tune"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^add_norm +1 token +666\.7 us +333\.3 us +2\.00 +yes$", out, re.MULTILINE)
    assert out.endswith(f"written to {STAMP.file}\n")
    [entry] = choice.read(STAMP) or ()
    assert (entry.op, entry.form, entry.ratio) == ("add_norm", "metal", 2.0)
    x = mx.zeros((1, 1, 2048), mx.bfloat16)
    assert choice.current().takes_metal("add_norm", add_norm.key(x, x, mx.zeros((x.shape[-1],)), 1e-6))

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"record    {STAMP.file}" in out
    assert re.search(r"^add_norm +portable +kernel not proven, but where it won here:$", out, re.MULTILINE)
    assert re.search(r"^  1 token +metal +2.00 times as fast as stock MLX$", out, re.MULTILINE)


def test_tune_takes_the_shapes_of_a_model(device):
    assert main(["doctor", "--tune", str(EMBEDDED)]) == 0
    [entry] = choice.read(STAMP) or ()
    assert entry.shapes == "float32[1,1,128] float32[1,1,128] float32[128] -".replace(
        "float32[1,1", f"{choice.words(of_checkpoint(EMBEDDED).dtype)}[1,1"
    )


def test_tune_names_a_model_that_is_not_there(device, capsys):
    assert main(["doctor", "--tune", "no/such/folder"]) == 1
    assert capsys.readouterr().err.startswith("moelocal: error: no/such/folder: no such folder")


def test_doctor_says_that_a_record_is_missing_or_old(device, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "record    none: `moelocal doctor --tune` makes one" in out
    assert re.search(r"^add_norm +portable +kernel not proven$", out, re.MULTILINE)
    choice.write(replace(STAMP, code="older"), [])
    assert main(["doctor"]) == 0
    assert "record    made with other kernels: `moelocal doctor --tune` makes one" in capsys.readouterr().out


def test_doctor_names_the_override_as_the_reason(device, capsys):
    with force("metal"):
        assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^add_norm +metal +MOELOCAL_OPS$", out, re.MULTILINE)
    assert re.search(r"^linear +portable +has no kernel", out, re.MULTILINE)


def test_tuning_again_replaces_what_it_measures_and_keeps_the_rest(device, capsys):
    assert main(["doctor", "--tune"]) == 0
    [mine] = choice.read(STAMP) or ()
    other = choice.Entry("delta_net", "1 token", "x", "metal", 1.5, 3e-6, 2e-6, 0.0, 1e-4)
    choice.write(STAMP, [mine, other])
    device.seconds["metal"] = lambda i: 4e-3
    assert main(["doctor", "--tune"]) == 0
    entries = {entry.op: entry for entry in choice.read(STAMP) or ()}
    assert entries["delta_net"] == other
    assert (entries["add_norm"].form, entries["add_norm"].ratio) == ("portable", 0.5)


def test_a_wrong_kernel_is_reported_and_refused(device, capsys, monkeypatch):
    monkeypatch.setattr(add_norm, "metal", lambda x, r, weight, eps: (x, r))
    assert main(["doctor", "--tune"]) == 1
    out, err = capsys.readouterr()
    assert "WRONG: differs from the reference by" in out
    assert err == (
        "moelocal: error: wrong on this machine and not used: add_norm (1 token); please report this\n"
    )
    assert [entry.form for entry in choice.read(STAMP) or ()] == ["portable"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^add_norm +portable +its kernel is WRONG on this machine:$", out, re.MULTILINE)

    assert main(["doctor", "--kernels"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^add_norm +1 token +FAIL +differs from the reference by", out, re.MULTILINE)
    assert "add_norm (1 token)" in err


@pytest.fixture
def three(device, monkeypatch) -> Machine:
    """The device, with three cases for it."""

    def rows(count: int) -> Case:
        x = mx.ones((count, 8))
        return Case(double(), f"{count} rows", lambda i, last: (x if last is None else last,), LENGTH)

    monkeypatch.setattr(command, "cases", lambda shapes: map(rows, (1, 2, 3)))
    return device


@pytest.mark.parametrize("flag", ["--tune", "--kernels"])
@pytest.mark.parametrize("error", [RuntimeError("[metal::malloc] Unable\nto allocate"), MemoryError()])
def test_a_case_that_cannot_be_measured_costs_no_other(flag, error, three, capsys):
    three.broken["2 rows", "metal"] = error
    assert main(["doctor", flag]) == 1
    out, err = capsys.readouterr()
    why = "[metal::malloc] Unable to allocate" if str(error) else "MemoryError"
    assert f"\ndouble            2 rows                   not measured: {why}\n" in out
    assert re.search(r"^double +3 rows +(pass|\d)", out, re.MULTILINE)
    assert err == "moelocal: error: could not be measured: double (2 rows)\n"
    if flag == "--tune":
        assert [entry.case for entry in choice.read(STAMP) or ()] == ["1 rows", "3 rows"]


@pytest.mark.parametrize("flag", ["--tune", "--kernels"])
def test_a_reference_that_cannot_be_computed_costs_no_other_case(flag, three, capsys, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    def too_large(case: Case) -> Agreement:
        return agreement(replace(case, expected=fail) if case.name == "2 rows" else case)

    monkeypatch.setattr(command, "agreement", too_large)
    monkeypatch.setattr(command, "tune", partial(command.tune, check=too_large))
    assert main(["doctor", flag]) == 1
    out, err = capsys.readouterr()
    assert "2 rows                   not measured: out of memory\n" in out
    assert re.search(r"^double +3 rows +(pass|\d)", out, re.MULTILINE)
    assert err == "moelocal: error: could not be measured: double (2 rows)\n"


def test_wrong_and_unmeasured_kernels_are_both_named(three, capsys, monkeypatch):
    monkeypatch.setattr(
        command,
        "tune",
        partial(command.tune, check=lambda case: Agreement(float(case.name == "1 rows"), 1e-4)),
    )
    three.broken["3 rows", "portable"] = RuntimeError("no")
    assert main(["doctor", "--tune"]) == 1
    assert capsys.readouterr().err == (
        "moelocal: error: wrong on this machine and not used: double (1 rows); please report this; "
        "could not be measured: double (3 rows)\n"
    )
    assert [entry.ratio for entry in choice.read(STAMP) or ()] == [None, 2.0]


def test_what_was_measured_before_ctrl_c_is_kept(three, capsys):
    three.broken["3 rows", "portable"] = KeyboardInterrupt()
    assert main(["doctor", "--tune"]) == 130
    assert capsys.readouterr().out.endswith(f"\nstopped; what was measured is in {STAMP.file}\n")
    assert [entry.case for entry in choice.read(STAMP) or ()] == ["1 rows", "2 rows"]


def test_ctrl_c_before_anything_was_measured_leaves_no_record(three, capsys):
    three.broken["1 rows", "portable"] = KeyboardInterrupt()
    assert main(["doctor", "--tune"]) == 130
    assert str(STAMP.file) not in capsys.readouterr().out
    assert not STAMP.file.exists()


def test_a_case_that_cannot_be_measured_again_keeps_its_entry(three, capsys):
    assert main(["doctor", "--tune"]) == 0
    before = choice.read(STAMP)
    three.broken |= {(f"{rows} rows", "portable"): RuntimeError("no") for rows in (1, 2, 3)}
    assert main(["doctor", "--tune"]) == 1
    assert "written to" not in capsys.readouterr().out.splitlines()[-1]
    assert choice.read(STAMP) == before


def test_kernels_are_run_against_their_references(device, capsys):
    device.seconds["metal"] = lambda i: 3e-6  # a microsecond a call
    assert main(["doctor", "--kernels"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"^add_norm +1 token +pass +(\S+) +(\S+) +(\S+)$", out, re.MULTILINE)
    assert found
    assert float(found[1]) <= float(found[2])
    nbytes = 4 * 2048 * 2 + 2048 * 4  # two rows in, two out, and the float32 weight
    assert float(found[3]) == round(nbytes / 1e-6 / 1e9, 1)


def test_a_damaged_record_is_named_by_doctor_and_replaced_by_tune(device, capsys):
    STAMP.file.parent.mkdir(parents=True)
    STAMP.file.write_text("{")
    assert main(["doctor"]) == 0
    assert f"record    ignored: {STAMP.file}: not valid JSON" in capsys.readouterr().out
    assert main(["doctor", "--tune"]) == 0
    assert f"{STAMP.file}: not valid JSON; replaced" in capsys.readouterr().out
    assert choice.read(STAMP)


def test_a_bad_override_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MOELOCAL_OPS", "fast")
    monkeypatch.setattr("moelocal.ops.op._forced", None)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moelocal: error: MOELOCAL_OPS: expected one of") and err.count("\n") == 1


# --- kernels/README.md ---


def rows(root) -> list[list[str]]:
    lines = (root / "kernels" / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def test_every_kernel_file_has_a_row(root):
    assert {row[0].strip("`") for row in rows(root)} == {f.name for f in (root / "kernels").glob("*.metal")}


def test_the_kernels_called_proven_are_those_that_run_unasked(root):
    proven = {op.strip("` ") for row in rows(root) if row[3] != "no" for op in row[2].split(",")}
    assert proven == PROVEN
    assert {row[3] for row in rows(root)}  # there are rows to look at
