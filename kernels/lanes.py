"""Single machine instructions for Gluon kernels written lane by lane: tensors with one element a thread (NVIDIA).

Shared memory is addressed in bytes from the start of the kernel's one allocation, ``global_smem`` in the PTX.
"""
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # renamed after Triton 3.6


@constexpr_function
def _prmt_asm(selector):
    return f"prmt.b32 $0, $1, $2, {int(selector)};"


@constexpr_function
def _shared_asm(instruction, offset=0):
    """An instruction on shared memory: ``@`` in it stands for the address, the last operand's plus ``offset``."""
    setup = "{ .reg .u32 b, a; mov.u32 b, global_smem; add.u32 a, b, $#; "
    operand = str(instruction).count("$")
    return setup.replace("$#", f"${operand}") + str(instruction).replace("@", f"[a+{int(offset)}]") + " }"


@gluon.jit
def u32(x):
    return x.to(gl.uint32)


@gluon.jit
def effect(ASM: gl.constexpr, x):
    """An instruction that is worth its effect: int32 in ($1), if it wants one, and out ($0)."""
    return gl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_shared(address, OFFSET: gl.constexpr):
    """A word that no thread writes any more: the compiler may move the read."""
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.u32 $0, @;", OFFSET), "=r,r", [address], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def read_shared(address):
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.u32 $0, @;"), "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def read_shared_f(address):
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.f32 $0, @;"), "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def read_shared4(address):
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.v4.u32 {$0, $1, $2, $3}, @;"),
        "=r,=r,=r,=r,r",
        [address],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def read_shared4_at(address, OFFSET: gl.constexpr):
    """`read_shared4` so many bytes behind ``address``, without an instruction for it."""
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.v4.u32 {$0, $1, $2, $3}, @;", OFFSET),
        "=r,=r,=r,=r,r",
        [address],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write_shared(address, value):
    return gl.inline_asm_elementwise(
        _shared_asm("st.shared.u32 @, $1; mov.u32 $0, 0;"),
        "=r,r,r",
        [value, address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write_shared4(address, value):
    """The same word four times."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $2; st.shared.v4.u32 [b], {$1, $1, $1, $1}; mov.u32 $0, 0; }",
        "=r,r,r",
        [value, address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write_shared2(address, a, b):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $3; st.shared.v2.u32 [b], {$1, $2}; mov.u32 $0, 0; }",
        "=r,r,r,r",
        [a, b, address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write_shared4_of(address, a, b, c, d):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $5; st.shared.v4.u32 [b], {$1, $2, $3, $4}; mov.u32 $0, 0; }",
        "=r,r,r,r,r,r",
        [a, b, c, d, address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def write_shared4_if(address, a, b, c, d, wanted):
    """Only in the lanes that want it."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; .reg .pred p; mov.u32 b, global_smem; add.u32 b, b, $5; setp.ne.u32 p, $6, 0; "
        "@p st.shared.v4.u32 [b], {$1, $2, $3, $4}; mov.u32 $0, 0; }",
        "=r,r,r,r,r,r,r",
        [a, b, c, d, address, u32(wanted)],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@constexpr_function
def _scalars_asm(at):
    return f"ld.shared.v4.u32 {{$0, $1, $2, $3}}, [global_smem+{int(at)}];"


@gluon.jit
def read_scalars(x, AT: gl.constexpr):
    """Four int32 at byte AT as scalars; x is any scalar."""
    return gl.inline_asm_elementwise(
        _scalars_asm(AT),
        "=r,=r,=r,=r,r",
        [x],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def read_shared2(address):
    return gl.inline_asm_elementwise(
        _shared_asm("ld.shared.v2.u32 {$0, $1}, @;"),
        "=r,=r,r",
        [address],
        dtype=(gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def read_shared_half(address):
    """Two bytes, the upper half of the result zero."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; .reg .u16 h; mov.u32 b, global_smem; add.u32 b, b, $1; ld.shared.u16 h, [b]; cvt.u32.u16 $0, h; }",
        "=r,r",
        [address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_global4(pointer):
    """The lane's 16 bytes at ``pointer``."""
    return gl.inline_asm_elementwise(
        "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [pointer],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def load_global2(pointer, IN_ORDER: gl.constexpr = False):
    """The lane's 8 bytes at ``pointer``; IN_ORDER: asked for before what comes later in the source."""
    return gl.inline_asm_elementwise(
        "ld.global.v2.u32 {$0, $1}, [$2];",
        "=r,=r,l",
        [pointer],
        dtype=(gl.uint32, gl.uint32),
        is_pure=not IN_ORDER,
        pack=1,
    )


@gluon.jit
def load_global_l2_f(pointer):
    """The lane's float32 at ``pointer``, past the first-level cache."""
    return gl.inline_asm_elementwise(
        "ld.global.cg.f32 $0, [$1];", "=f,l", [pointer], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def load_global4_l2(pointer):
    """The lane's 16 bytes at ``pointer``, past the first-level cache."""
    return gl.inline_asm_elementwise(
        "ld.global.cg.v4.u32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [pointer],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def sync_warp(lane):
    return effect("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", lane)


@gluon.jit
def own_warp(x):
    """The number of the thread's warp as a scalar (from a scalar): a loop that depends on it is each warp's own."""
    return effect("{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", x)


@gluon.jit
def own_warp_backwards(x, WARPS: gl.constexpr):
    """`own_warp`, numbered from the last of WARPS on."""
    return WARPS - 1 - own_warp(x)


@gluon.jit
def runs_among(x, FIRST: gl.constexpr, END: gl.constexpr):
    """Whether the thread is of one of these warps, as a scalar (from a scalar): what depends on it is theirs alone."""
    number = own_warp(x)
    return (number >= FIRST) & (number < END)


@gluon.jit
def has_role(x, ROLE: gl.constexpr, ROLES: gl.constexpr):
    """Whether the thread's warp is number ROLE of every ROLES, as a scalar (from a scalar)."""
    return own_warp(x) % ROLES == ROLE


@gluon.jit
def by_role(number, role, function, stage, lane, shape):
    """``function(stage, lane, ROLE, *shape)``, a tuple, where ROLE is the scalar ``number`` of the thread's warp among
    four: a branch of the code each. ``role``: that number in each thread; where the warps are run in step, all take
    every branch, and it tells whose result is whose."""
    if number < 2:
        if number == 0:
            found = function(stage, lane, 0, *shape)
        else:
            found = function(stage, lane, 1, *shape)
    else:
        if number == 2:
            found = function(stage, lane, 2, *shape)
        else:
            found = function(stage, lane, 3, *shape)
    return found


@gluon.jit
def team_barrier(team):
    """A barrier of four warps that begin at a multiple of four, of which the scalar ``team`` is the number."""
    return effect("{ .reg .u32 b; add.u32 b, $1, 1; bar.sync b, 128; mov.u32 $0, 0; }", team)


@gluon.jit
def write_shared_if(address, value, wanted):
    """Only in the lanes that want it."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; .reg .pred p; mov.u32 b, global_smem; add.u32 b, b, $2; setp.ne.u32 p, $3, 0; "
        "@p st.shared.u32 [b], $1; mov.u32 $0, 0; }",
        "=r,r,r,r",
        [value, address, u32(wanted)],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def let_next_kernel_start(x):
    """Where the next kernel was launched early: it may begin once all programs of this one have come here."""
    return effect("griddepcontrol.launch_dependents; mov.u32 $0, 0;", x)


@gluon.jit
def wait_for_kernel_before(x):
    """Wait until the kernel in front has ended and its writes are visible (at once if this one was not launched early).

    A scalar in, a scalar zero out: addresses that it is added to are not read from before.
    """
    return effect("griddepcontrol.wait; mov.u32 $0, 0;", x)


@gluon.jit
def arrive(counter, last):
    """Make the program's writes visible, count it in; the number of programs counted before it, for all its threads.

    ``counter`` (scalar pointer) returns to zero after ``last + 1`` arrivals. Scalars in, a scalar out. The barriers order
    what the other threads write before, and read after, the one thread's release and acquire (PTX: causality order).
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t, v, b; mov.u32 t, %tid.x; mov.u32 b, global_smem; setp.eq.u32 p, t, 0; "
        "bar.sync 0; @p atom.acq_rel.gpu.global.inc.u32 v, [$1], $2; @p st.shared.u32 [b], v; "
        "bar.sync 0; ld.shared.u32 $0, [b]; }",
        "=r,l,r",
        [counter, last],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def permute_bytes(a, b, SELECTOR: gl.constexpr):
    return gl.inline_asm_elementwise(_prmt_asm(SELECTOR), "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def permute_bytes_by(a, b, selector):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=gl.uint32, is_pure=True, pack=1
    )


@constexpr_function
def _shift_asm(places):
    return f"shf.r.wrap.b32 $0, $1, $2, {int(places)};"


@gluon.jit
def shift_pair(low, high, PLACES: gl.constexpr):
    """The lower word of two, moved down by so many bits."""
    return gl.inline_asm_elementwise(_shift_asm(PLACES), "=r,r,r", [low, high], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def shuffle(x, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, lane], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def shuffle_f(x, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def largest_of_warp(x):
    """The largest uint32 of all lanes, in all of them."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def mma_int8_32(c, a0, a1, a2, a3, b0, b1):
    """c (4 int32) + 16 x 32 int8 times 32 x 8 int8."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def mma_int8_16(c, a0, a1, b0):
    """c (4 int32) + 16 x 16 int8 times 16 x 8 int8."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r",
        [a0, a1, b0, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@constexpr_function
def _mma_half_asm(element):
    kind = f"{element}.{element}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )


@gluon.jit
def mma_half(c, a0, a1, a2, a3, b0, b1, ELEMENT: gl.constexpr):
    """c (4 float32) + 16 x 16 times 16 x 8 of ELEMENT, "bf16" or "f16"."""
    return gl.inline_asm_elementwise(
        _mma_half_asm(ELEMENT),
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def mma_half_8(c, a0, a1, b0):
    """c (4 float32) + 16 x 8 times 8 x 8 of fp16."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=f,=f,=f,=f,r,r,r,f,f,f,f",
        [a0, a1, b0, c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@constexpr_function
def _fma_asm(element):
    return f"fma.rn.{element}x2 $0, $1, $2, $3;"


@gluon.jit
def fma_half2(a, b, c, ELEMENT: gl.constexpr):
    """``a * b + c`` of registers of two 16-bit floats."""
    return gl.inline_asm_elementwise(_fma_asm(ELEMENT), "=r,r,r,r", [a, b, c], dtype=gl.uint32, is_pure=True, pack=1)


@constexpr_function
def _pack_asm(element):
    return f"cvt.rn.{element}x2.f32 $0, $2, $1;"


@gluon.jit
def pack_half(low, high, ELEMENT: gl.constexpr):
    """Two float32 rounded to ELEMENT, "bf16" or "f16", in one register."""
    return gl.inline_asm_elementwise(_pack_asm(ELEMENT), "=r,f,f", [low, high], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def pack_half_finite(low, high):
    """Two float32 rounded to fp16 in one register, the largest number in place of infinity."""
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def low_half(word):
    """The fp16 number in a register's lower half as float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .f16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }",
        "=f,r",
        [word],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def high_half(word):
    """The fp16 number in a register's upper half as float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .f16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
        "=f,r",
        [word],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def floats_of(word, ELEMENT: gl.constexpr):
    """The two numbers of ELEMENT, "bf16" or "f16", in a register as float32."""
    if ELEMENT == "bf16":
        return (word << 16).to(gl.float32, bitcast=True), (word & 0xFFFF0000).to(gl.float32, bitcast=True)
    else:
        return low_half(word), high_half(word)


@gluon.jit
def max_halves(a, b):
    """The larger ones of two numbers of 16 bits, without signs, in a register each."""
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def repeat(x, COUNT: gl.constexpr):
    """A tuple of x, COUNT times."""
    out = ()
    for _ in gl.static_range(COUNT):
        out = out + (x,)
    return out


@gluon.jit
def sum_over_rows(x, lane):
    """The sum of x over the lanes that agree in ``lane % 4``, in all of them."""
    x += shuffle_f(x, lane ^ 4)
    x += shuffle_f(x, lane ^ 8)
    x += shuffle_f(x, lane ^ 16)
    return x


@gluon.jit
def max_over_rows(x, lane):
    """The maximum of x over the lanes that agree in ``lane % 4``, in all of them."""
    x = gl.maximum(x, shuffle_f(x, lane ^ 4))
    x = gl.maximum(x, shuffle_f(x, lane ^ 8))
    x = gl.maximum(x, shuffle_f(x, lane ^ 16))
    return x
