"""The arithmetic of a GPU against its plain form: the same bits.

These tests run on a CUDA device where there is one. Elsewhere `test_all_of_this_under_the_interpreter` runs them in
another process, whose kernels Triton interprets on the CPU.
"""

import subprocess
import sys
from itertools import product

import pytest
import torch

from cases import spread
from processes import passes_interpreted
from revwire import Bdia, Dr2Net, Midpoint, Momentum, Re2TAL
from revwire._streams import fused
from revwire._streams.fixed import FixedStreams
from revwire.couplings.base import Rule

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = fused.serves(torch.device(DEVICE))

on_device = pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or Triton's interpreter")

COUPLINGS = [
    *(Re2TAL(), *(Bdia(2.0**-m) for m in range(1, 8)), *(Momentum(2.0**-m) for m in range(1, 8))),
    *(Dr2Net(0.3, 2.0**-m) for m in range(8)),
    *(Midpoint(1 / 4, 0.7), Midpoint(1.0)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["flat", "channels last", "transposed", "other"]
SIZES = [1, 7, 8, 9, 63, 1000]
SCALE = 20


@pytest.mark.skipif(RUNS, reason="this is that process, or a device")
def test_all_of_this_under_the_interpreter():
    passes_interpreted(__file__)


@pytest.mark.skipif(fused.INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("name", ["advance", "retreat"])
@pytest.mark.parametrize("m", [0, 7])
def test_a_device_adds_and_multiplies_as_it_is_written(name, m):
    """Compiled for a GPU, which need not be there: one fused operation for each element of a thread, and no other."""
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    kernel = getattr(fused._kernels(), name)
    kinds = {"x": "*fp32", "f": "*bf16", "value": "*fp32", "bits": "*u8", "n": "i64", "span": "i64"}
    kinds |= dict.fromkeys(("previous", "following", "state", "sums", "reached"), "*i32")
    kinds |= dict.fromkeys(("a", "c", "one"), "fp32")
    fixed = {"M": m, "NEGATIVE": True, "ADDS": True, "KEEP": m > 0, "SPELLED": False, "BLOCK": 256}
    fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names}
    signature = {key: kinds.get(key, "constexpr") for key in kernel.arg_names}
    made = triton.compile(
        compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed),
        target=backends.GPUTarget("cuda", 80, 32),
        options={"enable_fp_fusion": False},
    ).asm["ptx"]
    each = 256 * 8 // 128
    assert made.count("fma.rn.f32") == each
    assert made.count("mul.rn.f32") + made.count("mul.f32") == each * (2 if name == "advance" else 1)
    assert made.count("add.rn.f32") == 2 * each
    assert made.count("neg.f32") + made.count("sub.rn.f32") == each  # some versions subtract from zero
    assert not any(word in made for word in (".ftz", ".approx", "mad.f32", ".f64"))


def test_where_triton_fails_the_plain_form_does(monkeypatch):
    def fails(state):
        raise RuntimeError("Failed to find C compiler")

    fused._compiles_for.cache_clear()
    monkeypatch.setattr(fused, "summed", fails)
    monkeypatch.setattr(fused, "INTERPRETED", True)
    with pytest.warns(UserWarning, match=r"Triton: got RuntimeError on cpu \(Failed.*The plain arithmetic"):
        assert not fused.serves(torch.device("cpu"))
    assert FixedStreams.for_range(1.0, torch.float32).form is not fused  # said once
    fused._compiles_for.cache_clear()


@pytest.mark.skipif(fused.INTERPRETED, reason="the process that starts this one asks it, too")
def test_importing_revwire_imports_no_triton():
    code = "import sys, revwire, revwire._streams.fused; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def tensors_of(size, layout, dtype, seed=0):
    """(x_{k-1}, x_k, f); where the layout is another for ``f``, that of the kernels must be made."""
    g = torch.Generator().manual_seed(seed)
    shape = {"flat": (size,), "channels last": (1, 2, size, 2), "transposed": (size, 3), "other": (size, 3)}[layout]
    before, x, f = (4 * torch.randn(shape, generator=g) for _ in range(3))
    if layout == "channels last":
        before, x, f = (t.to(memory_format=torch.channels_last) for t in (before, x, f))
    elif layout == "transposed":
        before, x, f = before.t(), x.t(), f.t()
    elif layout == "other":
        f = f.t().contiguous().t()
    return before.to(DEVICE), x.to(DEVICE), f.to(DEVICE, dtype)


def both(scale=SCALE):
    return FixedStreams(scale, torch.int32, fused), FixedStreams(scale, torch.int32)


def same(a, b):
    """Equal to the bit, in one layout."""
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def check(rule, before, x, f, scale=SCALE):
    """Step and unstep, in both forms."""
    mine, plain = both(scale)
    previous, current = plain.enter(before), plain.enter(x)
    x = mine.read(current)
    assert same(x, plain.read(current))
    step, expected = mine.step(previous, x, f, rule), plain.step(previous, x, f, rule)
    assert step.reached is not None
    assert same(step.state, expected.state)
    assert same(step.value, plain.read(expected.state))
    assert (step.bits is None) == (expected.bits is None)
    assert step.bits is None or same(step.bits, expected.bits)
    assert step.reached.amax() == step.value.abs().amax()
    undone = mine.unstep(step.state, x, f, rule, step.bits)
    assert same(undone.state, previous)
    assert same(plain.unstep(step.state, x, f, rule, step.bits).state, previous)
    assert same(undone.summary, step.summary)
    assert same(mine.summary(previous), step.summary)
    assert step.summary.sum(dtype=torch.int32) == previous.sum(dtype=torch.int32)
    assert mine.step(previous, x, f, rule, undone=False).bits is None
    for dtype in DTYPES:
        done = mine.step(previous, current, f, rule, dtype=dtype)
        assert same(done.state, expected.state)
        assert same(done.value, step.value.to(dtype))
    assert same(mine.unstep(step.state, current, f, rule, step.bits).state, previous)


@on_device
@pytest.mark.parametrize("coupling", COUPLINGS, ids=lambda c: c.name)
@pytest.mark.parametrize("kind", ["residual", "block"])
def test_both_forms_have_the_same_bits(coupling, kind):
    """Dtypes, layouts and sizes come round."""
    rule = Rule.of(coupling.coefficients if kind == "residual" else coupling.coefficients.for_block)
    i = COUPLINGS.index(coupling)
    check(rule, *tensors_of(SIZES[i % len(SIZES)], LAYOUTS[i // 2 % len(LAYOUTS)], DTYPES[i % len(DTYPES)], i))


@on_device
@pytest.mark.parametrize(("layout", "dtype", "m"), spread(LAYOUTS, DTYPES, range(8)))
def test_every_layout_dtype_and_number_of_bits(layout, dtype, m):
    rule = Rule.of(Dr2Net(7 / 8, 2.0**-m).coefficients)
    check(rule, *tensors_of(SIZES[m % len(SIZES)], layout, dtype, m))


@on_device
@pytest.mark.parametrize("size", [2**16 - 1, 2**16 + 8, 2**17 + 5, *([] if fused.INTERPRETED else [2**21])])
def test_large_states(size):
    """More than one tile, also of the interpreter's, and a last one that is not full."""
    assert size < 2**17 or fused._tiles(size)[1] > 1
    check(Rule.of(Bdia(1 / 128).coefficients), *tensors_of(size, "flat", torch.float32))


@on_device
@pytest.mark.parametrize("scale", [-3, 0, 9, 17, 25, 40])
def test_every_rounding_is_the_plain_forms(scale):
    """Halves, which go to the even integer, and products whose last bits decide."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(scale)) * 2.0 ** (22 - scale)
    f = (torch.randint(-(2**20), 2**20, (5000,), generator=torch.Generator().manual_seed(1)) + 0.5) * 2.0**-scale
    for coupling in (Dr2Net(1 / 3, 1 / 2), Dr2Net(0.0, 1.0), Momentum(1 / 8)):
        check(Rule.of(coupling.coefficients), x.flip(0).to(DEVICE), x.to(DEVICE), f.to(DEVICE), scale)


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 2.0**10, -(2.0**10), 2.0**11])
@pytest.mark.parametrize("at", [0, 17, 99])
@pytest.mark.parametrize("coupling", [Re2TAL(), Bdia(1 / 16), Momentum(1 / 8)], ids=lambda c: c.name)
def test_what_is_out_of_range_is_told(value, at, coupling):
    streams, f = both()[0], torch.zeros(100, device=DEVICE)
    f[at] = value / coupling.coefficients.c
    start = streams.enter(torch.zeros(100, device=DEVICE))
    rule = Rule.of(coupling.coefficients)
    step = streams.step(start, streams.read(start), f, rule)
    met = step.reached.amax()
    assert not met < streams.bound
    assert met.isfinite() == (abs(value) < float("inf"))
    assert not met.isfinite() or met >= abs(value) * (1 - 1e-6)
    assert step.value.isnan().nonzero().flatten().tolist() == [at]
    assert same(streams.read(step.state).isnan(), step.value.isnan())


@on_device
def test_a_value_out_of_range_stays_one_though_a_branch_hides_it():
    streams, rule = both()[0], Rule.of(Re2TAL().coefficients)
    f = torch.zeros(100, device=DEVICE)
    previous = streams.enter(f)
    f[3] = 2.0**12
    bad = streams.step(previous, streams.read(previous), f, rule)
    hidden = streams.step(bad.state, bad.value.nan_to_num(), torch.zeros_like(f), rule)
    assert hidden.value.isnan().nonzero().flatten().tolist() == [3]
    assert hidden.reached.amax().isnan()


@on_device
@pytest.mark.parametrize("size", [1, 999, 2**17 + 3])
def test_a_change_anywhere_shows_in_the_summary(size):
    streams, state = both()[0], torch.arange(size, dtype=torch.int32, device=DEVICE)
    before = streams.summary(state)
    for at in {0, size // 8, size // 2, size - 1}:
        other = state.clone()
        other[at] ^= 1
        assert not torch.equal(before, streams.summary(other))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_those_of_the_plain_form(dtype):
    mine, plain = both()
    wide, image = torch.randn(40, 60, device=DEVICE), torch.randn(2, 3, 4, 5, device=DEVICE)
    kinds = [wide, wide.t(), wide[:, ::3], wide[3:, 7:9], image.to(memory_format=torch.channels_last), wide[0, :1]]
    tensors = [t.to(dtype) if t.is_contiguous() else t for t in kinds]
    for f, count in product(tensors, range(3)):
        for saved in (tensors[:count], tensors[-count:] if count else []):
            got, expected = mine.sample(f, saved), plain.sample(f, saved)
            assert same(got.values, expected.values)
            assert fused.sampled(f, saved, 64, 16) is not None


@on_device
def test_tensors_of_other_kinds_are_left_to_the_plain_form():
    class Wrapped(torch.Tensor):
        pass

    plain = torch.randn(200, device=DEVICE)
    wrapped, double = plain.as_subclass(Wrapped), plain.double()
    for f, saved in ((wrapped, []), (plain, [wrapped]), (double, []), (plain, [double]), (plain[:0], [])):
        assert fused.sampled(f, saved, 64, 16) is None
    assert not fused.suits(wrapped)
    assert not fused.suits(double)
    assert not fused.suits(plain[:0])
    assert not fused.suits(torch.empty(3, dtype=torch.int64, device=DEVICE))
    assert not fused.suits(torch.empty(2, 3, device=DEVICE), torch.empty(3, 2, device=DEVICE).t())
    mine, reference = both()
    start = mine.enter(plain)
    rule = Rule.of(Bdia().coefficients)
    for f in (wrapped, double, plain[:1].expand(200)):
        got, expected = (s.step(start, plain, f, rule) for s in (mine, reference))
        assert same(got.state, expected.state)


@on_device
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiples_of_a_gradient_are_the_plain_forms(given, dtype):
    g = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 ** torch.arange(-3, 4).to(
        DEVICE
    )
    g[0, :3] = torch.tensor([float("nan"), float("inf"), -1e38])
    g = g.to(given)
    for t in (g, g.t(), g[2:3]):
        wanted = [(9 / 8, dtype), (7 / 8, torch.float32), (0.3, dtype)]
        for count in (1, 2, 3):
            found = fused.multiples(t, wanted[:count])
            for out, (factor, kind) in zip(found, wanted, strict=False):
                expected = (t.to(torch.promote_types(given, kind)) * factor).to(kind)
                assert out.dtype == kind
                assert torch.equal(out.isnan(), expected.isnan())
                assert same(out.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert fused.multiples(g[:1].expand(5, 7), [(2.0, dtype)]) is None
    assert fused.multiples(g[:, 1:], [(2.0, dtype)]) is None
    assert fused.multiples(g.double(), [(2.0, dtype)]) is None
