"""Machine instructions that let a program wait for its own memory: copies under way to shared memory, and arrivals.

Like `lanes`: tensors have one element a thread, and shared memory is addressed in bytes from its start.
"""
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import effect, u32


@gluon.jit
def copy16(address, pointer):
    """Start copying the lane's 16 bytes at ``pointer`` to shared memory."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $1; cp.async.cg.shared.global [b], [$2], 16; mov.u32 $0, 0; }",
        "=r,r,l",
        [address, pointer],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def commit_copies(lane):
    return effect("cp.async.commit_group; mov.u32 $0, 0;", lane)


@gluon.jit
def wait_for_all_copies(lane):
    return effect("cp.async.wait_all; mov.u32 $0, 0;", lane)


@constexpr_function
def _wait_asm(pending):
    return f"cp.async.wait_group {int(pending)}; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"


@gluon.jit
def wait_for_copies(lane, PENDING: gl.constexpr):
    """Wait until at most so many groups of copies are under way; then the warp's copies are visible to all its lanes."""
    return effect(_wait_asm(PENDING), lane)


@constexpr_function
def _copy_asm(whole_lines, sized):
    """Of lanes that want it. The second-level cache fetches lines of 128 bytes if they are read whole."""
    wanted = 4 if sized else 3
    size = ", $3" if sized else ""
    lines = ".L2::128B" if whole_lines else ""
    return (
        f"{{ .reg .u32 b; .reg .pred p; mov.u32 b, global_smem; add.u32 b, b, $1; setp.ne.u32 p, ${wanted}, 0; "
        f"@p cp.async.cg.shared.global{lines} [b], [$2], 16{size}; mov.u32 $0, 0; }}"
    )


@gluon.jit
def copy16_if(address, pointer, wanted, WHOLE_LINES: gl.constexpr):
    """Start copying the lane's 16 bytes at ``pointer`` to shared memory, where they are wanted."""
    return gl.inline_asm_elementwise(
        _copy_asm(WHOLE_LINES, False),
        "=r,r,l,r",
        [address, pointer, u32(wanted)],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def copy16_or_clear(address, pointer, there, wanted, WHOLE_LINES: gl.constexpr):
    """The same, with zeros where nothing is ``there`` to be read."""
    return gl.inline_asm_elementwise(
        _copy_asm(WHOLE_LINES, True),
        "=r,r,l,r,r",
        [address, pointer, u32(there) * 16, u32(wanted)],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@constexpr_function
def _expect_asm(at, count):
    return (
        "{ .reg .pred p; .reg .u32 t, b; mov.u32 t, %tid.x; mov.u32 b, global_smem; setp.eq.u32 p, t, 0; "
        f"@p mbarrier.init.shared.b64 [b+{int(at)}], {int(count)}; mov.u32 $0, 0; }}"
    )


@gluon.jit
def expect_warps(lane, AT: gl.constexpr, COUNT: gl.constexpr):
    """Let the 8 bytes at AT count arrivals of COUNT warps. A barrier must follow."""
    return effect(_expect_asm(AT, COUNT), lane)


@constexpr_function
def _arrive_asm(at):
    return (
        "{ .reg .pred p; .reg .u32 t, b; .reg .b64 s; bar.warp.sync 0xffffffff; mov.u32 t, %tid.x; and.b32 t, t, 31; "
        "mov.u32 b, global_smem; setp.eq.u32 p, t, 0; "
        f"@p mbarrier.arrive.shared.b64 s, [b+{int(at)}]; mov.u32 $0, 0; }}"
    )


@gluon.jit
def warp_arrives(lane, AT: gl.constexpr):
    """Count the warp in, what its lanes wrote being visible to those who wait. Waits for nothing."""
    return effect(_arrive_asm(AT), lane)


@constexpr_function
def _all_arrived_asm(at):
    return (
        f"{{ .reg .pred p; .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, {int(at)}; "
        "L: mbarrier.try_wait.parity.shared.b64 p, [b], $1; @!p bra L; mov.u32 $0, 0; }"
    )


@gluon.jit
def wait_for_warps(round, AT: gl.constexpr):
    """Wait until all warps have arrived for a round, 0 or 1 in turn; the round before the first one is over."""
    return effect(_all_arrived_asm(AT), round)
