"""Closeness of arrays row by row: one wrong row hides in a norm of them all."""

import numpy as np
from numpy.typing import ArrayLike


def assert_close(
  actual: ArrayLike,
  expected: ArrayLike,
  rtol: float,
  atol: float = 0.0,
  name: str = "",
) -> None:
  """Each element is within `rtol` of the largest of its row (the last axis).

  Infinities stand in the same places with the same sign, and there is no NaN. A
  row of zeros must be exactly zero, but for `atol`. Errors tell `name`.
  """
  actual = np.asarray(actual).astype(np.float64)
  expected = np.asarray(expected).astype(np.float64)
  assert actual.shape == expected.shape, name
  assert not np.isnan(expected).any(), "NaN is expected, which says nothing."
  finite = np.isfinite(expected)
  np.testing.assert_array_equal(
    np.where(finite, 0.0, actual), np.where(finite, 0.0, expected), name
  )
  expected = np.where(finite, expected, 0.0)
  error = np.abs(np.where(finite, actual, 0.0) - expected)
  scale = np.abs(expected).max(-1, keepdims=True, initial=0.0)
  excess = np.where(error <= rtol * scale + atol, 0.0, error)  # NaN <= x fails
  excess = np.where(np.isnan(error), np.inf, excess)
  if excess.any():
    worst = np.unravel_index(excess.argmax(), excess.shape)
    row = tuple(int(i) for i in worst[:-1])
    raise AssertionError(
      f"{name}: {excess.any(-1).sum()} of {excess[..., 0].size} rows differ. "
      f"The worst is {row=}, by {error[worst]:.3g}; its largest element is "
      f"{scale[row][0]:.3g}, {rtol=}, {atol=}.\n"
      f"actual: {actual[row]}\nexpected: {expected[row]}"
    )
