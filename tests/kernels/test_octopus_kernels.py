"""The PTX decode of `octopus2/3/4`: every code, run here instruction by instruction, against the codec in float64; the
kernel with it compiled for sm_90; attention with it, on a GPU, or interpreted with the instructions run here.
"""

import importlib.util
import os
import re
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from octo_run.kernels.codec import OctopusCodec, get

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = ["octopus2", "octopus3", "octopus4"]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def halves(word):
    """The two fp16 numbers of each uint32 as float64 [2, ...]."""
    word = np.asarray(word, np.uint32)
    return np.stack([word & 0xFFFF, word >> 16]).astype(np.uint16).view(np.float16).astype(np.float64)


def packed(numbers):
    """Float64 [2, ...] (exact results of an instruction) rounded to fp16, as uint32."""
    low, high = numbers.astype(np.float16).view(np.uint16).astype(np.uint32)
    return low | high << 16


def permuted(a, b, selector):
    """prmt.b32 in its default mode."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << 32
    out = np.zeros_like(both)
    for n in range(4):
        nibble = selector.astype(np.uint64) >> 4 * n & 0xF
        byte = both >> 8 * (nibble & 7) & 0xFF
        out |= np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint64) << 8 * n
    return out.astype(np.uint32)


def chosen(a, b, c, table):
    """lop3.b32."""
    out = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return out


ON_WORDS = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "prmt.b32": permuted,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "abs.f16x2": lambda a: a & np.uint32(0x7FFF7FFF),
}
ON_HALVES = {
    "add.rn.f16x2": lambda a, b: a + b,
    "sub.rn.f16x2": lambda a, b: a - b,
    "mul.rn.f16x2": lambda a, b: a * b,
    "fma.rn.f16x2": lambda a, b, c: a * b + c,
    "fma.rn.relu.f16x2": lambda a, b, c: np.maximum(a * b + c, 0),
}


def run(text, words):
    """The outputs $0, $1, $2 of the instructions for the input $3 (uint32), each rounded as the instruction rounds."""
    registers = {"$3": words}

    def value(name):
        return registers[name] if name in registers else np.full_like(words, int(name, 0))

    for line in text.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.strip().split(" ", 1)
        if name == "mov.b32" and rest.startswith("{"):
            low, high, source = re.fullmatch(r"{(\w+), (\w+)}, (\w+)", rest).groups()
            registers[low], registers[high] = halves(value(source))
            continue
        to, *sources = rest.split(", ")
        if name in ON_WORDS:
            registers[to] = ON_WORDS[name](*map(value, sources)).astype(np.uint32)
        elif name in ON_HALVES:
            registers[to] = packed(ON_HALVES[name](*(halves(value(s)) for s in sources)))
        elif name == "lop3.b32":
            registers[to] = chosen(*map(value, sources[:3]), int(sources[3], 0))
        elif name == "mov.b32":
            registers[to] = value(*sources)
        elif name in ("mul.rn.f32", "fma.rn.f32"):
            a, b, *c = (registers[s].astype(np.float64) for s in sources)
            registers[to] = (a * b + (c[0] if c else 0)).astype(np.float32)
        elif name == "cvt.f32.f16":
            registers[to] = registers[sources[0]].astype(np.float32)
        elif name == "rsqrt.approx.ftz.f32":
            registers[to] = (registers[sources[0]].astype(np.float64) ** -0.5).astype(np.float32)
        elif name == "cvt.rn.f16x2.f32":  # the first source is the upper half
            registers[to] = packed(np.stack([registers[sources[1]], registers[sources[0]]]))
        else:
            raise NotImplementedError(name)
    return registers["$0"], registers["$1"], registers["$2"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("fine", "most", "mean"), [(False, 1.2e-3, 4e-4), (True, 8e-4, 3e-4)])
def test_every_code(name, dim, fine, most, mean):
    from octo_run.kernels.attention.general.octopus_ptx import decode_asm, decode_immediates

    codec = get(name, dim)
    text = decode_asm(codec.bits, decode_immediates(codec), fine)
    want = codec.tables(torch.float64).codewords.numpy()
    rng = np.random.default_rng(0)
    codes = np.arange(1 << codec.bits)
    pair = np.stack([codes, rng.permutation(codes)])
    behind = rng.integers(0, 1 << 16 - codec.bits, pair.shape)  # what follows a code in its row
    low, high = (pair | behind << codec.bits).astype(np.uint32)
    got = np.stack([halves(word) for word in run(text, low | high << 16)])
    for half in range(2):
        expected = want[:, pair[half]]
        error, squares = got[:, half] - expected, (expected**2).sum(0)
        relative = np.linalg.norm(error, axis=0) / squares**0.5
        # fp16 alone is 5e-4 at most and 2e-4 on average.
        assert relative.max() < most and relative.mean() < mean, f"{relative.max():.2e}, mean {relative.mean():.2e}"
        along = (error * expected).sum(0)  # what is too long: the roundings must cancel in long sums
        assert abs(along.sum() / squares.sum()) < 1.3e-4, f"{along.sum() / squares.sum():.2e}"
        for rho in np.split(np.argsort(pair[half]), 1 << codec.nominal_bits - 1):
            assert abs(along[rho].sum() / squares[rho].sum()) < 2.6e-4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_levels_are_exact(name, dim):
    from octo_run.kernels.attention.general.octopus_ptx import UNITS, decode_asm, decode_immediates

    codec = get(name, dim)
    tables = codec.tables(torch.float64)
    levels = decode_asm(codec.bits, decode_immediates(codec), False).partition("sub.rn.f16x2 z, unit, a;")[0]
    codes = np.arange(1 << codec.bits, dtype=np.uint32)
    found = run(levels + "mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, r; ", codes | codes << 16)
    side, bits = 2 << codec.nominal_bits, codec.nominal_bits + 1
    xi, rho = np.abs(tables.xi_levels.numpy()), tables.rho_levels.numpy()
    for a, b, q in zip(*(halves(word) for word in found), strict=True):
        assert np.array_equal(a / UNITS[codec.bits], xi[codes % side])
        assert np.array_equal(b / UNITS[codec.bits], xi[codes >> bits & side - 1])
        np.testing.assert_allclose(q**-0.5, rho[codes >> 2 * bits], rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "budget"), [("octopus2", 86), ("octopus3", 92), ("octopus4", 102)])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_instructions_of_the_loop(name, budget):
    """Warp instructions a token and KV head, 4 query heads, d = 128; the portable decode takes 132."""
    import triton

    from octo_run.kernels.attention.dispatch import Element, Kernel, Stored, tiles
    from octo_run.kernels.attention.general.decode import general_decode_kernel

    compiling = SimpleNamespace(**runpy.run_path(str(HERE / "test_attention_compiled.py")))
    disassemble = runpy.run_path(str(HERE.parents[1] / "scripts" / "sass_report.py"))["disassemble"]
    constants, tables = compiling.format_constants(name, 128, 4, torch.bfloat16, False)
    tiling = tiles(Kernel.GENERAL_DECODE, Stored.OTHER, Element.HALF, 128)
    constants |= {"BM": tiling.rows, "BN": tiling.keys, "BF": tiling.full_keys, "DIVIDED": True, "FLIP": tiling.flip}
    constants |= compiling.PLAIN
    kernel, stack = compiling.compile_for_hopper(general_decode_kernel, constants, tiling, torch.bfloat16, tables)
    machine = disassemble(kernel.asm["cubin"])
    start, end = max(machine.loops, key=lambda loop: loop[1] - loop[0])
    counts = Counter(machine.names[start:end])
    pairs = tiling.keys * (32 + 16) * 2 // 64
    assert stack == 0 and counts["LDL"] == 0
    assert counts["LDG"] < 2 * 2 * pairs + 8, "levels are loaded: codes are in two words each, a few more are norms"
    if triton.__version__.startswith("3.6."):
        assert sum(counts.values()) / tiling.keys <= budget


@pytest.fixture
def attention(monkeypatch):
    """The helpers of test_attention_kernels.py; interpreted, with `run` in place of the assembler."""
    helpers = SimpleNamespace(**runpy.run_path(str(HERE / "test_attention_kernels.py")))
    if not INTERPRETED:
        if helpers.DEVICE == "cpu":
            pytest.skip("Triton kernels need a GPU or TRITON_INTERPRET=1")
        return helpers
    import triton.language as tl
    from triton.runtime import interpreter

    def create_inline_asm(self, text, constraints, values, types, pure, pack):
        codes = values[0].data
        words = np.ascontiguousarray(codes, np.uint16).reshape(-1).view(np.uint32)
        planes = [word.view(np.float16).reshape(codes.shape) for word in run(text, words)]
        return SimpleNamespace(get_result=lambda n: interpreter.TensorHandle(planes[n], tl.float16))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return helpers


@pytest.mark.parametrize(("kv", "dim", "count"), [
    ("octopus2", 64, 1),
    ("octopus3", 80, 1),
    ("octopus4", 128, 1),
    ("octopus4:octopus2", 96, 1),
    ("bf16:octopus3", 64, 1),
    ("octopus3", 256, 1),
    ("octopus3", 128, 5),
    ("octopus4:octopus2", 80, 5),
])  # fmt: skip
def test_triton_ptx_beside_portable(kv, dim, count, attention, monkeypatch):
    from octo_run.kernels.attention.general.octopus_ptx import decode_immediates

    case = attention.make_case(kv, [300, 193], count, 6, 2, dim, dtype=torch.float16)
    got = []
    for ptx in (True, False):

        def immediates(codec, into, device, ptx=ptx):
            return decode_immediates(codec) if ptx and isinstance(codec, OctopusCodec) else None

        monkeypatch.setattr("octo_run.kernels.attention.constants.ptx_immediates", immediates)
        got.append(attention.run_triton(case))
        assert attention.relative_error(got[-1], case.want) < 2e-3
    assert not torch.equal(*got), "one of the two was not run"
