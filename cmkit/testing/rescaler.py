"""The check of a rescaler."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cmkit.errors import RecipeError
from cmkit.kinds import Rescaler
from cmkit.testing.protocol import Report, report_on, shown
from cmkit.testing.subjects import CPU, META

SITES = ("skip.0", "skip.1", "emb.0", "emb.1")


def _check_numbers(rescaler: Rescaler, names: Sequence[str], report: Report) -> None:
    """Check that a search can set each number to the value that it reads."""
    for name in names:
        try:
            value = rescaler.value_of(name)
        except ValueError:
            continue  # not a number that a search can change
        with report.trying(
            "a search sets the numbers that it reads", "let with_values know them too"
        ):
            again = rescaler.with_values({name: value}).value_of(name)
        report.require(
            again == value,
            "a search sets the numbers that it reads",
            f"{name} = {value} was set, and {again} is there",
            "let value_of and with_values mean the same number by a name",
        )


def check_rescaler(rescaler: Rescaler, sites: Sequence[str] = SITES) -> None:
    """Check a rescaler, for a network with `sites`."""
    report = report_on(rescaler)
    sites = tuple(sites)
    with report.trying("it binds to the sites of a network", "accept any tuple of site names"):
        scales = rescaler.bind(sites)
    neutral = True
    for device, sigma in itertools.product((CPU, META), (0.002, 1.0, 80.0)):
        levels = torch.full((3,), sigma, device=device)
        with report.trying("it maps sigma (B,) to scales", "return a function of one tensor"):
            found = scales(levels)
        unknown = sorted(set(found) - set(sites))
        report.require(
            not unknown,
            "scales belong to sites of the network",
            f"{unknown} are none",
            "iterate over the sites that `bind` is given",
        )
        for site, value in found.items():
            report.require(
                isinstance(value, Tensor) and value.shape in ((), (3,)),
                "a scale is a tensor of shape () or (B,), so that a new value is no new graph",
                f"{site} has {shown(value)}",
                "wrap it: torch.tensor(value, device=sigma.device)",
            )
            report.require(
                value.device.type == device.type and value.is_floating_point(),
                "a scale is a floating-point tensor on sigma.device",
                f"{site} is {shown(value)} for sigma on {device}",
                "pass device=sigma.device, dtype=sigma.dtype",
            )
            if device is CPU:
                neutral &= bool((value == 1).all())
                again = scales(levels)[site]
                report.require(
                    torch.equal(again, value),
                    "scales follow from sigma alone",
                    f"{site} was {value.tolist()} and then {again.tolist()}",
                    "keep no state and draw nothing",
                )
    _check_numbers(rescaler, (*type(rescaler).model_fields, *sites), report)
    if not neutral:
        try:
            rescaler.bind(())
        except RecipeError:
            return
        except Exception as error:
            seen = f"{type(error).__name__} was raised"
        else:
            seen = "it was accepted"
        raise report.broken(
            "a scale other than 1 for a site that the network lacks is refused by `bind`",
            f"{seen} for a network without sites",
            "raise cmkit.RecipeError, with the sites that there are",
        )
