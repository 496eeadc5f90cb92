"""The wide decode kernel's own source (heads of 512), run on the CPU by `lane_emulator`, against float64 attention."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.attention.parts import WIDE_TEAMS
from octo_run.kernels.attention.workspace import Workspace, counter_words, workspace_bytes

wide_launch = pytest.importorskip("octo_run.kernels.attention.hopper.wide_launch", reason="Triton is not installed")

HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
cases = SimpleNamespace(**runpy.run_path(str(HERE / "test_attention_kernels.py")))
MODULES = emulator.kernel_modules()
KERNEL = MODULES["wide_decode"].wide_decode_kernel
DIM = 512
EVERYTHING = {"sees": 290, "cap": 2.0, "sinking": True}


class Merge:
    """`merge_places_kernel` by PyTorch; only what PLACES names is read."""

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        def launch(*, PARTIAL: torch.Tensor, LSE: torch.Tensor, OUT: torch.Tensor, PLACES: torch.Tensor, **_: Any) -> None:
            heads = OUT.shape[2]
            outputs, levels = PARTIAL.view(-1, heads, DIM), LSE.view(-1, heads)
            for b, (first, parts) in enumerate(PLACES.view(-1, 2).tolist()[: len(OUT)]):
                of_parts = slice(first, first + parts)
                share = torch.exp2(levels[of_parts] - levels[of_parts].max(0).values)[..., None]
                OUT[b, 0] = ((outputs[of_parts] * share).sum(0) / share.sum(0)).to(OUT.dtype)

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = emulator.Kernel(KERNEL)
    monkeypatch.setattr(wide_launch, "wide_decode_kernel", found)
    monkeypatch.setattr(wide_launch, "merge_places_kernel", Merge())
    return found


def worst_error(case: Any, times: int = 1) -> float:
    """The largest relative error of a sequence; outputs and workspace are full of NaN before."""
    batch, _, heads, dim = case.q.shape
    kv_heads = case.kv.pages.shape[1]
    whole = torch.full((workspace_bytes(case.q.device, batch, heads, kv_heads, dim) // 4,), float("nan"))
    whole[: counter_words(whole.device)] = 0
    room = Workspace.of(whole, batch, heads, kv_heads, dim, whole.device)
    worst = 0.0
    for _ in range(times):  # after the first with what that one left in the workspace
        out = torch.full_like(case.q, float("nan"))
        wide_launch.launch_wide_decode(
            case.q, case.kv, case.fmt, out, room, spec=case.spec, max_length=case.max_length
        )
        assert not out.isnan().any(), "something was not written"
        assert not room.counters.any(), "the counters are others'"
        worst = max(worst, *(cases.relative_error(got, want) for got, want in zip(out, case.want, strict=True)))
    return worst


def decode_case(kv: str, lengths: list[int], group: int, kv_heads: int = 1, **more: Any) -> Any:
    more = {"dtype": torch.float16, **more}
    return cases.make_case(kv, lengths, 1, group * kv_heads, kv_heads, DIM, **more)


@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4"])
def test_every_format(kernel: Any, kv: str) -> None:
    assert worst_error(decode_case(kv, [450], 4, 2), times=2) < 1e-3
