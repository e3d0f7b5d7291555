"""Does another network take the samples for emoji, and for such as their prompts name?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cmkit import DataError, DataSpec, Metric, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images


class EmojiJudge(Metric):
    """The share of samples whose group a classifier is sure of, how many groups those cover, and
    with prompts the share whose group is none that the prompt names.

    A prompt names the groups of all emoji that have each of its parts, between commas, as name or
    keyword; other prompts are left out of `unrecognized`. Compare `confident` with
    `real_confident`, the same share of the real images, and `unrecognized` with the judge's own
    errors, which are not few: 0.15 of the train split, 0.31 of its held-out glyphs, 0.37 of known
    glyphs in a style that it never saw.

    The classifier is an MLP-Mixer trained on the train split of `emoji` and on the same glyphs of
    Fluent Emoji, and trained to be unsure of noise, blurs and mixtures; its network is none of
    `fidelity`'s. It is sure of no noise, and of 0.15 of the averages of two glyphs.
    """

    higher: ClassVar[tuple[str, ...]] = ("confident", "classes")
    neither: ClassVar[tuple[str, ...]] = ("real_confident",)

    threshold: float = Field(0.8, gt=0.125, lt=1)
    """A sample counts as sure when the largest group probability is above this."""
    prompts: bool = False
    """Measure `unrecognized` too, of samples that are drawn from prompts."""

    def keys(self) -> tuple[str, ...]:
        """The share of sure samples, the groups among them, the share of real images, and with
        prompts the share of samples that are not recognized."""
        always = "confident", "classes", "real_confident"
        return (*always, "unrecognized") if self.prompts else always

    def check(self, data: DataSpec, images: int) -> None:
        """DataError unless the images are RGB or grey; reads the shipped weights."""
        import torch

        from cmkit_std.metrics.emoji_net import judge_net

        if data.channels not in (1, 3):
            raise DataError(
                f"emoji_judge: images of {data.channels} channels; it judges RGB and grey"
                " ones: use metric fidelity"
            )
        judge_net(torch.device("cpu"))

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """DataError where samples have no prompts, or none that names an emoji."""
        self._named(reference.captions)

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """The numbers, for images[i] (C, H, W) uint8 with prompts reference.captions[i % n]."""
        named = self._named(reference.captions)
        top, group = self._judge(images, device)
        real, _ = self._judge(reference.images, device)
        sure = top > self.threshold
        found = {
            "confident": sure.float().mean().item(),
            "classes": float(len(group[sure].unique())),
            "real_confident": (real > self.threshold).float().mean().item(),
        }
        if self.prompts:
            wanted = [named[n % len(named)] for n in range(len(group))]
            right = [one in of for one, of in zip(group.tolist(), wanted, strict=True) if of]
            if not right:
                raise DataError(
                    f"emoji_judge: no prompt of the {len(group)} samples names an emoji; draw more,"
                    " or set metric.prompts = false"
                )
            found["unrecognized"] = 1 - sum(right) / len(right)
        return found

    def provenance(self) -> dict[str, Any]:
        """The judge's weights and its threshold."""
        from cmkit_std.metrics.emoji_net import SHA256

        return {
            "judge": "cmkit-emoji-judge",
            "weights_sha256": SHA256["emoji_judge"],
            "threshold": self.threshold,
            "resize": "area to 32x32, none if 32x32",
        }

    def _named(self, captions: Sequence[str] | None) -> list[frozenset[int]]:
        """The groups that each prompt names, none for a prompt that is not understood."""
        if not self.prompts:
            return []
        if not captions:
            raise DataError(
                "emoji_judge: the samples have no prompts; set metric.prompts = false, or add"
                " [text] with a network that reads prompts"
            )
        from cmkit_std.datasets.emoji import groups_of

        named = [groups_of(caption) for caption in captions]
        if not any(named):
            raise DataError(
                f"emoji_judge: none of the {len(captions)} prompts names an emoji, such as"
                f" {captions[0]!r}; say names and keywords between commas, or set"
                " metric.prompts = false"
            )
        return named

    @staticmethod
    def _judge(images: Images[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """The largest group probability and its group, (N,) each, on the CPU."""
        import torch

        from cmkit_std.metrics.emoji_net import judge_net, to_net
        from cmkit_std.metrics.extract import batches

        net = judge_net(device)
        with torch.inference_mode():
            found = [
                net(to_net(batch.to(device).expand(-1, 3, -1, -1))).softmax(1).max(1)
                for batch in batches(images, 512, "emoji_judge")
            ]
        tops, groups = zip(*found, strict=True)
        return torch.cat(tops).cpu(), torch.cat(groups).cpu()
