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
) -> KnnScores:
    """Classify queries by their k nearest bank images; a vote weighs exp(cosine / temperature).

    Never more than `chunk` rows of the similarity matrix exist. A k larger than the bank is left
    out.

    Args:
        bank: (n, C), `bank_labels` (n,) int64.
        queries: (q, C), `query_labels` (q,) int64.
    """
    ks = sorted(k for k in set(ks) if k <= len(bank)) or [len(bank)]
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    bank = F.normalize(bank.float(), dim=1)
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity = F.normalize(rows.float(), dim=1) @ bank.T
        values, nearest = similarity.topk(ks[-1], dim=1)
        # relative to the nearest, so that no weight overflows; the vote's order is the same
        weights = ((values - values[:, :1]) / temperature).exp()
        votes_of = bank_labels[nearest]
        for k in ks:
            votes = torch.zeros(len(rows), classes)
            votes.scatter_add_(1, votes_of[:, :k], weights[:, :k])
            hits[k].append(votes.argmax(1) == labels)
    correct = {k: torch.cat(found) for k, found in hits.items()}
    return KnnScores({k: float(c.double().mean()) for k, c in correct.items()}, correct)
