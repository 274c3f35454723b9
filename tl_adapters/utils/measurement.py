"""Measured values with 95 % confidence intervals, from a bare estimate to the record that results.json holds.

`Estimate` is a value with its interval, `Interval` the interval alone (where a file holds the value under its own key),
and `Measurement` an estimate with its unit, its split and the number of documents behind it. How intervals are computed
is in `share_intervals`, `bootstrap` and `clustered_intervals`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tl_adapters.errors import UserError

OPTIONAL = {"optional": True}
"""Metadata of dataclass fields that are left out of a file where they have their default (`results.plain`)."""


class IntervalError(UserError, ValueError):
    """Numbers from which no measurement can be made."""


@dataclass(frozen=True)
class Measurement:
    """One measured value as results.json holds it."""

    value: float | None
    """The estimate from all documents; None where it is undefined, such as a ratio whose denominator is 0."""
    low: float | None
    """Lower end of the 95 % interval; None where there is no interval."""
    high: float | None
    """Upper end of the 95 % interval; None where there is no interval."""
    n: int
    """Number of documents or problems."""
    unit: str
    """Unit of the value."""
    split: str
    """Split of the problems or documents: train, select, tune or report."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the adapters that were measured."""
    undefined: float = field(default=0.0, metadata=OPTIONAL)
    """Share of the bootstrap draws whose value is undefined."""
    reason: str = field(default="", metadata=OPTIONAL)
    """Why there is no value or no interval, or which interval it is where it is not the usual one."""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            if (number := getattr(self, name)) is not None and not math.isfinite(number):
                raise IntervalError(
                    f"The {name} of a measurement is {number} (unit: {self.unit}); an undefined value must be None."
                )


@dataclass(frozen=True)
class SetsMeasurement(Measurement):
    """The mean over randomly drawn sets of features; the interval covers the choice of sets and of documents."""

    draws: int = 0
    """Number of sets."""
    min: float | None = None
    """The smallest value of a set."""
    max: float | None = None
    """The largest value of a set."""


@dataclass(frozen=True)
class OutcomesMeasurement(Measurement):
    """A share with its individual outcomes, so that two models can be compared item by item."""

    outcomes: str = ""
    """1 or 0 for each item, in their order."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval without its value, for records that hold the value under a key of its own."""

    low: float | None
    """Lower end; None where there is no interval."""
    high: float | None
    """Upper end; None where there is no interval."""
    undefined: float = field(default=0.0, metadata=OPTIONAL)
    """Share of the bootstrap draws whose value is undefined."""
    reason: str = field(default="", metadata=OPTIONAL)
    """Why there is no interval, or which interval it is where it is not the usual one."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval, without a unit or a split."""

    value: float | None
    """The estimate from all documents; None where it is undefined."""
    low: float | None
    """Lower end of the interval; None where there is no interval."""
    high: float | None
    """Upper end of the interval; None where there is no interval."""
    undefined: float = 0.0
    """Share of the bootstrap draws whose value is undefined."""
    reason: str = ""
    """Why there is no value or no interval, or which interval it is where it is not the usual one."""

    @property
    def interval(self) -> Interval:
        """The interval without the value."""
        return Interval(self.low, self.high, self.undefined, self.reason)

    def measurement(self, n: int, unit: str, split: str, seeds: tuple[int, ...] = (0,)) -> Measurement:
        """The estimate as results.json holds it; the arguments are the fields of `Measurement`."""
        return Measurement(self.value, self.low, self.high, n, unit, split, seeds, self.undefined, self.reason)

    def scaled(self, factor: float, shift: float = 0.0) -> Estimate:
        """The estimate of factor * x + shift; a negative factor exchanges the ends of the interval."""
        value, low, high = (None if x is None else factor * x + shift for x in (self.value, self.low, self.high))
        return Estimate(value, *((high, low) if factor < 0 else (low, high)), self.undefined, self.reason)
