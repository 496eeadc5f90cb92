"""Recording kernels' calls: what runs again is the same work, and work that PyTorch has a part in is not recorded."""

from pathlib import Path

import pytest
import torch

from octo_run.kernels.cpu import library, memory
from octo_run.kernels.cpu import step as ops
from octo_run.kernels.cpu.replay import Replays


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if library() is None:
        pytest.skip("the CPU's kernels are not compiled here")


class Work:
    """Two kernels on kept buffers; counts how often Python runs it."""

    def __init__(self) -> None:
        self.x, self.weight = torch.randn(2, 64), torch.rand(64)
        self.normed, self.out = torch.zeros(2, 64), torch.zeros(2, 32)
        self.calls, self.foreign = 0, False

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        assert ops.add_rms_norm(self.x, None, self.weight, 1e-5, self.normed)
        if self.foreign:
            self.normed.mul_(2)
        assert ops.swiglu(self.normed[:, :].view(2, 64), self.out)
        return self.out

    def expected(self) -> torch.Tensor:
        normed = self.weight * self.x * torch.rsqrt(self.x.square().mean(-1, keepdim=True) + 1e-5)
        gate, up = ((2 if self.foreign else 1) * normed).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("foreign", [False, True])
def test_new_inputs_give_new_outputs(foreign: bool) -> None:
    work, replays = Work(), Replays()
    work.foreign = foreign
    for _ in range(5):
        work.x.normal_()
        work.out.fill_(torch.nan)
        out = replays.run("key", work)
        assert out is work.out
        torch.testing.assert_close(out, work.expected(), rtol=1e-5, atol=1e-6)
    assert work.calls == (5 if foreign else 2)
    assert [*replays.refused.values()] == (["aten.mul_.Tensor"] if foreign else [])


def test_other_keys_and_threads_are_recorded_apart() -> None:
    work, replays, before = Work(), Replays(), torch.get_num_threads()
    try:
        for number, (key, threads) in enumerate((("a", 1), ("b", 1), ("a", 2))):
            torch.set_num_threads(threads)
            for _ in range(3):
                replays.run(key, work)
            assert work.calls == 2 * (number + 1)
    finally:
        torch.set_num_threads(before)


def test_an_error_while_recording_leaves_nothing_half_made() -> None:
    work, replays = Work(), Replays()
    replays.run("key", work)

    def broken() -> torch.Tensor:
        work()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replays.run("key", broken)
    found = library()
    assert found is not None and found.recorded is None
    work.x.normal_()
    torch.testing.assert_close(replays.run("key", work), work.expected(), rtol=1e-5, atol=1e-6)


def test_the_profiler_sees_every_kernel() -> None:
    work, replays = Work(), Replays()
    for _ in range(3):
        replays.run("key", work)
    with torch.autograd.profiler.profile() as profile:
        replays.run("key", work)
    assert work.calls == 3
    assert {"octo_run::octo_add_rms_norm", "octo_run::octo_swiglu"} <= {event.name for event in profile.function_events}


def test_what_repeats_is_told_once() -> None:
    told: list[int] = []
    work, replays = Work(), Replays(lambda: told.append(work.calls))
    for key in "aabb":
        replays.run(key, work)
    assert told == [1]


def test_large_pages_hold_what_was_there() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("no Linux with large pages")

    class Holder:
        __module__ = "octo_run.of_a_test"

        def __init__(self) -> None:
            self.parts = [{"a": torch.randint(0, 255, (5 << 20,), dtype=torch.uint8)}, (torch.ones(3),)]

    holder = Holder()
    tensors = list(memory.tensors_of(holder))
    assert [x.numel() for x in tensors] == [5 << 20, 3]
    starts, before = memory.regions(tensors), tensors[0].clone()
    assert 3 <= len(starts) <= 4 and all(start % memory.LARGE == 0 for start in starts)
    made = memory.collapse(starts)
    memory.collapse_later(holder).join()
    assert torch.equal(tensors[0], before)
    assert 0 <= made <= len(starts)
