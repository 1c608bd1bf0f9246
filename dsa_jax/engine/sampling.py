"""Sampling: each slot's next token, and how likely it was.

Letters: B slots, V vocabulary, W words of 32 ids.

A slot draws from the softmax of its logits over its temperature, cut down in
this order:

  1. top-k keeps the k likeliest tokens
  2. top-p keeps the likeliest of those that have at least the share p of their
     probability
  3. min-p keeps those that are at least p times as likely as the likeliest

Each is a threshold on the logits, so that ties are kept together; the likeliest
token is always kept. Thresholds are found without sorting, bit by bit.

A token is drawn by adding Gumbel noise to the whole vocabulary. The noise comes
from the slot's seed and the token's position alone, and no row is added to
another: in one program, which slot it is and what the others do changes no bit
of a row. (For another number of slots, the compiler may sum a row in another
order.)
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32
import numpy as np

_WORD = 32  # ids a word


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How each slot draws."""

  temperature: Float[Array | np.ndarray, " B"]
  """0 takes the likeliest token, of equals the lowest id."""
  top_k: Int[Array | np.ndarray, " B"]
  """0 keeps all."""
  top_p: Float[Array | np.ndarray, " B"]
  """In (0, 1]."""
  min_p: Float[Array | np.ndarray, " B"]
  """In [0, 1)."""
  seed: UInt32[Array | np.ndarray, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """A token of each slot, or of several positions of each."""

  tokens: Int[Array, "*B"]
  log_probs: Float[Array, "*B"]
  """In the distribution that the token was drawn from."""
  untruncated: Float[Array, "*B"]
  """Log-probs with all of the vocabulary kept, at the same temperature; at
  temperature 0, where there is none to divide by, at 1."""
  kept: UInt32[Array, "*B W"] | None
  """Bit i of word j says whether id 32 j + i could be drawn; if asked for."""


def sample(
  logits: Float32[Array, "B V"],
  how: Sampling,
  position: Int[Array, " B"],
  *,
  keep: bool,
) -> Sampled:
  """Draws a token for each slot.

  Args:
    logits: Those of -inf are never drawn; one of each row at least is finite.
      Devices may share V if, with `keep`, they divide W.
    how: How each slot draws.
    position: Where in its sequence each slot's token will stand.
    keep: Whether to return which tokens could be drawn.
  """
  # What fp32 takes for 0 would be divided by.
  greedy_B = jnp.asarray(how.temperature) < np.finfo(np.float32).tiny
  temperature_B = jnp.where(greedy_B, 1, how.temperature)
  # The best is 0, however low the temperature: none overflows.
  best_B1 = logits.max(-1, keepdims=True)
  scaled_BV = (logits - best_B1) / temperature_B[:, None]
  mass_BV = jnp.exp(scaled_BV)

  kept_BV = _truncated(logits, scaled_BV, mass_BV, how, ~greedy_B)
  id_1V = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
  likeliest_B1 = jnp.argmax(logits, -1, keepdims=True)
  kept_BV = jnp.where(greedy_B[:, None], id_1V == likeliest_B1, kept_BV)

  noisy_BV = jax.lax.cond(
    jnp.all(greedy_B),
    lambda: scaled_BV,
    lambda: (
      scaled_BV + _noise(jnp.asarray(how.seed), position, logits.shape[1])
    ),
  )
  noisy_BV = jnp.where(kept_BV, noisy_BV, -jnp.inf)
  tokens_B1 = jnp.argmax(noisy_BV, -1, keepdims=True).astype(jnp.int32)
  # Not gathered, so that devices may share V.
  drawn_B = jnp.where(id_1V == tokens_B1, scaled_BV, 0).sum(-1)
  return Sampled(
    tokens=tokens_B1[:, 0],
    log_probs=drawn_B - jnp.log(jnp.where(kept_BV, mass_BV, 0).sum(-1)),
    untruncated=drawn_B - jnp.log(mass_BV.sum(-1)),
    kept=_pack(kept_BV) if keep else None,
  )


def kept_ids(
  kept: UInt32[np.ndarray, "T W"],
) -> tuple[np.ndarray, np.ndarray]:
  """Unpacks `Sampled.kept` of T tokens, on the host.

  Returns:
    Bounds, int64 [T + 1], and ids, int32: the t-th token was drawn from
    `ids[bounds[t] : bounds[t + 1]]`, which ascend.
  """
  counts_T = np.bitwise_count(kept).sum(1, dtype=np.int64)
  bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_T)])
  # Most words are empty: few of 129,280 tokens are kept, as a rule.
  filled = np.flatnonzero(kept)
  words = kept.reshape(-1)[filled]
  bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
  first = (filled % kept.shape[1] * _WORD).astype(np.int32)
  bit = (np.flatnonzero(bits) % _WORD).astype(np.int32)
  return bounds, np.repeat(first, np.bitwise_count(words)) + bit


def _truncated(
  logits: Float32[Array, "B V"],
  scaled: Float32[Array, "B V"],
  mass: Float32[Array, "B V"],
  how: Sampling,
  draws: Bool[Array, " B"],
) -> Bool[Array, "B V"]:
  """The tokens that top-k, top-p and min-p keep, in the rows that draw."""
  V = logits.shape[1]

  def count_reaches_k(least_B1):
    count_B1 = jnp.sum(logits >= least_B1, -1, keepdims=True, dtype=jnp.int32)
    return count_B1 >= how.top_k[:, None]

  limited_B = draws & (how.top_k > 0) & (how.top_k < V)
  least_B1 = _search(count_reaches_k, limited_B)
  left_BV = jnp.where(logits >= least_B1, mass, 0)
  share_B1 = how.top_p[:, None] * left_BV.sum(-1, keepdims=True)
  # One that fp32 takes for 0 would be reached by nothing at all.
  share_B1 = jnp.maximum(share_B1, np.finfo(np.float32).tiny)

  def mass_reaches_p(least_B1):
    reached_BV = jnp.where(logits >= least_B1, left_BV, 0)
    return reached_BV.sum(-1, keepdims=True) >= share_B1

  least_B1 = jnp.maximum(
    least_B1, _search(mass_reaches_p, draws & (how.top_p < 1))
  )
  likely_BV = scaled >= jnp.log(how.min_p)[:, None]
  return (logits >= least_B1) & likely_BV & (logits > -jnp.inf)


def _search(
  reaches: Callable[[Float32[Array, "B 1"]], Bool[Array, "B 1"]],
  searched: Bool[Array, " B"],
) -> Float32[Array, "B 1"]:
  """The largest threshold that still `reaches`, in the rows to be searched.

  -inf in the others, and where none does. Rounding cannot mislead it: the sum
  of fewer of the same terms, none of them negative, is never larger.
  """

  def bit(i, found_B1):
    trial_B1 = found_B1 | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
    return jnp.where(reaches(_in_order(trial_B1)), trial_B1, found_B1)

  def search():
    zero_B1 = jnp.zeros_like(searched, jnp.uint32)[:, None]
    found_B1 = _in_order(jax.lax.fori_loop(0, 32, bit, zero_B1))
    # The first places are those of NaNs, which nothing reaches.
    found = searched[:, None] & ~jnp.isnan(found_B1)
    return jnp.where(found, found_B1, -jnp.inf)

  nowhere = lambda: jnp.full_like(searched, -jnp.inf, jnp.float32)[:, None]
  return jax.lax.cond(jnp.any(searched), search, nowhere)


def _in_order(place: UInt32[Array, "..."]) -> Float32[Array, "..."]:
  """The float at each place, were all 2^32 of them sorted."""
  flip = jnp.where(place >> 31 == 1, jnp.uint32(2**31), jnp.uint32(2**32 - 1))
  return jax.lax.bitcast_convert_type(place ^ flip, jnp.float32)


def _noise(
  seed: UInt32[Array, " B"], position: Int[Array, " B"], V: int
) -> Float32[Array, "B V"]:
  """Gumbel noise, of each row's seed and position alone."""

  def row(seed, position):
    # Other generators mix the rows of a `vmap`.
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(key, position)
    # "low" could not draw what has a probability below 1e-7, and much of a
    # large vocabulary may have that.
    return jax.random.gumbel(key, (V,), jnp.float32, mode="high")

  return jax.vmap(row)(seed, position)


def _pack(kept: Bool[Array, "B V"]) -> UInt32[Array, "B W"]:
  B, V = kept.shape
  bits_BV = jnp.pad(kept, [(0, 0), (0, -V % _WORD)]).astype(jnp.uint32)
  place = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
  return jnp.sum(bits_BV.reshape(B, -1, _WORD) << place, -1, dtype=jnp.uint32)
