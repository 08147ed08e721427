"""Dimensions of the tensors of a graph whose number of rows is not known.

TensorFlow's shape inference has numbers or nothing. So it infers the shapes of a graph several
times, for batches of unlike numbers of rows: a dimension that grows with the batch counts rows, one
that stays is known. Every op's shape function takes part as it is, those of user-defined ops too.
"""

from typing import NamedTuple

# Two numbers of rows. The first is small, as what follows from the number of rows in one way for
# large batches, such as min(rows, 64) or rows // 100, may follow in another for small ones; and it
# is odd, to show what is rounded. A graph that reshapes its batch takes the first pair that it
# divides.
NOMINAL_ROWS = ((3, 480), (12, 480), (60, 480), (240, 480))
# Lengths of other dimensions that are not known, such as the number of positions: one for each
# dimension, and another one in the third inference.
NOMINAL_LENGTHS = ((96, 144), (160, 208), (224, 272), (288, 336))


class Dim(NamedTuple):
    """A dimension of a tensor.

    Args:
        small: its length in a batch of few rows; see `NOMINAL_ROWS`.
        large: its length in a batch of more rows.
        is_fixed: whether it depends on nothing but the number of rows.
        rows: the two numbers of rows.
    """

    small: int
    large: int
    is_fixed: bool
    rows: tuple[int, int]

    @property
    def length(self) -> int | None:
        """The length, where it is the same in every batch; else None."""
        return self.small if self.is_fixed and self.small == self.large else None

    @property
    def row_factor(self) -> int | None:
        """How many entries it has for each row of the batch; None where it does not count rows."""
        factor, remainder = divmod(self.small, self.rows[0])
        if remainder or not factor or factor * self.rows[1] != self.large:
            return None
        return factor

    def is_like(self, other: "Dim") -> bool:
        """Returns whether two dimensions have one length.

        Args:
            other: a dimension of the same graph.

        Returns:
            True where they have in every inference.
        """
        return (self.small, self.large) == (other.small, other.large)


Dims = tuple[Dim | None, ...]


def product(dims: Dims) -> tuple[int, int] | None:
    """Returns the number of entries of dimensions, in the small batch and in the large one.

    Args:
        dims: dimensions of one tensor.

    Returns:
        Two numbers; None where a dimension is not known.
    """
    small = large = 1
    for dim in dims:
        if dim is None:
            return None
        small, large = small * dim.small, large * dim.large
    return small, large
