"""Tables of codewords in shared memory, for the decode kernels of trellis codes, and words that a warp keeps there."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import read_shared4, u32, write_shared, write_shared2, write_shared4, write_shared4_of


@constexpr_function
def row_shift(copies):
    """Logarithm of the bytes of a table entry's copies."""
    return int(copies).bit_length() + 1


@gluon.jit
def entries(table_ptr, tid, ENTRIES: gl.constexpr, THREADS: gl.constexpr):
    """The thread's words of a table, every THREADS-th."""
    words = ()
    for r in gl.static_range((ENTRIES + THREADS - 1) // THREADS):
        words = words + (u32(gl.load(table_ptr + gl.minimum(r * THREADS + tid, ENTRIES - 1))),)
    return words


@gluon.jit
def _fill(words, tid, AT: gl.constexpr, ENTRIES: gl.constexpr, COPIES: gl.constexpr, THREADS: gl.constexpr):
    """Write the threads' words of a table to byte AT of shared memory on, each COPIES times, without bank conflicts."""
    QUADS: gl.constexpr = COPIES // 4
    for r in gl.static_range((ENTRIES + THREADS - 1) // THREADS):
        entry = gl.minimum(r * THREADS + tid, ENTRIES - 1)
        if COPIES == 1:
            write_shared(u32(AT + entry * 4), words[r])
        elif COPIES == 2:
            write_shared2(u32(AT + entry * 8), words[r], words[r])
        for i in gl.static_range(QUADS):
            quad = ((tid % 32) // (32 // COPIES) + i) % QUADS
            write_shared4(u32(AT + entry * (4 * COPIES) + quad * 16), words[r])


@gluon.jit
def fill_tables(
    table_k, extra_k, table_v_ptr, tid, MAIN_K: gl.constexpr, COPIES_K: gl.constexpr, EXTRAS_AT_K: gl.constexpr,
    B_K: gl.constexpr, COPIES_XK: gl.constexpr, TABLE_AT_V: gl.constexpr, MAIN_V: gl.constexpr,
    COPIES_V: gl.constexpr, EXTRAS_AT_V: gl.constexpr, B_V: gl.constexpr, COPIES_XV: gl.constexpr,
    EXTRAS: gl.constexpr, ONE_TABLE: gl.constexpr, THREADS: gl.constexpr,
):  # fmt: skip
    """Copies of the tables for the lanes, so that (with 32) no two lanes of a read meet in a bank."""
    _fill(table_k, tid, 0, MAIN_K, COPIES_K, THREADS)
    if EXTRAS > 0:
        _fill(extra_k, tid, EXTRAS_AT_K, 1 << B_K, COPIES_XK, THREADS)
    if not ONE_TABLE:
        _fill(entries(table_v_ptr, tid, MAIN_V, THREADS), tid, TABLE_AT_V, MAIN_V, COPIES_V, THREADS)
        if EXTRAS > 0:
            extra_v = entries(table_v_ptr + MAIN_V, tid, 1 << B_V, THREADS)
            _fill(extra_v, tid, EXTRAS_AT_V, 1 << B_V, COPIES_XV, THREADS)


@gluon.jit
def keep_words(at, words):
    """Write the lane's words to shared memory from byte ``at`` on, for `kept_words`."""
    for c in gl.static_range((len(words) + 3) // 4):
        four = ()
        for i in gl.static_range(4):
            four = four + (words[min(4 * c + i, len(words) - 1)],)
        write_shared4_of(at + c * 512, four[0], four[1], four[2], four[3])


@gluon.jit
def kept_words(at, COUNT: gl.constexpr):
    """What `keep_words` wrote: COUNT words, and what fills the last four."""
    words = ()
    for c in gl.static_range((COUNT + 3) // 4):
        a0, a1, a2, a3 = read_shared4(at + c * 512)
        words = words + (a0, a1, a2, a3)
    return words
