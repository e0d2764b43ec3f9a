"""Identity of axes: which axes of a network index the same units.

An axis is a product of factors, from the slowest to the fastest: channels that were flattened with
the pixels of an image are the factor `C` of `(H, W, C)`.  Factors that an operation aligns become
one; reshaping splits them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Axis = Sequence["Factor"]  # the factors of one axis of an array; empty for an axis of size 1 or 0

PUT_TOGETHER = "is put together with others by 'concatenate'"


class Factor:
    """Index that runs over `size` units; compared by identity after `find`.

    Attributes:
        size: Number of units, at least 2.
        pinned: Reason why the order of the units matters; None if they can be permuted.
        mixed: Reason why a unit can't leave without changing others; None if it can.
    """

    def __init__(self, size: int, pinned: str | None = None, mixed: str | None = None):
        """Makes a factor of its own."""
        self.size, self.pinned, self.mixed = size, pinned, mixed
        self._same: Factor | None = None
        self._parts: tuple[Factor, ...] = ()
        self._pieces: tuple[Axis, ...] = ()

    def find(self) -> "Factor":
        """Returns the factor that stands for all that were joined with this one."""
        factor = self
        while factor._same is not None:
            factor = factor._same
        return factor

    def join(self, other: "Factor") -> None:
        """Makes two factors of equal size one."""
        one, two = self.find(), other.find()
        if two._pieces and not one._pieces:
            one, two = two, one
        if one is two:
            return
        two._same = one
        one.pinned = one.pinned or two.pinned
        one.mixed = one.mixed or two.mixed
        if len(one._pieces) == len(two._pieces):
            for x, y in zip(one._pieces, two._pieces, strict=True):
                unify(x, y)
        elif two._pieces:
            pin([f for x in (*one._pieces, *two._pieces) for f in x], PUT_TOGETHER)

    def split(self, outer: int) -> None:
        """Makes this factor the product of one of size `outer` and the rest.

        If it is put together from pieces, it becomes the product of their number and one of them:
        a part of it in which every piece has its share has to run over the same units in all.
        """
        if not self._pieces:
            sizes = (outer, self.size // outer)
            self._parts = tuple(Factor(n, self.pinned, self.mixed) for n in sizes)
            return
        first, *others = self._pieces
        for piece in others:
            unify(first, piece)
        if self.pinned is not None:
            pin(first, self.pinned)
        if self.mixed is not None:
            mix(first, self.mixed)
        self._parts = (Factor(len(self._pieces), PUT_TOGETHER, self.mixed), *first)

    def settle(self) -> None:
        """Pins the pieces that it is put together from if they turned out to be different units."""
        root = self.find()
        if root._parts or not root._pieces:
            return
        known = [list(factors(x)) for x in root._pieces]
        if all(x == known[0] for x in known):
            root.split(len(known))
        else:
            pin([root, *(f for x in known for f in x)], PUT_TOGETHER)


def put_together(pieces: Sequence[Axis], size: int) -> Factor:
    """Returns the factor of an axis of several pieces of equal size, one behind the other."""
    factor = Factor(size)
    factor._pieces = tuple(pieces)
    return factor


def new(size: int, pinned: str | None = None) -> Axis:
    """Returns an axis that is coupled to no other yet."""
    return [] if size < 2 else [Factor(size, pinned)]


def factors(axis: Iterable[Factor]) -> Iterator[Factor]:
    """Yields the factors of an axis as they are known now."""
    for factor in axis:
        root = factor.find()
        if root._parts:
            yield from factors(root._parts)
        else:
            yield root


def pin(axis: Axis, reason: str) -> None:
    """Notes that the order along an axis matters."""
    for factor in factors(axis):
        factor.pinned = factor.pinned or reason


def mix(axis: Axis, reason: str) -> None:
    """Notes that an operation computes one number out of all units along an axis."""
    for factor in factors(axis):
        factor.mixed = factor.mixed or reason


def unify(one: Axis, two: Axis) -> bool:
    """Makes two axes the same; returns False, with both pinned, if their factors don't nest."""
    left, right = list(factors(one)), list(factors(two))
    while left and right:
        # earlier rounds may have split or joined what comes now
        left[:1], right[:1] = factors(left[:1]), factors(right[:1])
        x, y = left[0], right[0]
        if x.size == y.size:
            x.join(y)
            del left[0], right[0]
        elif max(x.size, y.size) % min(x.size, y.size) == 0:
            (x if x.size > y.size else y).split(min(x.size, y.size))
        else:
            pin([*left, *right], "is reshaped in a way that cuts its units apart")
            return False
    return not left and not right


def places(axis: Axis, factor: Factor) -> list[tuple[int, int]]:
    """Where a factor stands in an axis: the sizes `(outer, inner)` around it, once or more."""
    known = list(factors(axis))
    sizes = [x.size for x in known]
    return [
        (int(np.prod(sizes[:i], dtype=int)), int(np.prod(sizes[i + 1 :], dtype=int)))
        for i, x in enumerate(known)
        if x is factor
    ]


def alive_along(axis: Axis, alive: Mapping[Factor, np.ndarray]) -> np.ndarray:
    """Whether each index of an axis belongs to living units only: a boolean vector."""
    found = np.ones(1, bool)
    for factor in factors(axis):
        own = alive.get(factor)
        own = np.ones(factor.size, bool) if own is None else own
        found = (found[:, None] & own).ravel()
    return found


def alive_entries(
    shape: Sequence[int],
    axes: Sequence[Axis],
    alive: Mapping[Factor, np.ndarray],
    dimensions: Iterable[int] | None = None,
) -> np.ndarray:
    """Whether each entry of an array belongs to living units only; may have dimensions of size 1.

    Args:
        shape: Shape of the array.
        axes: Its axes.
        alive: Which units live, a boolean vector for each factor; others live.
        dimensions: Dimensions to look at; all by default.
    """
    found = np.ones((1,) * len(shape), bool)
    for i in range(len(shape)) if dimensions is None else dimensions:
        along = alive_along(axes[i], alive)
        found = found & along.reshape([-1 if k == i else 1 for k in range(len(shape))])
    return found


def by_unit(array: np.ndarray, axes: Sequence[Axis], factor: Factor, dimensions: Iterable[int]):
    """Yields an array as `(units, entries of the unit)` for each place of a factor."""
    for i in dimensions:
        for outer, inner in places(axes[i], factor):
            shape = (*array.shape[:i], outer, factor.size, inner, *array.shape[i + 1 :])
            yield np.moveaxis(array.reshape(shape), i + 1, 0).reshape(factor.size, -1)
