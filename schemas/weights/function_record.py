"""The definition record of a function or operator of the weight language, and the segments of its evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from weighted_mtp.schemas.weights.nodes import Node

Bounds = tuple[float, float]
UNBOUNDED = (-math.inf, math.inf)
POSITIVE = (0.0, math.inf)
UNIT = (0.0, 1.0)


class Segments(Protocol):
    """N tokens in S segments of consecutive tokens. A segment may be empty.

    Values are ranked as they are. Arrays are summed in float64, tensors in their own precision.

    Attributes:
        counts: (S,) number of tokens in each segment.
    """

    counts: Any

    def sums(self, values: Any) -> Any:
        """Sum of the values (N,) in each segment, (S,)."""
        ...

    def maxima(self, values: Any) -> Any:
        """Largest of the values (N,) in each segment, (S,)."""
        ...

    def broadcast(self, values: Any) -> Any:
        """One value per segment (S,), repeated for each of its tokens, (N,)."""
        ...

    def top(self, values: Any, fraction: float, of_magnitudes: float) -> Any:
        """Mask (N,) bool of the `ceil(fraction * n)` largest of the n values in each segment.

        Ties at the threshold are kept. A 0 means no signal: it is not kept if values are magnitudes (`of_magnitudes`
        1), or in a segment of zeros only. A `fraction` of 1 keeps everything.
        """
        ...

    def rank(self, values: Any) -> Any:
        """Share of values in the segment that are not larger than each value, (N,)."""
        ...


def always(value: Any) -> Callable[..., Any]:
    """A function that returns `value` for any arguments."""
    return lambda *_: value


YES, NO, ZERO_TO_ONE = always(True), always(False), always(UNIT)


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or operator of the weight language.

    Evaluation works on numpy arrays and torch tensors; `library` is the module of the values. The static
    properties are functions of the same property of each argument, followed by the numbers.

    Attributes:
        numbers: numeric parameters and their defaults; None if required.
        needs: requirement on the numbers, in words.
        allowed: `(*numbers)` to whether they meet the requirement.
        expand: `(x, *numbers)` to the equivalent formula; a function with it needs no attributes below.
        elementwise: `(library, *arguments, *numbers)` to values (N,), for a function of single tokens.
        in_segments: `(library, segments, x, *numbers)` to values (N,), for a function that compares tokens.
        over_corpus: `(distribution, *numbers)` to the elementwise function of x over the whole corpus.
        by_label: whether `by` can be a label column.
        takes_magnitude: whether the last number, 1 or 0, marks x as a magnitude.
        bounds: smallest and largest possible value.
        is_magnitude: whether values are guaranteed non-negative.
        has_signal: whether the values of a segment are never all 0, except by coincidence.
        mean_one: whether the mean over a segment with signal is 1.
        is_linear: `(arguments)` to whether the function commutes with the mean.
    """

    numbers: Mapping[str, float | None] = field(default_factory=dict)
    needs: str = ""
    allowed: Callable[..., bool] = YES
    expand: Callable[..., Node] | None = None
    elementwise: Callable[..., Any] | None = None
    in_segments: Callable[..., Any] | None = None
    over_corpus: Callable[..., Callable[[np.ndarray], np.ndarray]] | None = None
    by_label: bool = False
    takes_magnitude: bool = False
    bounds: Callable[..., Bounds] = ZERO_TO_ONE
    is_magnitude: Callable[..., bool] = YES
    has_signal: Callable[..., bool] = NO
    mean_one: bool = False
    is_linear: Callable[[Sequence[Node]], bool] = NO

    @property
    def scoped(self) -> bool:
        """Whether the function compares tokens and takes `by`."""
        return self.in_segments is not None
