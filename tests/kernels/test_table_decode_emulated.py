"""The table-decode kernel's own source, run on the CPU by `lane_emulator`, against float64 attention over the pages."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.kernels import PAGE_TOKENS, AttentionSpec, attend_reference, encode_pages
from octo_run.kernels.attention.parts import PARTS_PER_PROCESSOR, TABLE_WARPS, table_parts
from octo_run.kernels.attention.workspace import Workspace, counter_words, workspace_bytes
from octo_run.kernels.codec import PageFormat

table_launch = pytest.importorskip("octo_run.kernels.attention.hopper.launch", reason="Triton is not installed")

CPU = torch.device("cpu")
HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
cases = SimpleNamespace(**runpy.run_path(str(HERE / "test_attention_kernels.py")))
MODULES = emulator.kernel_modules()
DECODE = MODULES["decode"]
LENGTHS = (1, 64, 128, 192, 193, 255, 256, 257, 320, 1000)  # 64 sinks, 64 to 127 in the window, pages of 64


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = emulator.Kernel(DECODE.table_decode_kernel)
    monkeypatch.setattr(table_launch, "table_decode_kernel", found)
    return found


def worst_error(case: Any, room_for: int | None = None) -> float:
    """The largest relative error of a sequence; outputs and workspace are full of NaN before."""
    batch, _, heads, dim = case.q.shape
    kv_heads = case.kv.pages.shape[1]
    words = workspace_bytes(case.q.device, room_for or batch, heads, kv_heads, dim) // 4
    whole = torch.full((words,), float("nan"))
    whole[: counter_words(whole.device)] = 0
    room = Workspace.of(whole, batch, heads, kv_heads, dim, whole.device)
    worst = 0.0
    for _ in range(2):  # the second time with what the first one left in the workspace
        out = torch.full_like(case.q, float("nan"))
        table_launch.launch_table_decode(
            case.q, case.kv, case.fmt, out, room, spec=case.spec, max_length=case.max_length
        )
        assert not out.isnan().any(), "something was not written"
        assert not room.counters.any(), "the counters are not at zero for the next call"
        worst = max(worst, *(cases.relative_error(got, want) for got, want in zip(out, case.want, strict=True)))
    return worst


def decode_case(kv: str, lengths: list[int], group: int, kv_heads: int, dim: int, **more: Any) -> Any:
    more = {"dtype": torch.float16, **more}
    return cases.make_case(kv, lengths, 1, group * kv_heads, kv_heads, dim, **more)


@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_every_format_and_head_dim(kernel: Any, kv: str, dim: int) -> None:
    assert worst_error(decode_case(kv, [450], 4, 2, dim)) < 1e-3


@pytest.mark.parametrize("kv", ["oct3:oct2", "oct2:oct3", "oct4:oct2", "oct2:oct4", "oct4:oct3"])
@pytest.mark.parametrize(("dim", "group"), [(64, 4), (96, 1), (112, 2), (128, 7), (256, 4)])
def test_keys_and_values_in_different_formats(kernel: Any, kv: str, dim: int, group: int) -> None:
    assert worst_error(decode_case(kv, [450, 260], group, 1, dim)) < 1e-3


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 16])
@pytest.mark.parametrize(("kv", "dim"), [("oct3", 128), ("oct2", 64), ("oct4", 80), ("oct4", 256)])
def test_every_group(kernel: Any, group: int, kv: str, dim: int) -> None:
    assert worst_error(decode_case(kv, [700], group, 1, dim)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_page_edges(kernel: Any, kv: str, length: int) -> None:
    assert worst_error(decode_case(kv, [length], 4, 1, 64)) < 1e-3
    assert worst_error(decode_case(kv, [length, 130, 400], 1, 2, 64)) < 1e-3
    assert worst_error(decode_case(kv, [length, 300], 2, 1, 256)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128), (100, 64)])
def test_other_sinks_and_windows(kernel: Any, sink: int, window: int) -> None:
    assert worst_error(decode_case("oct3", [900, 350], 4, 1, 64, sink=sink, window=window)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "dim"), [("oct3", 128), ("oct3", 64), ("oct4:oct2", 80), ("oct2:oct3", 96)])
def test_pages_that_a_cpu_wrote(kernel: Any, kv: str, dim: int) -> None:
    """Rows of the CPU's writer, converted; against the CPU's attention over the rows."""
    case = decode_case(kv, [450, 260], 4, 2, dim)
    rows, lanes = PageFormat(case.fmt, "rows"), PageFormat(case.fmt, "lanes")
    written = torch.zeros(len(case.kv.pages), 1, *case.kv.pages.shape[1:], dtype=torch.uint8)
    k, v = torch.randn(2, 1, *case.kv.pages.shape[:2], PAGE_TOKENS, dim)
    encode_pages(k, v, written, torch.arange(len(written)), case.fmt)
    q, of_rows = case.q.double(), {"pages": written[:, 0]}
    of_rows |= {name: getattr(case.kv, name).double() for name in ("sink_k", "sink_v", "tail_k", "tail_v")}
    case.want = attend_reference(q, replace(case.kv, **of_rows), case.fmt, spec=AttentionSpec(dim**-0.5))
    case.kv = replace(case.kv, pages=written[:, 0])
    with pytest.raises(AssertionError):  # rows are not lanes
        assert worst_error(case) < 0.1
    case.kv = replace(case.kv, pages=rows.convert(written[:, 0], lanes))
    assert worst_error(case) < 1e-3


KINDS = [{"sees": 1}, {"sees": 64}, {"sees": 150}, {"sees": 333}, {"cap": 2.0}, {"sinking": True}]
ALL_KINDS = {"sees": 290, "cap": 2.0, "sinking": True}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [*KINDS, ALL_KINDS], ids=str)
def test_windows_caps_and_sink_logits(kernel: Any, kinds: dict[str, Any]) -> None:
    """In one part and in several, with filler, and with lengths at the edges of pages and of windows."""
    assert worst_error(decode_case("oct3", [1000], 4, 1, 64, **kinds)) < 1e-3
    assert worst_error(decode_case("oct2", [0, 193, 192, 64, 397, 900], 3, 2, 64, **kinds)) < 1e-3
    assert worst_error(decode_case("oct4", [64 * 40 + 192, 300], 1, 1, 64, **kinds)) < 1e-3
    assert worst_error(decode_case("oct3", [700, 260], 4, 1, 64, mean=2.0, **kinds)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "group"), [(80, 1), (96, 5), (128, 7), (128, 8), (256, 4)])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_windows_of_every_shape(kernel: Any, dim: int, group: int, mean: float) -> None:
    assert worst_error(decode_case("oct3", [900, 350], group, 1, dim, mean=mean, **ALL_KINDS)) < 2e-3


@pytest.mark.parametrize("length", [256, 257, 258, 319, 320, 321, 384, 385])
@pytest.mark.parametrize("sees", [127, 128, 129])
def test_windows_that_end_at_pages(kernel: Any, length: int, sees: int) -> None:
    assert worst_error(decode_case("oct2", [length, length + 64], 4, 1, 64, sees=sees)) < 1e-3


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 128), (100, 64)])
@pytest.mark.parametrize("sees", [3, 101, 170, 400])
def test_windows_beside_other_sinks(kernel: Any, sink: int, window: int, sees: int) -> None:
    assert worst_error(decode_case("oct3", [900, 350], 4, 1, 64, sink=sink, window=window, sees=sees)) < 1e-3


def test_a_window_takes_no_more_programs_than_its_pages(kernel: Any) -> None:
    """The grid of a long sequence is that of a short one that is as long as its window."""
    assert worst_error(decode_case("oct2", [6000], 1, 1, 64, sees=512)) < 1e-3
    assert worst_error(decode_case("oct2", [700], 1, 1, 64)) < 1e-3
    windowed, short = (launch["grid"][1] for launch in (kernel.launches[0], kernel.launches[-1]))
    assert windowed <= short


@pytest.mark.slow
def test_bfloat16_inputs(kernel: Any) -> None:
    assert worst_error(decode_case("oct3", [600, 300], 4, 1, 128, dtype=torch.bfloat16)) < 2.5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "group"), [(64, 4), (80, 3), (128, 4), (128, 7), (256, 4)])
def test_the_key_mean_comes_back(kernel: Any, dim: int, group: int) -> None:
    assert worst_error(decode_case("oct3", [450, 800], group, 1, dim, mean=2.0)) < 1.5e-3


@pytest.mark.parametrize("kv", ["oct2", "oct4", "oct4:oct2"])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (64, 5), (96, 4), (112, 8), (128, 16)])
def test_the_key_mean_comes_back_in_every_format_and_group(kernel: Any, kv: str, dim: int, group: int) -> None:
    assert worst_error(decode_case(kv, [700, 260], group, 1, dim, mean=2.0, theta=5e5)) < 1.5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "theta", "fast"), [(64, 1e4, 2), (64, 5e5, 1), (128, 1e4, 3), (128, 1e6, 2)])
def test_the_key_mean_of_many_pages(kernel: Any, dim: int, theta: float, fast: int) -> None:
    """Among sequences that leave a long one no programs to share: nine pages a warp, whose components come by four."""
    lengths = [*([200] * 34), 64 * 69 + 192]
    case = decode_case("oct2", lengths, 1, 1, dim, mean=2.0, theta=theta)
    assert worst_error(case) < 3e-3  # the worst of 35: in a short sequence one token may have half of the weight
    assert kernel.launches[-1]["MEAN"] == fast and not kernel.launches[-1]["TIGHT"]


@pytest.mark.parametrize(("kv", "group", "dim", "theta"), [("oct4", 8, 128, 1e6), ("oct2", 2, 256, 1e4)])
def test_the_key_mean_where_there_is_little_room(kernel: Any, kv: str, group: int, dim: int, theta: float) -> None:
    """Components come by two pages, of which a warp has five; the tables have as many copies as without a mean."""
    case = decode_case(kv, [200, 64 * 37 + 192], group, 1, dim, mean=2.0, theta=theta)
    assert worst_error(case) < 1.5e-3
    found = kernel.launches[0]
    without = table_launch.constants(case.fmt.k, case.fmt.v, 1, group, "f16", 0, True)
    assert found["TIGHT"] and found["COPIES_K"] == without["COPIES_K"]


@pytest.mark.parametrize(
    ("kv", "group", "dim", "mean"), [("oct3", 8, 128, 2.0), ("oct4", 8, 64, 2.0), ("oct4", 4, 128, 0.0)]
)
def test_one_sequence_has_full_precision_tokens_beside_the_tables(
    kernel: Any, kv: str, group: int, dim: int, mean: float
) -> None:
    """Of which only the extra triplets' tables have fewer copies for it."""
    case = decode_case(kv, [700], group, 1, dim, mean=mean, theta=5e5)
    assert worst_error(case) < 1.5e-3
    fast = kernel.launches[0]["MEAN"]
    one, several = (
        table_launch.constants(case.fmt.k, case.fmt.v, 1, group, "f16", fast, batched) for batched in (False, True)
    )
    assert one["COPIES_K"] == several["COPIES_K"] and one["TIGHT"] == several["TIGHT"]
    tables = table_launch._Copies(one["COPIES_K"], one["COPIES_XK"]).bytes(case.fmt.k)
    other = table_launch._other_bytes(case.fmt.k, case.fmt.v, int(one["NT"]), fast, bool(one["TIGHT"]))
    assert 4 * int(one["SMEM_WORDS"]) - tables - other >= 32 * int(table_launch.row_bytes(dim))


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_values_of_zero(kernel: Any, mean: float) -> None:
    """Every third token's: it has its share of the weight, and adds nothing."""
    assert worst_error(decode_case("oct3", [450], 4, 1, 64, mean=mean, silent=3)) < 1.5e-3


@pytest.mark.parametrize("mean", [30.0, 3000.0, 1e7])
def test_a_key_mean_of_any_size(kernel: Any, mean: float) -> None:
    """Larger than fp16 holds, too: logits that leave one token nearly all weight, or any finite ones."""
    case = decode_case("oct3", [700], 4, 1, 64, mean=mean)
    assert worst_error(case) < (5e-3 if mean == 30.0 else float("inf"))


@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("times", [16.0, 256.0])
def test_pages_of_very_unequal_weight(kernel: Any, mean: float, times: float) -> None:
    """Logits whose maxima differ from page to page by up to hundreds, up and down."""
    case = decode_case("oct3", [1200], 4, 1, 64, mean=mean)
    case = replace(case, spec=replace(case.spec, scale=case.spec.scale * times))
    want = attend_reference(case.q, case.kv, case.fmt, spec=case.spec)
    assert worst_error(replace(case, want=want.double())) < 1e-4 * times + 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 256])
def test_a_mean_that_tells_pages_apart(kernel: Any, dim: int) -> None:
    """By a mean that makes logits hundreds apart: five pages a warp, any of which may have next to all the weight."""
    case = decode_case("oct3", [*([200] * 34), 64 * 37 + 192], 1, 1, dim, mean=30.0)
    assert worst_error(case) < 2e-2  # such a mean's own errors are 1e-2 and 6e-3


@pytest.mark.slow
def test_sequences_of_unequal_lengths_are_cut_finer(kernel: Any) -> None:
    lengths = [64 * 40 + 192, 300, 1, 64 * 9 + 200]
    assert worst_error(decode_case("oct2", lengths, 4, 1, 64)) < 1e-3
    evenly = worst_error(decode_case("oct2", [lengths[0]] * 4, 4, 1, 64))
    uneven, even = kernel.launches[0]["grid"], kernel.launches[-1]["grid"]
    assert evenly < 1e-3 and uneven[1] > len(lengths) and uneven == even  # the grid depends on shapes alone


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4:oct2"])
@pytest.mark.parametrize(("dim", "group"), [(64, 4), (80, 1), (96, 5), (128, 7), (256, 8)])
def test_filler_is_left_out(kernel: Any, kv: str, dim: int, group: int) -> None:
    """Anywhere in a batch, which is divided as if it were not there; its output is zero."""
    case = decode_case(kv, [0, 450, 0, 128, 0], group, 1, dim)
    assert worst_error(case) < 1e-3


@pytest.mark.slow
def test_filler_with_the_key_mean(kernel: Any) -> None:
    assert worst_error(decode_case("oct3", [0, 800, 0, 450, 0, 0], 7, 1, 128, mean=2.0)) < 1.5e-3


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_a_batch_of_filler(kernel: Any, lengths: list[int]) -> None:
    """Alone, with a bound that divides it in parts; the rows are nobody's, full of NaN."""
    case = decode_case("oct3", lengths, 4, 2, 64)
    case.max_length = 4096
    assert worst_error(case) == 0


@pytest.mark.slow
def test_more_sequences_than_counters(kernel: Any) -> None:
    """A long one among many short ones is not cut: the workspace has a counter for eight programs a processor."""
    lengths = [*([200] * 34), 64 * 40 + 192]
    assert len(lengths) > counter_words(CPU)
    assert worst_error(decode_case("oct2", lengths, 1, 1, 64)) < 1e-3


@pytest.mark.slow
def test_many_blocks_of_heads_share_the_counters(kernel: Any) -> None:
    """24 heads are three programs a KV head, each with a counter of its own."""
    assert 16 * 3 > counter_words(CPU) >= 2 * 16
    assert worst_error(decode_case("oct2", [*([200] * 15), 64 * 24 + 192], 24, 1, 64)) < 1e-3


@pytest.mark.slow
def test_a_workspace_for_more_sequences_serves_fewer(kernel: Any) -> None:
    assert worst_error(decode_case("oct2", [700, 260], 4, 1, 64), room_for=16) < 1e-3


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=2, max_size=70),
    st.sampled_from([1, 2, 8, 16, 32]),
    st.sampled_from([4, 132]),
)
def test_every_page_has_one_program(packed: list[int], programs: int, processors: int) -> None:
    """The parts of all sequences follow each other without gaps, fit into the launcher's grid and its workspace."""
    batch, kv_heads = len(packed), programs
    longest = max(packed)
    most = max(1, PARTS_PER_PROCESSOR * processors // (batch * programs))
    parts = table_parts(batch * programs, longest, most, processors)
    grid = max(parts * batch, 4 * processors // programs + batch)
    memory = emulator.Memory()
    running = emulator.RUNNING
    running.memory, running.threads = memory, 32
    lane = emulator.Value(np.arange(32), "i32")
    pointer = memory.pointer(torch.tensor(packed, dtype=torch.int32))
    found = []
    for flat in range(grid):
        running.start((0, flat), 32, False)
        arguments = [emulator.Value(n, "i32") for n in (flat, batch, parts, programs, processors)]
        MODULES["parts"].divide(pointer, pointer, 0, *arguments, lane, lane * 0, 16, TABLE_WARPS, 0)
        found.append(tuple(int(n) for n in emulator.read_scalars(None, 16)))
    expected, before = [], 0
    for seq in range(batch):
        count = sum(1 for s, _, n, _ in found if n and s == seq)
        assert count >= 1, "every sequence has a program: it has sinks and a window"
        expected += [(seq, part, count, before) for part in range(count)]
        before += count
    assert found[: len(expected)] == expected
    assert all(n == 0 for _, _, n, _ in found[len(expected) :])
    room = max(processors * PARTS_PER_PROCESSOR, 2 * batch * kv_heads)
    assert grid * kv_heads <= room, "partial results fit into the workspace"
    if len(expected) > batch:
        assert batch * programs <= PARTS_PER_PROCESSOR * processors, "there are counters for them"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv", "lengths", "group", "dim", "mean"),
    [
        ("oct3", [1500], 4, 128, 0.0),
        ("oct4:oct2", [900, 300], 7, 64, 0.0),
        ("oct2", [*([200] * 34), 2600], 1, 64, 2.0),
        ("oct4", [900, 300], 8, 112, 2.0),
    ],
)
def test_threads_meet_only_at_barriers(
    monkeypatch: pytest.MonkeyPatch, kv: str, lengths: list[int], group: int, dim: int, mean: float
) -> None:
    watched = emulator.Kernel(DECODE.table_decode_kernel, watched=True)
    monkeypatch.setattr(table_launch, "table_decode_kernel", watched)
    case = decode_case(kv, lengths, group, 1, dim, mean=mean)
    assert worst_error(case) < 3e-3
    for module, name in (("decode", "sync_warp"), ("parts", "barrier"), ("full_precision", "barrier")):
        with monkeypatch.context() as without:
            without.setattr(MODULES[module], name, lambda *_: None)
            with pytest.raises(AssertionError, match=r"a thread (reads|writes) what another one"):
                worst_error(case)


def test_emulated_products_are_those_of_matrices() -> None:
    """Fragments of m16n8k32 and m16n8k16 laid out by hand, as the PTX manual's tables say."""
    random = np.random.default_rng(0)
    emulator.RUNNING.threads = 64
    a, b = random.integers(-128, 128, (2, 16, 32), np.int8), random.integers(-128, 128, (2, 32, 8), np.int8)
    lanes = [(w, lane // 4, lane % 4) for w in range(2) for lane in range(32)]

    def register(parts: list[Any]) -> Any:
        return emulator.Value(np.stack(parts).view(np.uint32)[:, 0], "u32")

    rows = [register([a[w, g + 8 * (i % 2), 16 * (i // 2) + 4 * t :][:4] for w, g, t in lanes]) for i in range(4)]
    columns = [register([b[w, 16 * i + 4 * t :, g][:4] for w, g, t in lanes]) for i in range(2)]
    got = emulator.product((1, 2, 3, 4), rows, columns, "i8")
    want = a.astype(np.int64) @ b
    for i in range(4):
        expected = [want[w, g + 8 * (i // 2), 2 * t + i % 2] + i + 1 for w, g, t in lanes]
        assert got[i].data.tolist() == expected
