"""One layer's pages by themselves, against a plain list of keys and values that are coded and decoded by the codec."""

import random
from itertools import chain

import pytest
import torch
from torch import Tensor

from octo_run.engine.pool import PagePool
from octo_run.errors import OctoError
from octo_run.integrations.batch_pages import BatchPages, Scratch, View
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv

KV_HEADS, HEADS = 2, 6


class Remembered:
    """Keys and values ``[B, kv_heads, n, d]`` in float64, as they are to be read, in the model's own basis."""

    def __init__(self, fmt: KVFormat, batch: int, sinks: int, window: int) -> None:
        self.fmt, self.sinks, self.window, self.pages = fmt, sinks, window, 0
        self.k = self.v = torch.zeros(batch, KV_HEADS, 0, fmt.k.head_dim, dtype=torch.float64)

    @property
    def tail(self) -> int:
        return self.k.shape[2] - self.sinks - 64 * self.pages

    def code(self) -> None:
        page = slice(self.sinks + 64 * self.pages, self.sinks + 64 * self.pages + 64)
        self.k, self.v = self.k.clone(), self.v.clone()
        self.k[:, :, page] = self.fmt.k.decode(self.fmt.k.encode(self.k[:, :, page]), torch.float64)
        self.v[:, :, page] = self.fmt.v.decode(self.fmt.v.encode(self.v[:, :, page]), torch.float64)
        self.pages += 1

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the new tokens see."""
        one = k.shape[2] == 1
        if one and self.tail == self.window + 64:
            self.code()
        self.k, self.v = seen = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        while not one and self.tail >= self.window + 64:
            self.code()
        return seen

    def cut(self, length: int) -> None:
        self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]
        self.pages = min(self.pages, max(0, (length - self.sinks) // 64))

    def select(self, rows: list[int]) -> None:
        self.k, self.v = self.k[rows], self.v[rows]


def make(kv: str, dim: int, batch: int = 2, sinks: int = 64, window: int = 64) -> tuple[BatchPages, Remembered]:
    fmt = parse_kv(kv, dim, plain_dtype=torch.float64)
    store = BatchPages(fmt, batch, KV_HEADS, torch.float64, torch.device("cpu"), sinks, window, Scratch())
    return store, Remembered(fmt, batch, sinks, window)


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool(torch.allclose(got, want, rtol=0, atol=1e-9))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]).logical_not()
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def append(store: BatchPages, remembered: Remembered, count: int) -> View:
    """Append to both, and compare what the new tokens see and what attention makes of it."""
    k, v = torch.randn(2, *remembered.k.shape[:2], count, remembered.k.shape[3], dtype=torch.float64)
    view, (want_k, want_v) = store.append(k, v), remembered.append(k, v)
    q = torch.randn(k.shape[0], HEADS, count, k.shape[3], dtype=torch.float64)
    assert view.hindrance(HEADS, count, causal=True) is None
    assert close(view.attend(q, 0.1), attention(q, want_k, want_v, 0.1, causal=True))
    got_k, got_v = view.dense()
    assert close(got_k, want_k) and close(got_v, want_v)
    assert torch.equal(got_k[:, :, -count:], k) and torch.equal(got_v[:, :, -count:], v), "new tokens are exact"
    assert store.packed == remembered.pages and store.length == remembered.k.shape[2]
    return view


@pytest.mark.few("octopus3-64-64-0")
@pytest.mark.parametrize(
    ("kv", "dim", "sinks", "window"),
    [
        ("oct3", 64, 64, 64), ("oct2", 80, 0, 64), ("oct4", 96, 5, 0), ("oct3", 128, 64, 128), ("oct4:oct2", 64, 3, 64),
        ("octopus3", 64, 64, 0), ("oct3:bf16", 112, 64, 64), ("bf16", 48, 1, 64), ("oct3", 256, 0, 0),
    ],
)  # fmt: skip
def test_all_positions_are_read_as_the_codec_gives_them_back(kv: str, dim: int, sinks: int, window: int) -> None:
    torch.manual_seed(dim)
    store, remembered = make(kv, dim, 2, sinks, window)
    for count in (sinks + window + 63, 1, 1, 1, 64, 1, 63, 65, 2, 136, *[1] * 66):
        append(store, remembered, count)
        if count > 1:
            got, want = store.view().dense(), (remembered.k, remembered.v)
            assert close(got[0], want[0]) and close(got[1], want[1])
    assert store.packed >= 6


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_changes(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    kv, sinks, window = chance.choice(["oct3", "oct2:oct4", "bf16"]), chance.choice([0, 7, 64]), chance.choice([0, 64])
    store, remembered = make(kv, 64, chance.choice([1, 3]), sinks, window)
    for _ in range(40):
        rows = store.shape[0]
        match chance.choice(["append", "append", "append", "one", "cut", "select"]):
            case "append":
                append(store, remembered, chance.choice([2, 5, 63, 64, 65, 130]))
            case "one":
                for _ in range(chance.choice([1, 65])):
                    append(store, remembered, 1)
            case "cut":
                length = max(0, store.length - chance.choice([1, 4, 64, 70, 200]))
                store.cut(length)
                remembered.cut(length)
            case "select":
                chosen = [chance.randrange(rows) for _ in range(chance.choice([rows, rows, 1, 4]))]
                store.select(chosen)
                remembered.select(chosen)
        got = store.view().dense()
        assert close(got[0], remembered.k) and close(got[1], remembered.v)
        pool, held = store.arena.table.pool, set(chain(*store.arena.table.pool.held))
        assert pool.free == len(pool) - len(held) and all(len(pages) == store.packed for pages in pool.held)


def test_rows_that_are_alike_share_their_pages() -> None:
    store, remembered = make("oct3", 64, batch=1, window=0)
    append(store, remembered, 64 + 640)
    before = store.arena.pages.data_ptr()
    store.select([0] * 4)
    remembered.select([0] * 4)
    assert store.arena.pages.data_ptr() == before and store.arena.table.pool.holders(0) == 4
    append(store, remembered, 64)  # each has a page of its own from here on
    assert len(set(chain(*store.arena.table.pool.held))) == 10 + 4
    store.select([2])
    remembered.select([2])
    append(store, remembered, 1)
    assert store.arena.table.pool.holders(0) == 1


@pytest.mark.slow
def test_pages_before_a_token_are_let_go_of() -> None:
    torch.manual_seed(1)
    store, remembered = make("oct3", 64, batch=2, sinks=0)
    dropped = 0
    for count in (300, 1, 64, 1, 200, *[1] * 130, 7):
        store.drop_before(store.length - 99)
        kept = store.length
        assert kept < 99 + 64 or not store.packed
        gone = remembered.k.shape[2] - kept
        remembered.k, remembered.v = remembered.k[:, :, gone:], remembered.v[:, :, gone:]
        remembered.pages -= gone // 64
        dropped += gone
        append(store, remembered, count)
        assert store.dropped == dropped
    assert dropped >= 448
    pool = store.arena.table.pool
    assert len(pool) < 2 * 9, "pages that were let go of are used again"
    store.cut(store.length - 5)
    remembered.cut(store.length)
    assert close(store.view().dense()[0], remembered.k)


@pytest.mark.parametrize("queries", [1, 4])
def test_queries_that_see_everything(queries: int) -> None:
    store, remembered = make("oct3", 64)
    append(store, remembered, 301)
    q, view = torch.randn(2, HEADS, queries, 64, dtype=torch.float64), store.view()
    assert view.hindrance(HEADS, queries, causal=False) is None
    want = attention(q, remembered.k, remembered.v, 0.1, causal=False)
    assert close(view.attend(q, 0.1, causal=False), want)
    assert "several queries" in str(view.hindrance(HEADS, 100, causal=False))
    assert "coded" in str(view.hindrance(HEADS, 300, causal=True))


def test_a_view_is_good_until_the_layer_changes() -> None:
    store, remembered = make("oct3", 64)
    view = append(store, remembered, 300)
    again = store.view()
    store.append(*torch.zeros(2, 2, KV_HEADS, 1, 64, dtype=torch.float64))
    with pytest.raises(OctoError, match="the cache has changed since"):
        again.dense()
    with pytest.raises(OctoError, match="the cache has changed since"):
        view.attend(torch.zeros(2, HEADS, 1, 64, dtype=torch.float64), 1.0)


@pytest.mark.slow
def test_pages_are_what_is_read() -> None:
    """Not a copy in full precision beside them: another page gives another result, and the bytes are those of pages."""
    store, remembered = make("oct3", 128, window=0)
    append(store, remembered, 64 + 64 * 20)
    arena = store.arena
    dense = 2 * remembered.k.nbytes
    assert arena.nbytes < dense / 5, (arena.nbytes, dense)
    q = torch.randn(2, HEADS, 1, 128, dtype=torch.float64)
    before, keys = store.view().attend(q, 0.1), store.view().dense()[0]
    arena.pages[arena.page_table[:, 3].long()] = 0
    after, other = store.view().attend(q, 0.1), store.view().dense()[0]
    assert not close(after, before)
    changed = (other != keys).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert changed == list(range(64 + 3 * 64, 64 + 4 * 64))


def test_pages_follow_the_layout_of_the_device() -> None:
    store, remembered = make("oct3", 64)
    append(store, remembered, 300)
    assert store.arena.page_formats[0] == PageFormat(store.fmt, "rows")


def test_a_long_prompt_is_coded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octo_run.integrations.batch_pages._CODED_AT_ONCE", 2 * 2 * KV_HEADS * 64 * 3)
    store, remembered = make("oct3", 64)
    append(store, remembered, 64 * 11 + 9)
    append(store, remembered, 1)


def test_a_pool_loses_first_pages_and_changes_rows() -> None:
    pool = PagePool(4, 2)
    first, second = pool.take(0, 2), pool.take(1, 2)
    pool.grow(2)
    assert pool.free == 2 and len(pool) == 6
    other = pool.rearranged([1, 1, 0])
    assert other.held == [second, second, first] and other.holders(second[0]) == 2 and other.free == 2
    other.drop_first(1)
    assert other.held == [second[1:], second[1:], first[1:]] and other.free == 4
    assert set(other.take(0, 4)) == {4, 5, first[0], second[0]}
