"""Decoding over pages equals teacher forcing, below and above K tokens.

The pool is full of what is no number, but for what is decoded: whatever else is
read is seen.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from tests.model import models

CONFIG = models.CONFIG
GARBAGE = np.nan
PAGE, PAGES, CHUNK = 4, 17, 12
LENGTHS = (24, 17)  # of the rows' sequences, the second on a page's first place
TOKENS = models.tokens(2, 26)  # and of those that follow

both = pytest.mark.parametrize(
  "attention", ["sparse", pytest.param("dense", marks=pytest.mark.slow)]
)
# K = 8: the first tokens are prefilled below it and above. A row has more of
# them than the other, which waits for the first step then.
prefills = pytest.mark.parametrize("prefill", [(1, 5), (5, 0), (12, 9)])


class Run(NamedTuple):
  """What decoding gives at each token; beyond a row's end, nothing."""

  decoded: dict[str, np.ndarray]  # [B T ...]
  pool: cache_lib.Pool
  table: np.ndarray


@functools.partial(jax.jit, static_argnames="attention")
def decode(model, tokens, next_tokens, table, offset, count, pool, attention):
  frame = frame_lib.make_cached_frame(
    *(model.config, table, pool.page_size, offset, count, tokens.shape[1]),
    attention=attention,
  )
  done = model.decode(tokens, frame, pool)
  results = dict(logits=model.head(done.hidden), hidden=done.hidden)
  for name in ("selected", "experts"):
    if (x := getattr(done, name)) is not None:
      results[name] = jnp.moveaxis(x, 0, 2)
  pool = done.pool
  if model.mtp is not None:
    drafts, pool = model.draft(next_tokens, done.hidden, frame, pool)
    results["drafts"] = model.head(drafts)
  return results, pool


@functools.partial(jax.jit, static_argnames="attention")
def train(model, tokens, attention) -> tuple[Any, jax.Array]:
  """A forward pass of training, and its experts, layer by layer."""
  cfg = model.config
  output = model.forward(tokens, attention=attention)
  frame = frame_lib.make_frame(cfg, tokens.shape, attention=attention)
  experts = []
  for i in range(cfg.num_moe_layers):
    block = jax.tree.map(lambda y, i=i: y[i], model.moe_layers)
    x = output.hidden[cfg.num_dense_layers + i]
    x = x + block.attention(block.attention_norm(x), frame).y
    experts.append(block.ffn.router(block.ffn_norm(x), frame.valid)[0])
  return output, jnp.stack(experts, 2)


def full(attention, cfg=CONFIG):
  return train(models.model(cfg), TOKENS, attention)


def garbage(cfg, dtypes=(None, None)) -> cache_lib.Pool:
  pool = cache_lib.make_pool(cfg, PAGES, PAGE, *dtypes)
  return jax.tree.map(lambda x: jnp.full_like(x, GARBAGE), pool)


def tables(seed: int) -> np.ndarray:
  """Pages in no order; none beyond the sequences' ends, where any may stand."""
  needed = [-(-length // PAGE) for length in LENGTHS]
  pages = np.random.default_rng(seed).permutation(PAGES).astype(np.int32)
  table = np.full((2, max(needed) + 1), 10**6, np.int32)
  table[0, : needed[0]] = pages[: needed[0]]
  table[1, : needed[1]] = pages[needed[0] :][: needed[1]]
  return table


@functools.cache
def run(
  attention, prefill=(12, 9), seed=0, cfg=CONFIG, dtypes=(None, None)
) -> Run:
  """Prefills both rows, then goes on one by one."""
  model, pool, table = models.model(cfg), garbage(cfg, dtypes), tables(seed)
  found: dict[str, np.ndarray] = {}
  offset, T = np.zeros(2, np.int32), CHUNK
  while (offset < LENGTHS).any():
    count = np.minimum(prefill if T == CHUNK else 1, LENGTHS - offset)
    count = count.astype(np.int32)
    at = np.minimum(offset[:, None] + np.arange(T), TOKENS.shape[1] - 2)
    results, pool = decode(
      *(model, np.take_along_axis(TOKENS, at, 1)),
      *(np.take_along_axis(TOKENS, at + 1, 1), table, offset, count, pool),
      attention=attention,
    )
    for name, x in results.items():
      x = np.asarray(x)
      shape = 2, max(LENGTHS), *x.shape[2:]
      here = found.setdefault(name, np.zeros(shape, x.dtype))
      for row in range(2):
        here[row, at[row, : count[row]]] = x[row, : count[row]]
    offset, T = offset + count, 1
  return Run(found, pool, table)


def rows(x):
  """Each row of [B T ...] up to its end."""
  return [np.asarray(x[row, :length]) for row, length in enumerate(LENGTHS)]


def compare(actual, expected, atol):
  for x, y in zip(rows(actual), rows(expected), strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=0)


@both
@prefills
def test_logits_are_those_of_the_full_forward(attention, prefill):
  decoded, (output, _) = run(attention, prefill).decoded, full(attention)
  compare(decoded["logits"], output.logits, 1e-4)
  compare(decoded["hidden"], output.hidden[-1], 1e-4)


@both
@prefills
def test_drafts_are_those_that_mtp_is_trained_by(attention, prefill):
  """Of each token, its nats at the place that drafts it."""
  logits = run(attention, prefill).decoded["drafts"]
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  targets = TOKENS[:, 2 : 2 + max(LENGTHS), None]
  actual = -np.take_along_axis(log_probs, targets, -1)[..., 0]
  compare(actual, full(attention)[0].losses.mtp, 1e-4)


@both
@prefills
def test_experts_are_those_that_the_router_chooses(attention, prefill):
  actual = run(attention, prefill).decoded["experts"]
  compare(actual, full(attention)[1], 0)
  assert len(np.unique(actual)) == CONFIG.num_experts


@prefills
def test_selected_keys_are_those_of_the_full_forward(prefill):
  actual = run("sparse", prefill).decoded["selected"]
  output, _ = full("sparse")
  compare(actual, np.moveaxis(np.asarray(output.selected), 0, 2), 0)


@both
def test_nothing_depends_on_where_pages_lie(attention):
  first, second = run(attention), run(attention, seed=1)
  assert (first.table != second.table).any()
  for name, x in first.decoded.items():
    np.testing.assert_array_equal(x, second.decoded[name], name)


@both
@prefills
def test_only_places_of_the_sequences_are_written(attention, prefill):
  _, pool, table = run(attention, prefill)
  written = np.zeros((PAGES, PAGE), bool)
  for row, length in zip(table, LENGTHS):
    s = np.arange(length)
    written[row[s // PAGE], s % PAGE] = True
  for stored in (pool.kv, pool.k_index.values):
    stored = np.asarray(stored).reshape(pool.layers, PAGES, PAGE, -1)
    if attention == "dense" and stored.shape[-1] == CONFIG.index_head_dim:
      written = np.zeros_like(written)  # nobody asks for index keys
    expected = np.broadcast_to(~written[..., None], stored.shape)
    np.testing.assert_array_equal(np.isnan(stored), expected)


def test_a_pool_holds_latents_and_index_keys_alone():
  pool = cache_lib.make_pool(CONFIG, PAGES, PAGE)
  assert (pool.layers, pool.page_size) == (4, PAGE)  # MTP's is the last
  assert {x.shape for x in jax.tree.leaves(pool)} == {
    (4 * PAGES, PAGE, CONFIG.kv_rank + CONFIG.rope_head_dim),
    (4 * PAGES, PAGE, CONFIG.index_head_dim),
  }


@pytest.mark.parametrize(
  ("pages", "page_size", "named"),
  [
    (0, 4, "pages=0"),
    (-1, 4, "pages=-1"),
    (True, 4, "pages=True"),
    (2**62, 4, "pages=4611686018427387904"),
    (1, 0, "page_size=0"),
    (1, 2.0, "page_size=2.0"),
  ],
)
def test_refuses_pools(pages, page_size, named):
  with pytest.raises(ValueError, match=named):
    inspect.unwrap(cache_lib.make_pool)(CONFIG, pages, page_size)
