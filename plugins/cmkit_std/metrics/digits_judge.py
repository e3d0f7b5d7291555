"""An honest small metric: does another network take the samples for digits, and for which?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cmkit import DataError, DataSpec, Metric, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images


class DigitsJudge(Metric):
    """The share of samples that a classifier is sure of, and how many classes those cover.

    The classifier is an MLP-Mixer trained on the train split of `digits`, and trained to be unsure
    of noise, blurs and mixtures; its network is none of `fidelity`'s. Compare `confident` with
    `real_confident`, the same share of the real images: 0.98 of the held-out digits, and 1 of the
    train split, which it has seen. It is sure of no uniform noise, of 0.015 of the averages of two
    classes, and of 0.36 of the digits blurred by a 3x3 box.
    """

    higher: ClassVar[tuple[str, ...]] = ("confident", "classes")
    neither: ClassVar[tuple[str, ...]] = ("real_confident",)

    threshold: float = Field(0.8, gt=0.1, lt=1)
    """A sample counts when the largest class probability is above this."""

    def keys(self) -> tuple[str, ...]:
        """The share of sure samples, the classes among them, and the share of real images."""
        return "confident", "classes", "real_confident"

    def check(self, data: DataSpec, images: int) -> None:
        """DataError unless the images are grey and at most 16x16; reads the shipped weights."""
        if data.channels != 1 or data.resolution > 16:
            raise DataError(
                f"digits_judge: images of {data.channels} channels and {data.resolution} pixels;"
                " it judges grey digits of at most 16x16: use metric fidelity"
            )

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """The three numbers, for images[i] (1, H, W) uint8."""
        top, label = self._judge(images, device)
        real, _ = self._judge(reference.images, device)
        sure = top > self.threshold
        return {
            "confident": sure.float().mean().item(),
            "classes": float(len(label[sure].unique())),
            "real_confident": (real > self.threshold).float().mean().item(),
        }

    def provenance(self) -> dict[str, Any]:
        """The judge's weights and its threshold."""
        from cmkit_std.metrics.digits_net import SHA256

        return {
            "judge": "cmkit-digits-judge",
            "weights_sha256": SHA256["digits_judge"],
            "threshold": self.threshold,
            "resize": "area to 8x8, none if 8x8",
        }

    @staticmethod
    def _judge(images: Images[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """The largest class probability and its class, (N,) each, on the CPU."""
        import torch

        from cmkit_std.metrics.digits_net import judge_net, to_net
        from cmkit_std.metrics.extract import batches

        net = judge_net(device)
        with torch.inference_mode():
            found = [
                net(to_net(batch.to(device))).softmax(1).max(1)
                for batch in batches(images, 512, "digits_judge")
            ]
        tops, labels = zip(*found, strict=True)
        return torch.cat(tops).cpu(), torch.cat(labels).cpu()
