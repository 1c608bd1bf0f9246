"""Sampled tokens come from the stated distribution, whatever is beside them."""

from typing import NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.engine import sampling
from tests.kernels import hlo
from tests.kernels import tpu_topologies

V = 203  # no multiple of 32
INF = np.inf
sample = jax.jit(sampling.sample, static_argnames="keep")


def sampling_of(rows, **fields):
  """The same for all rows, but for what is given; by default nothing is cut."""
  values = dict(temperature=1, top_k=0, top_p=1, min_p=0, seed=0) | fields
  dtypes = dict(top_k=np.int32, seed=np.uint32)
  return sampling.Sampling(
    **{
      name: jnp.asarray(
        np.broadcast_to(np.asarray(x, dtypes.get(name, np.float32)), rows)
      )
      for name, x in values.items()
    }
  )


class Drawn(NamedTuple):
  """A `Sampled` on the host, its support unpacked."""

  tokens: np.ndarray
  log_probs: np.ndarray
  untruncated: np.ndarray
  kept: np.ndarray


def on_the_host(sampled, vocab):
  kept = np.asarray(sampled.kept)
  bits = (kept[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1 == 1
  bits = bits.reshape(len(kept), -1)  # bit i of word j is id 32 j + i
  assert kept.shape[1] == -(-vocab // 32) and not bits[:, vocab:].any()
  others = (sampled.tokens, sampled.log_probs, sampled.untruncated)
  return Drawn(*map(np.asarray, others), bits[:, :vocab])


def draw(logits, position=0, **fields):
  logits = np.asarray(logits, np.float32)
  B, vocab = logits.shape
  position = np.broadcast_to(np.asarray(position, np.int32), B)
  sampled = sample(logits, sampling_of(B, **fields), position, keep=True)
  return on_the_host(sampled, vocab)


def scaled(logits, temperature):
  """Log-weights of a row's tokens, in float64; 0 is the largest."""
  x = np.asarray(logits, np.float64)
  x = x - x.max(-1, keepdims=True)
  temperature = np.asarray(temperature, np.float64)
  greedy = temperature < np.finfo(np.float32).tiny
  return x / np.where(greedy, 1, temperature)[:, None]


def support(logits, temperature, top_k, top_p, min_p):
  """What may be drawn, by sorting in float64."""
  weights = np.exp(scaled(logits, temperature))
  rank = np.argsort(-logits, -1, kind="stable")
  descending = np.take_along_axis(logits, rank, -1)
  row = np.arange(len(logits))
  k = np.where((top_k == 0) | (top_k > logits.shape[1]), logits.shape[1], top_k)
  kept = logits >= descending[row, k - 1][:, None]

  cumulative = np.take_along_axis(np.where(kept, weights, 0), rank, -1)
  cumulative = np.cumsum(cumulative, -1)
  share = top_p.astype(np.float64) * cumulative[:, -1]
  last = np.argmax(cumulative >= share[:, None], -1)
  cut = logits >= descending[row, last][:, None]
  kept &= cut | (top_p >= 1)[:, None]
  kept &= weights >= min_p.astype(np.float64)[:, None]
  kept &= logits > -INF
  greedy = temperature < np.finfo(np.float32).tiny
  kept[greedy] = np.arange(logits.shape[1]) == rank[greedy, :1]
  return kept


def random_rows(rows):
  """Logits, half of them with many ties, and ways to draw from them."""
  x = np.random.default_rng(0)
  logits = x.normal(size=(rows, V)) * x.uniform(0.1, 5, (rows, 1))
  logits = np.where(
    np.arange(rows)[:, None] % 2, np.round(2 * logits) / 2, logits
  )
  logits[x.random((rows, V)) < 0.1 * (np.arange(rows)[:, None] % 3 == 0)] = -INF
  pick = lambda *kinds: np.choose(x.integers(0, len(kinds), rows), kinds)
  k = x.integers(1, V, rows)
  return logits.astype(np.float32), dict(
    temperature=pick(
      *(x.uniform(0.1, 2, rows), x.lognormal(size=rows)),
      *(np.ones(rows), 0, 1e-39, 1e-30, 1e6),
    ).astype(np.float32),
    top_k=pick(0, 1, 5, k, V - 1, V, V + 9, 2**31 - 1).astype(np.int32),
    top_p=pick(
      *(1, x.random(rows), x.random(rows), 0.9, 1 - x.random(rows) / 1e3, 1e-30)
    ).astype(np.float32),
    min_p=pick(0, 0, x.random(rows) / 5, x.random(rows)).astype(np.float32),
    seed=x.integers(0, 2**32, rows, np.uint32),
  )


def test_support_and_log_probs_are_those_of_sorting_in_float64():
  logits, fields = random_rows(10_000)
  drawn = draw(logits, np.arange(10_000), **fields)
  kept = drawn.kept
  assert kept.any(-1).all() and not kept.all()
  cut = {name: x for name, x in fields.items() if name != "seed"}
  right = (kept == support(logits, **cut)).all(-1)

  # Rounding may move a border: to one between these, and on few rows.
  def moved(by):
    of = {"top_p": np.float64(1 + by), "min_p": np.float64(1 - by)}
    return support(logits, **cut | {name: cut[name] * of[name] for name in of})

  assert (moved(-1e-6) <= kept).all() and (kept <= moved(1e-6)).all()
  assert right.mean() > 0.999
  drawn_from = cut["temperature"] >= np.finfo(np.float32).tiny
  least = np.where(kept, logits, INF).min(-1)
  most = np.where(kept, -INF, logits).max(-1)
  assert (least > most)[drawn_from].all()

  row = np.arange(len(logits))
  assert kept[row, drawn.tokens].all()
  # Over the support that came back, on every row, whatever its border.
  log_weights = scaled(logits, cut["temperature"])
  weights = np.exp(log_weights)
  relative = log_weights - log_weights[row, drawn.tokens][:, None]
  for log_probs, of in (
    (drawn.log_probs, kept),
    (drawn.untruncated, np.full_like(kept, True)),
  ):
    of_all = np.where(of, np.exp(log_probs[:, None] + relative), 0)
    np.testing.assert_allclose(of_all.sum(-1), 1, atol=1e-5, rtol=0)
    total = np.where(of, weights, 0).sum(-1)
    expected = log_weights[row, drawn.tokens] - np.log(total)
    np.testing.assert_allclose(log_probs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0, 1, 10])
def test_probabilities_sum_to_1_in_a_large_vocabulary(scale):
  V = 129_280
  logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
  logits *= scale
  drawn = draw(logits, temperature=0.9, top_p=[1, 0.95], seed=[1, 2])
  log_weights = scaled(logits, np.full(2, 0.9, np.float32))
  of_drawn = log_weights[np.arange(2), drawn.tokens]
  total = np.log(np.where(drawn.kept, np.exp(log_weights), 0).sum(-1))
  np.testing.assert_allclose(drawn.log_probs, of_drawn - total, atol=1e-5)
  total = np.log(np.exp(log_weights).sum(-1))
  np.testing.assert_allclose(drawn.untruncated, of_drawn - total, atol=1e-5)


@pytest.mark.parametrize("varies", ["seed", "position"])
@pytest.mark.parametrize(
  ("fields", "kept"),
  [
    (dict(), 12),
    (dict(temperature=0.7, top_k=4), 5),  # two are fourth
    (dict(temperature=1.5, top_p=0.8), 7),
    (dict(temperature=2, top_k=10, top_p=0.95, min_p=0.25), 9),
  ],
)
def test_frequencies_are_the_probabilities(fields, kept, varies):
  logits = np.array([0, 2, 1, -1, 1, 1.5, 0.5, -1.5, 2.2, -0.5, 0.25, -2])
  rows = 20_000
  numbers = {"seed": 7, "position": 3, varies: np.arange(rows)}
  drawn = draw(np.tile(logits, (rows, 1)), **fields, **numbers)
  of_support = drawn.kept[:1][0]
  assert of_support.sum() == kept
  weights = np.exp(logits / fields.get("temperature", 1)) * of_support
  expected = rows * (weights / weights.sum())[of_support]
  assert expected.min() > 80
  seen = np.bincount(drawn.tokens, minlength=12)[of_support]
  chi_square = ((seen - expected) ** 2 / expected).sum()
  assert jax.scipy.stats.chi2.sf(chi_square, kept - 1) > 0.01


def test_a_rare_token_can_be_drawn():
  # 2^15 tokens of 3e-8 each; this seed was looked for.
  logits = np.full((1, 2**15), np.log(1e-3 / 2**15))
  logits[:, 0] = 0
  assert draw(logits, seed=2242).tokens == 7821


def mixed_rows():
  """Seven rows, each drawn in another way."""
  logits = np.random.default_rng(3).normal(size=(7, V)).astype(np.float32)
  return (
    2 * np.round(logits, 1),
    np.arange(7) * 1000,
    dict(
      temperature=np.array([1, 0, 0.7, 1, 1.3, 1e6, 0.9]),
      top_k=np.array([0, 0, 40, 0, 50, 0, 0]),
      top_p=np.array([1, 0.5, 1, 0.9, 0.8, 1, 1]),
      min_p=np.array([0, 0, 0, 0, 0.01, 0, 0.1]),
      seed=np.array([5, 5, 5, 2**32 - 1, 8, 9, 5]),
    ),
  )


def rows_of(logits, position, fields, rows):
  """The outputs of these rows, drawn together."""
  fields = {name: x[rows] for name, x in fields.items()}
  return draw(logits[rows], position[rows], **fields)


COMPANIES = [[6, 5, 4, 3, 2, 1, 0], [3, 3, 3, 0, 4, 4, 4]]
# Among those that take the likeliest; among those that draw from all.
COMPANIES += [[i, *others] for i in range(7) for others in ([1] * 6, [0] * 6)]


@pytest.mark.parametrize("rows", COMPANIES)
def test_a_row_does_not_depend_on_its_company(rows):
  together = rows_of(*mixed_rows(), np.arange(7))
  assert len(set(together.tokens)) > 5
  expected = Drawn(*(x[rows] for x in together))
  chex.assert_trees_all_equal(rows_of(*mixed_rows(), np.array(rows)), expected)


@pytest.mark.parametrize(
  "rows", [[0], [1], [2], [3], [5, 4, 6], [*range(7)] * 3]
)
def test_a_token_does_not_depend_on_the_number_of_slots(rows):
  together = rows_of(*mixed_rows(), np.arange(7))
  found = rows_of(*mixed_rows(), np.array(rows))
  np.testing.assert_array_equal(found.tokens, together.tokens[rows])
  np.testing.assert_array_equal(found.kept, together.kept[rows])
  np.testing.assert_allclose(
    found.log_probs, together.log_probs[rows], rtol=1e-6
  )


def test_a_token_does_not_depend_on_the_default_generator():
  logits, position, fields = mixed_rows()
  expected = draw(logits, position, **fields)
  with jax.default_prng_impl("unsafe_rbg"):
    found = jax.jit(lambda *args: sampling.sample(*args, keep=True))(
      logits, sampling_of(7, **fields), position.astype(np.int32)
    )
  np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_devices_may_share_the_rows_or_the_vocabulary():
  logits, position, fields = mixed_rows()
  rows = np.array([*range(7), 0])
  logits = np.pad(logits[rows], [(0, 0), (0, 256 - V)])
  position, fields = position[rows], {n: x[rows] for n, x in fields.items()}
  expected = draw(logits, position, **fields)
  explicit = (jax.sharding.AxisType.Explicit,) * 2
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=explicit)
  place = lambda x, *spec: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*spec))
  )
  with jax.set_mesh(mesh):
    sampled = sample(
      place(logits, "data", "tensor"),
      jax.tree.map(lambda x: place(x, "data"), sampling_of(8, **fields)),
      place(position.astype(np.int32), "data"),
      keep=True,
    )
  found = on_the_host(sampled, 256)
  chex.assert_trees_all_equal(found.tokens, expected.tokens)
  chex.assert_trees_all_equal(found.kept, expected.kept)
  chex.assert_trees_all_close(found.log_probs, expected.log_probs, atol=1e-6)


def test_the_support_is_left_out_unless_asked_for():
  logits, position, fields = mixed_rows()
  expected = draw(logits, position, **fields)
  how = sampling_of(7, **fields)
  found = sample(logits, how, position.astype(np.int32), keep=False)
  assert found.kept is None
  chex.assert_trees_all_equal(
    (found.tokens, found.log_probs, found.untruncated),
    (expected.tokens, expected.log_probs, expected.untruncated),
  )


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-39, -1])
def test_the_likeliest_token_of_lowest_id_is_taken_at_temperature_0(
  temperature,
):
  logits = np.tile(np.arange(40.0) % 10, (100, 1))
  drawn = draw(
    *(logits, np.arange(100)), temperature=temperature, seed=np.arange(100)
  )
  assert (drawn.tokens == 9).all() and (drawn.log_probs == 0).all()
  assert (drawn.kept.nonzero()[1] == 9).all()
  expected = 9 - np.log(np.exp(logits[0]).sum())
  np.testing.assert_allclose(drawn.untruncated, expected, atol=1e-6)


def test_a_very_low_temperature_draws_among_the_likeliest():
  logits = np.tile(np.arange(40.0) % 10, (100, 1)) * 1e37
  drawn = draw(logits, temperature=1e-30, seed=np.arange(100))
  assert set(drawn.tokens) == {9, 19, 29, 39}
  for log_probs in (drawn.log_probs, drawn.untruncated):
    np.testing.assert_allclose(log_probs, -np.log(4), rtol=1e-6)


def test_a_very_high_temperature_draws_among_all():
  logits = np.tile(np.arange(40.0) - 20, (4000, 1))
  drawn = draw(logits, temperature=1e6, seed=np.arange(4000))
  assert np.bincount(drawn.tokens, minlength=40).min() > 50
  np.testing.assert_allclose(drawn.log_probs, -np.log(40), atol=3e-5)


@pytest.mark.parametrize(
  "cut", [dict(top_k=1), dict(top_p=1e-45), dict(min_p=1)]
)
def test_equals_are_kept_together(cut):
  logits = np.tile(np.array([-1, -0.0, -2, 0.0, -INF]), (100, 1))
  drawn = draw(logits, seed=np.arange(100), **cut)
  assert (drawn.kept == [0, 1, 0, 1, 0]).all()
  assert set(drawn.tokens) == {1, 3}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cut", [dict(top_k=1), dict(top_p=0.3)])
def test_neighbouring_floats_are_told_apart(cut, sign):
  one = np.float32(sign)
  logits = np.array([[one, np.nextafter(one, np.float32(2)), -3]])
  np.testing.assert_array_equal(draw(logits, **cut).kept, [[0, 1, 0]])


def test_what_cannot_be_drawn_is_not_kept():
  logits = np.full((5, 40), -INF)
  logits[:, [8, 33]] = [-3e38, 3e38]
  cuts = dict(top_k=[0, 30, 0, 2, 30], top_p=[1, 1, 1, 1, 0.99999])
  drawn = draw(logits, min_p=[0, 0, 1e-9, 0, 0], **cuts)
  of_both = np.array([1, 1, 0, 1, 0], bool)
  kept = drawn.kept
  assert (kept.sum(-1) == 1 + of_both).all()
  assert kept[:, 33].all() and (kept[:, 8] == of_both).all()
  assert (drawn.tokens == 33).all() and (drawn.log_probs == 0).all()


def test_kept_ids_are_those_of_the_bits():
  bits = np.random.default_rng(0).random((50, 129 * 32)) < 0.01
  bits[7], bits[8], bits[9, 31::32] = True, False, True
  words = np.packbits(bits, axis=1, bitorder="little").view("<u4")
  bounds, ids = sampling.kept_ids(words.astype(np.uint32))
  assert (bounds.dtype, ids.dtype) == (np.int64, np.int32)
  assert bounds.shape == (51,) and bounds[0] == 0 and bounds[-1] == ids.size
  for t in range(50):
    np.testing.assert_array_equal(
      ids[bounds[t] : bounds[t + 1]], np.flatnonzero(bits[t])
    )
  bounds, ids = sampling.kept_ids(np.zeros((0, 4), np.uint32))
  assert bounds.tolist() == [0] and ids.size == 0


def step(logits, position, *fields):
  return sampling.sample(
    logits, sampling.Sampling(*fields), position, keep=True
  )


def shapes(B, V):
  """Of the arguments of `step`."""
  rows = [jax.ShapeDtypeStruct((B,), x) for x in "i4 f4 i4 f4 f4 u4".split()]
  return [jax.ShapeDtypeStruct((B, V), jnp.float32), *rows]


def test_memory_is_that_of_a_few_arrays_of_logits():
  B, V = 64, 129_280

  def temporaries():
    compiled = jax.jit(lambda *args: step(*args)).lower(*shapes(B, V)).compile()
    return hlo.temporary_bytes(compiled) / (4 * B * V)

  # On a CPU, the generator itself holds 8.
  assert temporaries() < 10.5
  zeros = lambda seed, position, V: jnp.zeros((B, V))
  with mock.patch.object(sampling, "_noise", zeros):
    assert temporaries() < 4.5


@pytest.mark.slow
def test_memory_is_that_of_a_few_arrays_of_logits_on_a_tpu():
  B, V = 64, 129_280
  compiled = tpu_topologies.compile_step("v5p", step, shapes(B, V))
  assert hlo.temporary_bytes(compiled) < 4.5 * 4 * B * V
