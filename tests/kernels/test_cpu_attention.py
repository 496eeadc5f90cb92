"""The CPU's attention against float64 over fresh random inputs, outputs poisoned, on every instruction set here."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octo_run.kernels import AttentionSpec
from octo_run.kernels.cpu import attention

HERE = Path(__file__).parent
_targets = runpy.run_path(str(HERE / "cpu_targets.py"))
_cases = runpy.run_path(str(HERE / "test_attention_kernels.py"))
TARGETS, kernels_of = _targets["TARGETS"], _targets["kernels_of"]
make_case, relative_error = _cases["make_case"], _cases["relative_error"]
FORMATS = (
    "oct2",
    "oct3",
    "oct4",
    "octopus2",
    "octopus3",
    "octopus4",
    "bf16",
    "oct3:bf16",
    "bf16:oct4",
    "oct4:octopus3",
)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = kernels_of(request.param)
    monkeypatch.setattr(attention, "library", lambda: found)
    return str(request.param)


def check(*args: object, **options: object) -> None:
    case = make_case(*args, layout="rows", seed=int(torch.randint(1 << 30, ())), **options)
    out = torch.full_like(case.q, torch.nan)
    got = attention.attend(case.q, case.kv, case.fmt, spec=case.spec, out=out)
    assert got is out
    assert relative_error(out, case.want) < BOUND[case.q.dtype]


@pytest.mark.few(10)
@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("kv", FORMATS)
def test_decode(target: str, kv: str, mean: float) -> None:
    check(kv, [1, 63, 64, 65, 0, 128, 129, 192, 193, 257, 400, 1300], 1, 6, 2, 64, mean=mean)


@pytest.mark.few(10)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
def test_decode_shapes(target: str, dim: int, group: int) -> None:
    kv = ("oct2", "oct3", "oct4", "octopus3", "bf16")[(dim // 16 + group) % 5]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(kv, [130, 0, 321], 1, 2 * group, 2, dim, dtype=dtype, mean=2.0 * (group % 2))


@pytest.mark.few(4)
@pytest.mark.parametrize("kv", ["oct3", "octopus4", "bf16", "bf16:oct3"])
@pytest.mark.parametrize("count", [2, 5, 70])
def test_prefill(target: str, kv: str, count: int) -> None:
    for mean in (0.0, 3.0):
        check(kv, [count, 150, 0, 400], count, 6, 2, 64, mean=mean)
    check(kv, [260], count, 5, 1, 80, sink=0, window=0)


@pytest.mark.few(5)
@pytest.mark.parametrize("kinds", _cases["SPECS"], ids=str)
@pytest.mark.parametrize(("kv", "mean"), [("oct3", 0.0), ("bf16", 0.0), ("octopus3:bf16", 2.0)])
def test_windows_caps_and_sink_logits(target: str, kinds: dict[str, object], kv: str, mean: float) -> None:
    check(kv, [1, 64, 65, 0, 192, 193, 257, 400, 1300], 1, 6, 2, 64, mean=mean, **kinds)
    check(kv, [70, 198, 0, 700], 70, 6, 2, 64, mean=mean, **kinds)
    check(kv, [150, 700], 2, 5, 1, 80, sink=4, window=0, **kinds)


@pytest.mark.parametrize("cap", [0.5, 30.0, 1e4])
def test_caps_of_any_size(target: str, cap: float) -> None:
    check("oct3", [300, 100], 1, 4, 2, 64, cap=cap)


@pytest.mark.parametrize("kv", ["oct3", "bf16"])
@pytest.mark.parametrize("count", [1, 40])
def test_threads_change_nothing(target: str, kv: str, count: int) -> None:
    case = make_case(kv, [70, 2600], count, 6, 2, 64, layout="rows")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.full_like(case.q, torch.nan)
        attention.attend(case.q, case.kv, case.fmt, spec=AttentionSpec(0.125), out=out)
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_calls_that_are_pytorch_s() -> None:
    """float64, and head dimensions that are no multiple of 16."""
    for dim, dtype in ((64, torch.float64), (72, torch.float32)):
        case = make_case("bf16", [130], 1, 2, 1, dim, dtype=dtype)
        assert attention.attend(case.q, case.kv, case.fmt, spec=AttentionSpec(0.125), out=None) is None
