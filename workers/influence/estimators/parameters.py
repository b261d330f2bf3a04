"""What a user may set of an estimator: the fields of its dataclass, each with a range."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a user may set.

    Attributes:
        minimum: the least that is allowed.
        maximum: the most that is allowed.
        default: what it is unless somebody sets it.
        is_whole: whether it counts something.
    """

    minimum: float
    maximum: float
    default: float
    is_whole: bool

    def check(self, name: str, value: float) -> None:
        """Check a value.

        Raises:
            ValueError: it is out of range, or no whole number where it must be one.
        """
        if not self.minimum <= value <= self.maximum:
            raise ValueError(
                f"{name} is {value:g}; it goes from {self.minimum:g} to {self.maximum:g}."
            )
        if self.is_whole and value != int(value):
            raise ValueError(f"{name} is {value:g}; it is a whole number.")


def parameter(default: float, *, minimum: float, maximum: float) -> Any:  # noqa: ANN401 - stands for the field's value
    """Declare a field that a user may set; an integer `default` makes it a whole number."""
    described = Parameter(minimum, maximum, default, is_whole=isinstance(default, int))
    return field(default=default, metadata={"parameter": described})
