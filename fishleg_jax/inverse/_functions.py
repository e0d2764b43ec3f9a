"""Types of an estimator's functions, whose last argument is optional."""

from typing import Any, Protocol


class Update(Protocol):
    """Type of `InverseFisher.update`."""

    def __call__(
        self, state: Any, params: Any, batch: Any, key: Any, /, mask: Any | None = None
    ) -> Any:
        """Returns the state after one batch."""


class Product(Protocol):
    """Type of `InverseFisher.multiply`, whose second argument is a tangent.

    Also the type of `InverseFisher.diagonal`, whose second argument is the parameters.
    """

    def __call__(self, state: Any, tree: Any, /, mask: Any | None = None) -> Any:
        """Returns a tangent."""
