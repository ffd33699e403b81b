"""How much the error of each weight counts, and sums that give the same last bit wherever they are made.

The error of a block d = w - w_hat is sum(d^2), or with importance sum(h_i d_i^2), h = E[x^2] of the layer's inputs, or
d^T H d, H = E[x x^T] of the block's own inputs. A block whose inputs were all zero counts as unweighted.

The best of several candidates depends on the last bit of such sums. So products and sums are fp32, each rounded alone,
in one order: eight running sums over the features i, i + 8, i + 16, ..., then their sum from the first to the eighth.
(torch's own sum over 16 or 32 neighbours has this order on a CPU with AVX2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8


def ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the first dimension, a multiple of 8, in the order above."""
    partial = terms[:LANES]
    for first in range(LANES, len(terms), LANES):
        partial = partial + terms[first : first + LANES]
    total: Tensor = partial[0]
    for lane in range(1, LANES):
        total = total + partial[lane]
    return total


def features_first(blocks: Tensor) -> Tensor:
    """fp32 [b, ...] of blocks [..., b]: sums over a block's features are then sums of whole rows."""
    return blocks.movedim(-1, 0).float().contiguous()


def of_features(importance: Tensor, block: int) -> Tensor:
    """fp32 [K/block, block] of E[x^2] by input feature [K]; blocks of zeros become ones."""
    blocks = importance.float().view(-1, block)
    return torch.where((blocks == 0).all(1, keepdim=True), 1.0, blocks)


def of_pairs(importance: Tensor) -> Tensor:
    """Upper triangles fp32 [blocks, b, b] that give the same d^T H d as symmetric H; blocks of zeros become identities.

    A product d_i d_j stands in H twice: here once, with both factors.
    """
    full = importance.float()
    upper = full.triu(1) + full.tril(-1).mT + torch.diag_embed(full.diagonal(dim1=1, dim2=2))
    identity = torch.eye(full.shape[1], device=full.device)
    return torch.where((upper == 0).all(2, keepdim=True).all(1, keepdim=True), identity, upper)


def quadratic(error: Tensor, upper: Tensor) -> Tensor:
    """d^T H d [..., blocks] of errors d [b, ..., blocks] under the triangles [blocks, b, b] of `of_pairs`."""
    factors = upper.permute(1, 2, 0).contiguous()
    terms = torch.empty_like(error)
    for i in range(len(error)):
        row = factors[i, i] * error[i]
        for j in range(i + 1, len(error)):
            row += factors[i, j] * error[j]
        terms[i] = error[i] * row
    return ordered_sum(terms)
