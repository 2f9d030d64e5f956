"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018; DINO's protocol).

n bank images, q queries, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class KnnScores:
    """Accuracies by k.

    Attributes:
        top1: k -> share of queries whose heaviest class is right.
        correct: k -> (q,) bool, for each query.
    """

    top1: dict[int, float]
    correct: dict[int, Tensor]


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    chunk: int = 1024,
    block: int = 8192,
    device: torch.device | None = None,
) -> KnnScores:
    """Classify queries by their k nearest bank images; a vote weighs exp(cosine / temperature).

    Never more than `chunk` x `block` similarities exist. They are float64: features of which every
    pair is alike differ in the seventh digit of their cosines. A k larger than the bank is left
    out.

    Args:
        bank: (n, C), `bank_labels` (n,) int64.
        queries: (q, C), `query_labels` (q,) int64.
        device: what computes; the CPU by default.
    """
    device = device or torch.device("cpu")
    ks = sorted(k for k in set(ks) if k <= len(bank)) or [len(bank)]
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        values, votes_of = _nearest(rows.to(device), bank, bank_labels, ks[-1], block)
        # relative to the nearest, so that no weight overflows; the vote's order is the same
        weights = ((values - values[:, :1]) / temperature).exp()
        for k in ks:
            votes = torch.zeros(len(rows), classes, dtype=weights.dtype, device=device)
            votes.scatter_add_(1, votes_of[:, :k], weights[:, :k])
            hits[k].append(votes.argmax(1).cpu() == labels)
    correct = {k: torch.cat(found) for k, found in hits.items()}
    return KnnScores({k: float(c.double().mean()) for k, c in correct.items()}, correct)


def _nearest(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int, block: int
) -> tuple[Tensor, Tensor]:
    """Cosines (B, k) and labels (B, k) of each query's nearest bank images, nearest first."""
    queries = F.normalize(queries.double(), dim=1)
    values = queries.new_empty(len(queries), 0)
    near = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for part, mine in zip(bank.split(block), labels.split(block), strict=True):
        similarity = queries @ F.normalize(part.to(queries.device).double(), dim=1).T
        found, places = similarity.topk(min(k, len(part)), dim=1)
        values = torch.cat([values, found], dim=1)
        near = torch.cat([near, mine.to(queries.device)[places]], dim=1)
        values, places = values.topk(min(k, values.shape[1]), dim=1)
        near = near.gather(1, places)
    return values, near
