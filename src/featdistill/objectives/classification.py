"""Classification: cross-entropy with soft labels, mixing and erasing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.types import Batch, Loss, Splitting
from featdistill.models.backbone import Backbone
from featdistill.objectives.mixing import erase, mix


class Classification(nn.Module):
    """Fine-tune a classifier.

    Args:
        classifier: a backbone with logits.
        mixup, cutmix, mix_probability, switch, smoothing: see `mix`.
        erasing: probability of random erasing.
    """

    def __init__(
        self,
        classifier: Backbone,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        switch: float = 0.5,
        smoothing: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.mixup, self.cutmix, self.switch = mixup, cutmix, switch
        self.mix_probability, self.smoothing, self.erasing = mix_probability, smoothing, erasing

    @property
    def mixes(self) -> bool:
        """Whether pairs of samples are mixed, which needs an even batch."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def splitting(self) -> Splitting:
        """Into what a batch may be cut."""
        return "pairs" if self.mixes else "any"

    def forward(self, batch: Batch) -> Loss:
        assert batch.labels is not None
        assert batch.stream is not None
        images, soft = mix(
            self._erased(batch),
            batch.labels,
            batch.stream,
            classes=self.classifier.num_classes,
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=self.mix_probability,
            switch=self.switch,
            smoothing=self.smoothing,
        )
        logits = self.classifier(images, stream=batch.stream).logits.float()
        with torch.no_grad():
            hit = (logits.argmax(1) == soft.argmax(1)).float().mean()
        return Loss(F.cross_entropy(logits, soft), {"train_top1": hit})

    def _erased(self, batch: Batch) -> Tensor:
        """Erase in the model's normalised space, where the noise is as large as the signal."""
        assert batch.stream is not None
        if not self.erasing:
            return batch.images
        mean, std = self.classifier.mean, self.classifier.std
        noisy = erase((batch.images - mean) / std, batch.stream, probability=self.erasing)
        return noisy * std + mean
