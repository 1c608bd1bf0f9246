"""A warpgroup's threads gather rows, and add to rows, as simulated in numpy."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import rows
from pallas_kernels.hopper import tiles
from tests.kernels import by_thread
from tests.kernels import simulated
from tests.kernels import swizzle
from tests.kernels.simulated import memory
from tests.kernels.simulated import threads

ROWS = tiles.ROWS


def numbers(seed, n, available):
  """Row numbers in any order, one in four -1."""
  x = np.random.default_rng(seed)
  return np.where(
    x.random(n) < 0.25, -1, x.choice(available, n, replace=False)
  ).astype(np.int32)


@pytest.mark.parametrize("columns, column", [(128, 0), (64, 64), (64, 192)])
def test_gathers_rows(columns, column):
  available, width, first = 200, 256, 3
  x = np.random.default_rng(0)
  source = x.normal(size=(available, width)).astype(jnp.bfloat16)
  rows_s = numbers(1, ROWS + 8, available)
  tile = np.full(ROWS * columns, np.nan, jnp.bfloat16)
  with simulated.run_as(128, rows):
    rows.copy(
      memory.Place(source),
      memory.Place(rows_s, is_shared=True),
      memory.Place(tile, is_shared=True),
      threads.U32(first),
      **dict(width=width, columns=columns, column=column),
    )
  of_rows = rows_s[first : first + ROWS]
  expected = source[of_rows, column : column + columns]
  expected[of_rows < 0] = 0
  np.testing.assert_array_equal(swizzle.matrix(tile, columns), expected)


@pytest.mark.parametrize("columns", [32, 64])
def test_adds_to_rows(columns):
  available, width, first, column = 300, 96, 5, 32
  x = np.random.default_rng(0)
  target = x.normal(size=(available, width)).astype(np.float32)
  rows_s = numbers(1, ROWS + 8, available)
  tile = x.normal(size=(ROWS, columns)).astype(np.float32)
  expected = target.copy()
  for number, row in zip(rows_s[first : first + ROWS], tile, strict=True):
    if number >= 0:
      expected[number, column : column + columns] += row
  with simulated.run_as(128, rows):
    rows.add_registers(
      memory.Place(target) + 4 * column,
      memory.Place(rows_s, is_shared=True),
      by_thread.registers(tile),
      threads.U32(first),
      width=width,
    )
  np.testing.assert_array_equal(target, expected)


class Slots:
  """Stands for an array of tiles."""

  def __init__(self, n, columns):
    self.shape = n, ROWS, columns
    self.at = self

  def __getitem__(self, i):
    return int(i)


@pytest.mark.parametrize(
  "n, ahead, pieces", [(2, 1, 1), (4, 3, 1), (6, 4, 9), (3, 1, 2)]
)
def test_a_ring_has_each_piece_when_it_is_read(n, ahead, pieces):
  number, first, columns = 5, 128, 64
  held, groups, started = {}, [{}], []

  def start_copy(source, rows, slot, first, column):
    del source, rows
    held.pop(slot, None)
    groups[-1][slot] = int(first), column
    started.append(groups[-1][slot])

  def wait(in_flight):
    while len(groups) - 1 > in_flight:
      held.update(groups.pop(0))

  doubles = dict(
    start_copy=start_copy,
    commit_copies=lambda: groups.append({}),
    wait_copies=wait,
  )
  when = lambda condition: lambda body: body() if condition else None
  ring = rows.Ring(
    "source", "rows", Slots(n, columns), number, ahead, pieces, first
  )
  with (
    mock.patch.multiple(rows, **doubles),
    mock.patch.object(rows.pl, "when", when),
  ):
    ring.start()
    read = []
    for i in range(number * pieces):
      tile, piece = divmod(i, pieces)
      place = first + ROWS * tile, columns * piece
      read.append((ring.get(jnp.int32(tile), piece), place))
      # The earlier ones for which there is room stay, too.
      for slot, place in read[-(n - ahead) :]:
        assert held[slot] == place
  assert started == [place for _, place in read]
