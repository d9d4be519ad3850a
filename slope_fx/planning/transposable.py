"""Masks that are N:M along the rows and along the columns.

The backward pass prunes the columns of ``W^R``. A weight whose mask already keeps N of each M
elements of a column loses nothing there: ``W^{R,C}`` is ``W^R``, and the input gradient is exact.

Sources: transposable masks, arXiv 2102.08124, and for the pretraining of transformers FST, arXiv
2404.01847. For blocks of 8 and 16 the assignment is relaxed with an entropy as in TSENOR, arXiv
2505.23949.
"""

import functools
import itertools

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Scores for which masks are chosen at a time."""
_SHARPNESS, _STEPS = 300.0, 200
"""The weight of the scores against the entropy, and the projections of the relaxation."""


def transposable_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask with a large sum of kept scores that keeps N of each M in all rows and columns.

    With M up to 4 the sum is the largest possible one. Beyond, it is at least 97% of it on
    random scores.

    Args:
        scores: (rows, columns), both divisible by M. NaN counts as the largest number.
        n, m: the pattern.

    Returns:
        bool, in the shape of the scores: each block of M x M has N elements in each of its rows
        and columns.
    """
    rows, columns = scores.shape
    blocks = scores.reshape(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m, m)
    choose = _best if m <= 4 else _good
    chunks = blocks.split(max(1, _CHUNK // (m * m)))
    chosen = torch.cat([choose(_finite(chunk), n) for chunk in chunks])
    return chosen.view(rows // m, columns // m, m, m).transpose(1, 2).reshape(rows, columns)


def _finite(blocks: Tensor) -> Tensor:
    """The scores of each block between 0 and 1."""
    blocks = blocks.float()
    largest = torch.finfo(torch.float32).max
    blocks = blocks.nan_to_num(nan=largest, posinf=largest, neginf=-largest)
    low, high = blocks.amin((1, 2), keepdim=True), blocks.amax((1, 2), keepdim=True)
    return (blocks / 2 - low / 2) / (high / 2 - low / 2).clamp_min(1e-30)


@functools.cache
def _patterns(n: int, m: int) -> Tensor:
    """All masks of a block: float (masks, M * M). At 2:4 there are 90."""
    row = [bits for bits in itertools.product((0, 1), repeat=m) if sum(bits) == n]
    blocks = itertools.product(row, repeat=m)
    good = [b for b in blocks if all(sum(column) == n for column in zip(*b, strict=True))]
    return torch.tensor(good, dtype=torch.float32).flatten(1)


def _best(blocks: Tensor, n: int) -> Tensor:
    patterns = _patterns(n, blocks.shape[-1]).to(blocks.device)
    chosen = (blocks.flatten(1) @ patterns.t()).argmax(1)
    return patterns[chosen].view_as(blocks).bool()


def _good(blocks: Tensor, n: int) -> Tensor:
    return _filled(_rounded(_relaxed(blocks, n), n), blocks, n)


def _relaxed(blocks: Tensor, n: int) -> Tensor:
    """The logarithm of the fractional mask with the largest sum of scores and entropy.

    By Dykstra's projections on the rows' sums, the columns' sums, and the entries up to 1.
    """
    log, most = blocks * _SHARPNESS, torch.tensor(float(n)).log()
    excess = torch.zeros_like(log)
    for _ in range(_STEPS):
        log = log - log.logsumexp(2, keepdim=True) + most
        log = log - log.logsumexp(1, keepdim=True) + most
        before = log + excess
        log = before.clamp_max(0.0)
        excess = before - log
    return log


def _rounded(order: Tensor, n: int) -> Tensor:
    """The largest entries first, as long as their row and column have less than N."""
    count, m, _ = order.shape
    mask = torch.zeros_like(order, dtype=torch.bool)
    rows, columns = (torch.full((count, m), n, device=order.device) for _ in range(2))
    block = torch.arange(count, device=order.device)
    for place in order.flatten(1).argsort(1, descending=True).unbind(1):
        row, column = place // m, place % m
        free = (rows[block, row] > 0) & (columns[block, column] > 0)
        mask[block, row, column] = free
        rows[block, row] -= free.long()
        columns[block, column] -= free.long()
    return mask


def _filled(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """A mask with N in each row and column, from one with at most N."""
    m = mask.shape[-1]
    lowest = torch.tensor(-torch.inf, device=scores.device)
    while True:
        short_rows, short_columns = n - mask.sum(2), n - mask.sum(1)
        wanting = (short_rows > 0).any(1).nonzero().flatten()
        if not len(wanting):
            return mask
        kept, score = mask[wanting], scores[wanting]
        rows, columns = short_rows[wanting], short_columns[wanting]
        block = torch.arange(len(wanting), device=mask.device)
        # One more element, where its row and its column lack one ...
        free = (rows > 0)[:, :, None] & (columns > 0)[:, None, :] & ~kept
        direct, place = torch.where(free, score, lowest).flatten(1).max(1)
        # ... or else an element gives way to two: one in the row, one in the column that lack one.
        row, column = rows.argmax(1), columns.argmax(1)
        in_row, in_column = kept[block, row], kept[block, :, column]
        gain = score[block, row][:, None, :] + score[block, :, column][:, :, None] - score
        movable = kept & ~in_row[:, None, :] & ~in_column[:, :, None]
        away = torch.where(movable, gain, lowest).flatten(1).argmax(1)
        adds = direct > lowest
        changed = kept.clone()
        changed[block[adds], place[adds] // m, place[adds] % m] = True
        moves, away_row, away_column = block[~adds], away[~adds] // m, away[~adds] % m
        changed[moves, away_row, away_column] = False
        changed[moves, row[~adds], away_column] = True
        changed[moves, away_row, column[~adds]] = True
        mask[wanting] = changed
