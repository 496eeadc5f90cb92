"""The wide decode kernel's own source (heads of 512), run on the CPU by `lane_emulator`, against float64 attention."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.attention.workspace import Workspace, counter_words, workspace_bytes
from octo_run.kernels.codec import parse_kv

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
        def launch(
            *, PARTIAL: torch.Tensor, LSE: torch.Tensor, OUT: torch.Tensor, PLACES: torch.Tensor, **_: Any
        ) -> None:
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
        wide_launch.launch_wide_decode(case.q, case.kv, case.fmt, out, room, spec=case.spec, max_length=case.max_length)
        assert not out.isnan().any(), "something was not written"
        assert not room.counters.any(), "the counters are others'"
        worst = max(worst, *(cases.relative_error(got, want) for got, want in zip(out, case.want, strict=True)))
    return worst


def decode_case(kv: str, lengths: list[int], group: int, kv_heads: int = 1, **more: Any) -> Any:
    more = {"dtype": torch.float16, **more}
    return cases.make_case(kv, lengths, 1, group * kv_heads, kv_heads, DIM, **more)


@pytest.mark.parametrize("kv", ["oct3", "oct2", "oct4", "oct4:oct2", "oct2:oct3"])
def test_every_format(kernel: Any, kv: str) -> None:
    assert worst_error(decode_case(kv, [450], 4)) < 1e-3


@pytest.mark.slow
def test_two_heads_and_what_a_call_before_left(kernel: Any) -> None:
    assert worst_error(decode_case("oct3", [450, 260], 4, 2), times=2) < 1e-3


@pytest.mark.parametrize("group", [16, 1, 5, 9, 20])
def test_every_group(kernel: Any, group: int) -> None:
    """One block of four heads to four of a program, the last one not full; beyond sixteen heads two programs."""
    assert worst_error(decode_case("oct2", [390], group)) < 1e-3
    launch = kernel.launches[-1]
    assert (launch["NT"], launch["grid"][0]) == {1: (1, 1), 5: (2, 1), 9: (3, 1), 16: (4, 1), 20: (3, 2)}[group]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1], [193], [256, 257, 255], [0, 64, 0, 128, 192, 320, 1000, 0]])
def test_lengths_around_page_edges(kernel: Any, lengths: list[int]) -> None:
    """With filler, whose output is zero."""
    assert worst_error(decode_case("oct3", lengths, 3)) < 1e-3


@pytest.mark.slow
def test_sequences_of_unequal_lengths_are_cut_finer(kernel: Any) -> None:
    lengths = [64 * 20 + 192, 300, 1, 64 * 5 + 200]
    assert worst_error(decode_case("oct2", lengths, 1)) < 1e-3
    assert kernel.launches[-1]["grid"][1] > len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128)])
def test_other_sinks_and_windows(kernel: Any, sink: int, window: int) -> None:
    assert worst_error(decode_case("oct3", [600, 350], 4, sink=sink, window=window)) < 1e-3


@pytest.mark.parametrize(
    "kinds",
    [EVERYTHING, {"sees": 1}, {"sees": 64}, {"sees": 150}, {"sees": 333}, {"cap": 2.0}, {"sinking": True}],
    ids=["all", "sees 1", "sees 64", "sees 150", "sees 333", "cap", "sinks"],
)
@pytest.mark.parametrize("mean", [2.0, 0.0])
def test_windows_caps_sink_logits_and_means(kernel: Any, kinds: dict[str, Any], mean: float) -> None:
    assert worst_error(decode_case("oct3", [0, 500, 257], 5, mean=mean, **kinds)) < 2e-3


@pytest.mark.slow
def test_the_key_mean_of_many_pages(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven pages a team, whose components come by four; of theta 1e4, with the most fast steps."""
    monkeypatch.setattr(wide_launch, "division", lambda *_: (1, 1))
    assert worst_error(decode_case("oct2", [64 * 13 + 192], 5, mean=2.0)) < 3e-3
    launch = kernel.launches[-1]
    assert (launch["grid"], launch["MEAN"]) == ((1, 1), 9)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_bfloat16_inputs(kernel: Any, mean: float) -> None:
    assert worst_error(decode_case("oct4", [600, 300], 8, dtype=torch.bfloat16, mean=mean)) < 2.5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "lengths", "mean"), [("oct3", [64 * 7 + 192], 2.0), ("oct4:oct2", [500, 300], 0.0)])
def test_threads_meet_only_at_barriers(
    monkeypatch: pytest.MonkeyPatch, kv: str, lengths: list[int], mean: float
) -> None:
    watched = emulator.Kernel(KERNEL, watched=True)
    monkeypatch.setattr(wide_launch, "wide_decode_kernel", watched)
    monkeypatch.setattr(wide_launch, "merge_places_kernel", Merge())
    case = decode_case(kv, lengths, 5, mean=mean)
    assert worst_error(case) < 3e-3
    for module, name in (
        ("wide_decode", "team_barrier"),
        ("wide_products", "team_barrier"),
        ("wide_parts", "barrier"),
        ("wide_full_precision", "barrier"),
    ):
        with monkeypatch.context() as without:
            without.setattr(MODULES[module], name, lambda *_: None)
            with pytest.raises(AssertionError, match=r"a thread (reads|writes) what another one"):
                worst_error(case)


@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4", "oct4:oct2", "oct4:oct3"])
@pytest.mark.parametrize("mean", [0, 6, 9])
def test_shared_memory_has_room(kv: str, mean: int) -> None:
    """For as many heads as can be; with a key mean, whose operands lie there, for fewer."""
    fmt = parse_kv(kv, DIM)
    for group in (1, 4, 8, 16):
        fixed = wide_launch.constants(fmt.k, fmt.v, group, "bf16", mean, True)
        assert 4 * fixed["SMEM_WORDS"] <= 227 * 1024
        assert fixed["NT"] == -(-group // 4) or (mean and fixed["NT"] == 2)
        tables = sum(
            4
            * (
                (fixed[f"COPIES_{side}"] << codec.stream + codec.state_bits)
                + (fixed[f"COPIES_X{side}"] << codec.stream)
            )
            for side, codec in {"K": fmt.k, **({} if fmt.k is fmt.v else {"V": fmt.v})}.items()
        )
        full = MODULES["wide_full_precision"].full_bytes(DIM, fixed["NT"])
        assert full <= tables, "the full-precision tokens' sums lie where the tables are to come"
