"""Searches for the best codes of a tail-biting trellis and of a memoryless table, for many vectors at once.

A trellis code of a chain of n triplets: slot s has a code of `b` bits; its codeword is the table entry
`window(s) = (code(s + 1 mod n) & (2^sigma - 1)) << b | code(s)`, sigma the state bits. The slot with the next higher
number is therefore the predecessor, the predecessor of the last slot is slot 0, and the state between two slots is the
low sigma bits of a code. The cost of a codeword p for a triplet u is |p|^2 - 2 p.u, the squared distance less |u|^2.

All arithmetic is in float32. If points and triplets are on a grid on which the costs are exact, so is the result, in
any order of summation (the codecs see to that). Ties, in this order: for a pair of states before and after a slot the
smallest code; on the way from the last slot down to slot 0 the smallest state before; the smallest start state, which
is the low bits of the code of slot 0.
"""

import torch


def nearest_entries(points: torch.Tensor, triplets: torch.Tensor, used: int = 3) -> torch.Tensor:
    """Find the cheapest of `points` [entries, 3] for each of `triplets` [3, vectors].

    Args:
        used: Only so many of the first coordinates count.

    Returns:
        Index int64 [vectors]; of equals the smallest.
    """
    used_points = points[:, :used]
    costs = torch.addmm(used_points.square().sum(1, keepdim=True), used_points, triplets[:used], alpha=-2)
    return costs.argmin(dim=0)


def by_cell(points: torch.Tensor, stream: int, state: int) -> torch.Tensor:
    """The points of a trellis table as [high bits of the code, cell, 3]; cell = state before << sigma | state after."""
    states = 1 << state
    return points[: 1 << (stream + state)].view(states, -1, states, 3).transpose(0, 1).reshape(-1, states * states, 3)


def trellis_codes(points: torch.Tensor, triplets: torch.Tensor, stream: int, state: int) -> torch.Tensor:
    """Codes int64 [n, chains] of the cheapest closed path for each chain.

    Args:
        points: float32 [at least 2^(stream + state), 3], the trellis table.
        triplets: float32 [n, 3, chains], by slot.
    """
    cells = by_cell(points, stream, state)
    high, num_cells, _ = cells.shape
    outer = 1 << (high.bit_length() // 2)  # the minimum over `high` in two steps: the first one's results are kept
    flat = cells.reshape(-1, 3)
    terms = torch.cat((-2 * flat, flat.square().sum(1, keepdim=True)), 1)
    slots, _, chains = triplets.shape
    factors = torch.cat((triplets, torch.ones_like(triplets[:, :1])), 1)
    partial = triplets.new_empty(slots, outer, num_cells, chains)
    costs = triplets.new_empty(len(flat), chains)
    for slot in range(slots):
        torch.mm(terms, factors[slot], out=costs)
        torch.amin(costs.view(outer, high // outer, num_cells, chains), dim=1, out=partial[slot])
    after = _closed_paths(partial.amin(dim=1), state)
    before = torch.roll(after, -1, 0)
    cell = (before << state) | after
    first = partial.gather(2, cell[:, None, None].expand(-1, outer, -1, -1))[:, :, 0].argmin(dim=1)
    grouped = cells.view(outer, high // outer, num_cells, 3).permute(0, 2, 1, 3).reshape(-1, high // outer, 3)
    near = grouped[(first * num_cells + cell).view(-1)]  # [n * chains, high / outer, 3]
    wanted = triplets.transpose(1, 2).reshape(-1, 3, 1)
    last = near.square().sum(2) - 2 * torch.bmm(near, wanted)[:, :, 0]
    second = last.argmin(dim=1).view(slots, chains)
    return ((first * (high // outer) + second) << state) | after


def _closed_paths(cells: torch.Tensor, state: int) -> torch.Tensor:
    """States int64 [n, chains] after each slot (the low bits of its code) on the cheapest closed path.

    cells [n, cells, chains]: the least cost of each slot for each pair of states (before << state | after).
    """
    states = 1 << state
    slots, _, chains = cells.shape
    pairs = cells.view(slots, states, states, chains)  # [slot, before, after, chain]
    reached = [pairs[slots - 1]]  # [start, state after the slot, chain], from the last slot down
    for slot in range(slots - 2, -1, -1):
        last = reached[-1]
        best = last[:, :1] + pairs[slot, 0]
        for before in range(1, states):
            torch.minimum(best, last[:, before, None] + pairs[slot, before], out=best)
        reached.append(best)
    chain = torch.arange(chains, device=cells.device)
    start = torch.diagonal(reached[-1]).argmin(dim=1)  # the diagonal is [chains, states]
    path = [start]
    for slot in range(slots - 1):
        costs = reached[slots - 2 - slot][start, :, chain] + pairs[slot][:, path[-1], chain].t()
        path.append(costs.argmin(dim=1))
    return torch.stack(path)
