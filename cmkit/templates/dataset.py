"""Pictures that need no files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Dataset, DataSpec, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond


class Mine(Dataset):
    """Grey 8x8 pictures of a bright bar: class 0 lies, class 1 stands."""

    count: int = Field(64, ge=16, le=100_000)
    """Number of pictures."""

    def spec(self) -> DataSpec:
        return DataSpec(channels=1, resolution=8, num_classes=2)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Every picture once an epoch; batch k is pictures k * size .. of the endless order."""
        import torch

        from cmkit import Cond, permutation

        images = torch.stack([self._picture(i) for i in range(self.count)]).float() / 127.5 - 1
        number = start * size
        while True:
            rows = []
            for n in range(number, number + size):
                epoch, place = divmod(n, self.count)
                rows.append(int(permutation(seed, "mine", epoch, self.count)[place]))
            number += size
            label = torch.tensor([row % 2 for row in rows])
            yield images[rows].to(device), Cond(label=label.to(device))

    def reference(self) -> Reference:
        return Reference([self._picture(i) for i in range(self.count)], f"mine-{self.count}")

    def _picture(self, index: int) -> Tensor:
        """Picture `index`, (1, 8, 8) uint8."""
        import torch

        image = torch.full((1, 8, 8), 20 + index % 7, dtype=torch.uint8)
        image[0, index // 2 % 8] = 230
        return image.mT.contiguous() if index % 2 else image
