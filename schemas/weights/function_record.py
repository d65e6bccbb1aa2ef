"""The record that defines a function or operator of the weight language, and the segments it is evaluated on."""

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

    Arrays are ranked as float16, like score columns, and summed in float64. Tensors, which hold current losses, keep
    their precision.

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
        """Which of the values (N,) are among the `ceil(fraction * n)` largest of the n in their segment, (N,) bool.

        Ties at the threshold are kept. A 0 means no signal: it is never kept where values are magnitudes
        (`of_magnitudes` 1), nor in a segment of zeros only. A `fraction` of 1 keeps everything.
        """
        ...

    def rank(self, values: Any) -> Any:
        """Share of the values in the segment that are not larger, (N,)."""
        ...


def always(value: Any) -> Callable[..., Any]:
    """A function that returns `value` for any arguments."""
    return lambda *_: value


YES, NO, ZERO_TO_ONE = always(True), always(False), always(UNIT)


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or operator of the weight language.

    Evaluation works on numpy arrays and torch tensors; `library` is the module that the values belong to. The static
    properties are functions of the same property of each argument, followed by the numbers.

    Attributes:
        numbers: numeric parameters with their defaults, None where one is required.
        needs: the condition on the numbers, in words.
        allowed: `(*numbers)`, whether they meet it.
        expand: `(x, *numbers)` to the formula that the function abbreviates; such a function needs nothing below.
        elementwise: `(library, *arguments, *numbers)` to values (N,), for a function of each token by itself.
        in_segments: `(library, segments, x, *numbers)` to values (N,), for a function that compares tokens.
        over_corpus: `(distribution, *numbers)` to an elementwise function of x: the same over the whole corpus.
        by_label: whether it can also compare the documents of one label.
        takes_magnitude: whether a last number, 1 or 0, says that x is a magnitude.
        ranks: whether only the order of x matters.
        bounds: the least and the largest possible value.
        is_magnitude: whether the formula alone shows that values are never negative.
        has_signal: whether the values of a segment are never all 0, except by coincidence.
        mean_one: whether the mean over a segment with signal is 1.
        is_linear: `(arguments)`, whether its mean is the function of the means of its arguments.
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
    ranks: bool = False
    bounds: Callable[..., Bounds] = ZERO_TO_ONE
    is_magnitude: Callable[..., bool] = YES
    has_signal: Callable[..., bool] = NO
    mean_one: bool = False
    is_linear: Callable[[Sequence[Node]], bool] = NO

    @property
    def scoped(self) -> bool:
        """Whether it compares tokens, and so takes `by`."""
        return self.in_segments is not None
