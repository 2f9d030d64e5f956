"""How the official Feature-Distillation code loads images; what `bench data` stands beside.

Its `data/data_fd.py`, like Swin's, opens each file with Pillow, converts it to RGB, and hands it to
torchvision's transforms of Pillow images, which end in normalised float32 (600 KB a view).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OfficialImages(Dataset[Tensor]):
    """Files as the official code's data set reads them: (3, size, size) float32, normalised."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        view: Tensor = self.transform(image)
        return view


def official_batches(
    files: Sequence[Path], size: int, *, batch_size: int, steps: int, workers: int
) -> DataLoader[Tensor]:
    """So many batches of them, from loading processes with PyTorch's defaults."""
    order = [place % len(files) for place in range(steps * batch_size)]
    return DataLoader(
        OfficialImages(files, size), batch_size=batch_size, sampler=order, num_workers=workers
    )
