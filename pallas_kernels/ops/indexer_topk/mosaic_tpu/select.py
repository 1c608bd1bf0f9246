"""Selection for a block of queries in a TPU's VMEM.

A vector register holds 8 queries x 128 lanes; no step moves a number from one
query to another. The scores are integers that compare as they do, and lie so
that packing and ranking need no shuffle: of a tile of 4096 keys, lane n of row
r has key 32 n + r. Bit r of a lane's word is then key r of the lane, and words
in the order of lanes have the keys in their order.
"""

import functools
from typing import Final

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu import lanes
from pallas_kernels.tpu import products

WORD: Final = 32  # keys per lane, bits per word
bS: Final = lanes.LANES * WORD  # keys per tile
HIDDEN: Final = -(2**31)  # in place of a score: the query does not see the key
_LARGEST: Final = 2**31 - 1
_DEVIATIONS: Final = 3  # margin of a guess, in deviations of a sample's count


def order(scores: Float[Array, "..."]) -> Int[Array, "..."]:
  """Maps scores to integers above `HIDDEN` that compare as the scores."""
  scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 ties with 0.0
  bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
  return bits ^ ((bits >> 31) & _LARGEST)


def key_of(tile: Int[Array, ""], rows: Int[Array, "..."]) -> Int[Array, "..."]:
  """Keys in these rows [..., 128] of a tile."""
  lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
  return tile * bS + lane * WORD + rows


def select(
  order_ref,
  index_ref,
  tiles: tuple[Int[Array, ""], Int[Array, ""]],
  visible: Int[Array, "bQ 128"],
  top_k: int,
) -> None:
  """Writes the indices of the `top_k` largest, ascending, padded with -1.

  Args:
    order_ref: Of the scores, [tiles of S, 32, bQ, 128].
    index_ref: [bQ, K], K a multiple of 128.
    tiles: Range of tiles that any query sees.
    visible: Number of keys that each query sees, in all lanes.
    top_k: Number of keys to select.
  """
  threshold = _threshold(order_ref, tiles, visible, top_k)
  _place(order_ref, index_ref, tiles, threshold)


def _threshold(order_ref, tiles, visible, top_k):
  """Finds the threshold that exactly the selected keys of each query reach.

  Of keys that tie at it, those that are not selected are hidden.
  """
  bQ = visible.shape[0]
  zeros = jnp.zeros((bQ, lanes.LANES), jnp.int32)

  def count(reached, rows=WORD):
    """Counts keys of each query for which `reached(order, tile, row)`."""

    def add(tile, counts):
      for row, x in enumerate(order_ref[tile, :rows]):
        counts += jnp.where(reached(x, tile, row), 1, 0)
      return counts

    return _all_lanes(jax.lax.fori_loop(*tiles, add, zeros), jnp.sum)

  def sampled(rank):
    """Guesses what `rank` or more keys of the tiles' first rows reach."""
    rank = zeros + max(int(rank), 1)
    reach = lambda least: count(lambda x, *_: x >= least, rows=1)
    unknown = zeros + _LARGEST
    return _largest(least, end, unknown, rank, reach, _mean, slack=margin)[0]

  reach = lambda least: count(lambda x, *_: x >= least)
  least, end = zeros + (HIDDEN + 1), zeros + _LARGEST
  # The threshold is most likely between the guesses.
  expected = top_k / WORD
  margin = int(_DEVIATIONS * expected**0.5)
  guesses = sampled(expected + margin), sampled(expected - 2 * margin)
  guess = functools.partial(_interpolation, guesses=guesses)
  # A query that sees fewer keys than K takes them all: all reach the minimum.
  target = jnp.minimum(visible, top_k)
  threshold, chosen = _largest(least, end, visible, target, reach, guess)
  tied = chosen > target

  @pl.when(jnp.any(tied))
  def _():
    missing = target - reach(threshold + 1)
    keys = lambda tile, row: key_of(tile, jnp.full_like(zeros, row))
    # Ties at or before key -least: fewer for a larger number.
    before = lambda least: count(
      lambda x, *place: (x == threshold) & (-keys(*place) >= least)
    )
    every = zeros - tiles[1] * bS
    end = jnp.where(tied, 1, every + 1)
    last, _ = _largest(every, end, chosen, missing, before, _mean)

    def hide(tile, _):
      for row, x in enumerate(order_ref[tile]):
        left_out = (x == threshold) & (-keys(tile, row) < last)
        order_ref[tile, row] = jnp.where(left_out, HIDDEN, x)

    jax.lax.fori_loop(*tiles, hide, None)

  return threshold


def _largest(low, end, found, target, count, guess, slack=0):
  """Finds the largest x of [low, end) with count(x) >= target, and count(x).

  Any x with a count of at most target + slack is accepted; without an x that
  reaches the target, the result is `low`. Arrays are [bQ, 128].

  Args:
    low: Lower bound, which reaches the target.
    end: Upper bound, which does not.
    found: count(low), or a larger number.
    target: Count to reach.
    count: Decreasing function of x.
    guess: Next x to try: `guess(step, low, end, found, missed, target)`,
      `missed` being count(end).
    slack: Most by which the count may exceed the target.
  """

  def is_open(low, end, found):
    return (end - low != 1) & (found - target > slack)

  def narrow(state):
    step, low, end, found, missed = state
    x = guess(*state, target)
    x = jnp.minimum(jnp.maximum(x, low + 1), end - 1)
    opened = is_open(low, end, found)
    x = jnp.where(opened, x, low)
    n = count(x)
    enough = (n >= target) | ~opened  # what is closed stays
    return (
      step + 1,
      jnp.where(enough, x, low),
      jnp.where(enough, end, x),
      jnp.where(enough, n, found),
      jnp.where(enough, missed, n),
    )

  state = jnp.int32(0), low, end, found, jnp.zeros_like(low)
  _, low, _, found, _ = jax.lax.while_loop(
    lambda state: jnp.any(is_open(*state[1:4])), narrow, state
  )
  return low, found


def _mean(step, low, end, *_):
  """Bisects the open interval, so that 32 steps are enough."""
  return (low & end) + ((low ^ end) >> 1)  # rounded down, and no overflow


def _interpolation(step, low, end, found, missed, target, *, guesses):
  """Interpolates linearly between both counts, after two guesses.

  Of n keys that are open it leaves some sqrt(n). Where scores are far from
  even, every fourth step halves what is open.
  """
  share = (found - target).astype(jnp.float32) / (found - missed).astype(
    jnp.float32
  )
  width = jnp.where(end - low < 0, _LARGEST, end - low)  # if it overflows
  line = low + (share * width.astype(jnp.float32)).astype(jnp.int32)
  x = jnp.where(step % 4 == 3, _mean(step, low, end), line)
  return jnp.where(step == 0, guesses[0], jnp.where(step == 1, guesses[1], x))


def _place(order_ref, index_ref, tiles, threshold):
  """Writes the keys that reach the threshold, in order."""
  bQ, K = index_ref.shape
  shape = bQ, lanes.LANES
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  square = lanes.LANES, lanes.LANES
  through = _iota(square, 0) <= _iota(square, 1)
  through = through.astype(jnp.bfloat16)
  index_ref[...] = jnp.full((bQ, K), -1, jnp.int32)

  def tile(i, begin):
    word = jnp.zeros(shape, jnp.int32)
    for r, x in enumerate(order_ref[i]):
      word |= jnp.where(x >= threshold, jnp.int32(1) << r, 0)
    # Keys of the tile through this lane: up to 32 in each, exact in bfloat16.
    counts = jax.lax.population_count(word).astype(jnp.bfloat16)
    through_lane = products.dot(counts, through, products.NN)
    through_lane = through_lane.astype(jnp.int32)
    end = begin + _all_lanes(through_lane, jnp.max)

    def place(j, _):
      at = pl.multiple_of(j * lanes.LANES, lanes.LANES)
      rank = at + lane - begin
      n, before = _lane_of(through_lane, rank)
      key = i * bS + n * WORD + _bit_of(_take(word, n), rank - before)
      here = (rank >= 0) & (rank < end - begin)
      places = index_ref.at[:, pl.ds(at, lanes.LANES)]
      places[...] = jnp.where(here, key, places[...])

    first = jnp.min(begin) // lanes.LANES
    last = pl.cdiv(jnp.max(end), lanes.LANES)
    jax.lax.fori_loop(first, last, place, None)
    return end

  jax.lax.fori_loop(*tiles, tile, jnp.zeros(shape, jnp.int32))


def _lane_of(through, rank):
  """Finds the lane of the key of this rank, and the number of keys before it.

  It is the first lane through which there are more keys than the rank, or any
  lane if there is none.
  """
  n = before = jnp.zeros_like(rank)
  for step in (64, 32, 16, 8, 4, 2, 1):
    count = _take(through, n + (step - 1))
    beyond = count <= rank
    n += jnp.where(beyond, step, 0)
    before = jnp.where(beyond, count, before)
  return n, before


def _bit_of(word, rank):
  """Finds the position of the bit of this rank in a word, by bisection."""
  at = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    below = jax.lax.population_count((word >> at) & ((1 << width) - 1))
    higher = rank >= below
    rank -= jnp.where(higher, below, 0)
    at += jnp.where(higher, width, 0)
  return at


def _take(x, lane):
  """Gathers x[q, lane[q, n]]."""
  return jnp.take_along_axis(x, lane, axis=1, mode="promise_in_bounds")


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _all_lanes(x, reduce):
  return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)
