"""Which lines are better or worse than the baseline's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cmkit.suite.groups import Group
from cmkit.suite.intervals import (
    CHECKPOINTS,
    LEAST_SEEDS,
    LEVEL,
    Interval,
    few_images,
    holm,
    paired_difference,
    verdict,
    welch_difference,
)
from cmkit.suite.noise import SameNoise
from cmkit.suite.results import Baseline, Better, Score, Verdict, is_baseline, words_of
from cmkit.suite.runs import Run, alike


def verdicts_of(
    groups: Sequence[Group],
    scores: Sequence[Mapping[str, Score]],
    baseline: Baseline | None,
    better: Mapping[str, Better],
    same_noise: SameNoise,
    notes: list[str],
) -> list[dict[str, Verdict]]:
    """The verdicts of each group beside the baseline, by number."""
    found: list[dict[str, Verdict]] = [{} for _ in groups]
    if baseline is None:
        return found
    of_group = {id(group): own for group, own in zip(groups, scores, strict=True)}
    pairs = []
    for index, group in enumerate(groups):
        if is_baseline(baseline, group.row, group.axis):
            continue
        if other := _beside(group, groups, baseline):
            pairs.append((index, group, other))
        else:
            notes.append(f"{group.title}: {words_of(baseline)} has no line to compare it with")
    sentences: dict[str, list[str]] = {}
    for number, direction in better.items():
        if direction == "neither":
            continue
        differences = {}
        for index, group, other in pairs:
            a, b = of_group[id(group)].get(number), of_group[id(other)].get(number)
            if a and b and alike(a.measured, b.measured):
                differences[index] = _difference(group, other, number, a, b, same_noise)
        corrected = holm(difference.p for difference in differences.values())
        count = sum(p is not None for p in corrected)
        for (index, difference), p in zip(differences.items(), corrected, strict=True):
            few = any(biased(run, number) for run in groups[index].runs.values())
            word = "cannot tell" if few else verdict(difference, direction, p)
            found[index][number] = Verdict(word, difference, p, count)
        for sentence in _said(baseline, differences.values(), count):
            sentences.setdefault(sentence, []).append(number)
    notes += (f"{', '.join(numbers)}: {sentence}" for sentence, numbers in sentences.items())
    return found


def _beside(group: Group, groups: Sequence[Group], baseline: Baseline) -> Group | None:
    """The baseline's line that a group is compared with: of a row its only one, or that with the
    same values on the axes that both have; of an axis that of the same row and all other values."""
    if not isinstance(baseline, str):
        at = {**group.axis, **baseline} if baseline.keys() <= group.axis.keys() else None
        return next((o for o in groups if (o.row, o.axis) == (group.row, at)), None)
    own = [other for other in groups if other.row == baseline]
    if len(own) > 1:
        own = [
            other
            for other in own
            if all(group.axis.get(name, value) == value for name, value in other.axis.items())
        ]
    return own[0] if len(own) == 1 else None


def _difference(
    group: Group, other: Group, number: str, a: Score, b: Score, same_noise: SameNoise
) -> Interval:
    """a less b: paired over seeds where the runs share what `Run.shares` says and there are enough,
    else by Welch; over one seed of each, on the same noise."""
    shared = a.values.keys() & b.values.keys()
    if len(a.values) == len(b.values) == 1:
        (one,), (another,) = a.values, b.values
        return same_noise.difference(group.runs[one], other.runs[another], number)
    paired = len(shared) >= LEAST_SEEDS and all(
        group.runs[seed].shares(other.runs[seed]) for seed in shared
    )
    if paired:
        found = paired_difference(a.values, b.values)
    else:
        found = welch_difference([*a.values.values()], [*b.values.values()])
    one, another = (
        independent([each.runs[seed] for seed in score.values])
        for each, score in ((group, a), (other, b))
    )
    if one and another:
        return found
    if one or another:
        of = found.of.replace("of the two methods", "of a method and one checkpoint")
    else:
        of = of_one(found.of, CHECKPOINTS.partition(",")[0])
    return replace(found, of=of)


def _said(baseline: Baseline, differences: Iterable[Interval], count: int) -> Iterator[str]:
    """What the verdicts in a number mean."""
    of_row = "" if isinstance(baseline, str) else "the same row at "
    if count:
        yield (
            f"better or worse than {of_row}{words_of(baseline)} where p < {1 - LEVEL:.2g} after"
            f" Holm's correction for {count} comparison{'s' * (count > 1)}"
        )
    for of in dict.fromkeys(difference.of for difference in differences):
        yield f"differences {of}"


def independent(runs: Sequence[Run]) -> bool:
    """Whether each has weights of its own, so that its seed is one of training."""
    starts = [run.start for run in runs if "train" not in run.stages]
    return len(set(starts)) == len(starts)


def of_one(of: str, what: str) -> str:
    """`of` of an interval over seeds that are of sampling alone."""
    return re.sub(r"^of the (two )?methods?", what, of).replace("training seed", "sampling seed")


def biased(run: Run, number: str) -> bool:
    """Whether a number of a run is a Frechet distance of too few images, whose bias may be more
    than a difference."""
    record = run.provenance[number]
    width, n = record.get("features", {}).get(number), record.get("images")
    return bool(width and n and few_images(n, width))
