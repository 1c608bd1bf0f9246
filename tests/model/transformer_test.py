"""The whole model: packing, isolation, remat, and what forward returns."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from dsa_jax import losses as losses_lib
from tests.model import models

TOKENS = models.tokens(2, 32)
PACKED = (models.POSITIONS, models.SEGMENTS)


@functools.partial(jax.jit, static_argnames="attention")
def forward(model, tokens, positions, segments, attention="sparse"):
  return model.forward(tokens, positions, segments, attention=attention)


@functools.cache
def packed(attention="sparse"):
  return forward(models.model(), TOKENS, *PACKED, attention=attention)


both = pytest.mark.parametrize(
  "attention", [pytest.param("dense", marks=pytest.mark.slow), "sparse"]
)


def leaves(grads):
  """(name, gradient) of each parameter."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    yield jax.tree_util.keystr(path), np.asarray(leaf)


@both
def test_packed_documents_equal_separate_ones(attention):
  tokens = np.zeros_like(TOKENS)
  segments = np.zeros_like(TOKENS)
  for row, (begin, end) in enumerate(((0, 11), (11, 28))):
    tokens[row, : end - begin] = TOKENS[0, begin:end]
    segments[row, : end - begin] = 1
  positions = np.tile(np.arange(32, dtype=np.int32), (2, 1))
  alone = forward(
    models.model(), tokens, positions, segments, attention=attention
  ).logits
  logits = packed(attention).logits[0]
  np.testing.assert_allclose(logits[:11], alone[0, :11], atol=2e-5)
  np.testing.assert_allclose(logits[11:28], alone[1, :17], atol=2e-5)


def test_selections_stay_in_their_document():
  selected_LTK = packed().selected[:, 0]
  for t in range(32):
    first = 0 if t < 11 else 11
    keys = selected_LTK[:, t]
    if t >= 28:
      np.testing.assert_array_equal(keys, -1)
      continue
    visible = min(t + 1 - first, 8)
    np.testing.assert_array_equal((keys >= 0).sum(-1), visible)
    assert ((keys == -1) | ((keys >= first) & (keys <= t))).all()


def test_padding_has_no_loss_and_no_load():
  parts = packed().losses
  np.testing.assert_array_equal(parts.lm[0, 27:], 0)  # nor has the last token
  np.testing.assert_array_equal(parts.lm[0, 10], 0)
  np.testing.assert_array_equal(parts.mtp[0, 9:11], 0)
  np.testing.assert_array_equal(parts.index[:, 0, 28:], 0)
  assert parts.index[:, :, 8:11].min() > 0
  np.testing.assert_array_equal(parts.load.sum(-1), 2 * (28 + 32))


@both
def test_losses_are_those_of_the_logits(attention):
  output = packed(attention)
  log_p = jax.nn.log_softmax(output.logits)
  targets = np.roll(TOKENS, -1, 1)
  nats = -np.take_along_axis(np.asarray(log_p), targets[..., None], -1)
  counted = np.asarray(losses_lib.has_target(jnp.asarray(models.SEGMENTS)))
  np.testing.assert_allclose(
    output.losses.lm, np.where(counted, nats[..., 0], 0), atol=1e-5
  )
  assert (output.selected is None) == (attention == "dense")
  assert (output.losses.index is None) == (attention == "dense")


def test_a_call_gives_the_logits_of_forward():
  logits = jax.jit(lambda m: m(TOKENS, *PACKED))(models.model())
  np.testing.assert_allclose(logits, packed().logits, atol=1e-5)


@both
def test_predicts_at_chosen_places(attention):
  at = np.array([[3, 27, 3, 12], [31, 0, 5, 5]], np.int32)
  logits = jax.jit(
    lambda m: m.predict(TOKENS, at, *PACKED, attention=attention)
  )(models.model())
  expected = np.take_along_axis(packed(attention).logits, at[..., None], 1)
  np.testing.assert_allclose(logits, expected, atol=1e-5)


@both
def test_the_future_does_not_matter(attention):
  changed = TOKENS.copy()
  changed[:, 20:] = (changed[:, 20:] + 1) % 64
  one = packed(attention).logits
  other = forward(models.model(), changed, *PACKED, attention=attention).logits
  np.testing.assert_array_equal(one[:, :20], other[:, :20])
  assert np.abs(one - other)[:, 20:].max() > 0.1


def test_mtp_predicts_the_token_after_the_next():
  # MTP at t sees the tokens up to t + 1, and is asked for t + 2.
  changed = TOKENS.copy()
  changed[1, 20] = (changed[1, 20] + 1) % 64
  one = packed().losses.mtp
  other = forward(models.model(), changed, *PACKED).losses.mtp
  different = np.flatnonzero(np.asarray(one != other)[1])
  assert different[0] == 18  # its target changed
  np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.slow
def test_computes_in_bfloat16_where_asked():
  cfg = dataclasses.replace(
    models.CONFIG,
    dtype="bfloat16",
    init_std=0.05,
    num_mtp_layers=0,
    # A token goes through both experts: of more, rounding may choose others.
    num_experts=2,
    expert_groups=1,
    groups_per_token=1,
  )
  exact = dataclasses.replace(cfg, dtype="float32")

  def run(cfg, key):
    model = dsa_jax.Transformer(cfg, rngs=nnx.Rngs(key))
    return model(TOKENS, attention="dense")

  logits, expected = (
    jax.jit(run, static_argnums=0)(c, jax.random.key(0)) for c in (cfg, exact)
  )
  assert logits.dtype == jnp.float32
  error = np.abs(logits - expected).max(-1) / np.abs(expected).max(-1)
  assert error.max() < 0.05
  assert error.max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
  "indexer_types",
  [
    (),
    pytest.param(("full", "shared", "shared"), marks=pytest.mark.long),
  ],
)
def test_remat_changes_no_selection_and_no_gradient(indexer_types):
  results = []
  for remat in ("none", "attention", "selection"):
    cfg = dataclasses.replace(
      models.CONFIG,
      remat=remat,
      num_mtp_layers=0,
      num_dense_layers=0,  # they attend like the others
      indexer_types=indexer_types,
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(model):
      output = model.forward(TOKENS)
      parts = output.losses
      return parts.lm.mean() + parts.index.mean(), output.selected

    grads, selected = grad(models.model(cfg))
    results.append((dict(leaves(grads)), selected))
  (one, first), *others = results
  # Nor does taking the gradient change what is selected without it.
  plain = jax.jit(lambda m: m.forward(TOKENS).selected)(models.model(cfg))
  np.testing.assert_array_equal(first, plain)
  for other, second in others:
    np.testing.assert_array_equal(first, second)
    for name, grad in one.items():
      scale = np.abs(grad).max()
      np.testing.assert_allclose(
        other[name], grad, atol=1e-5 * scale, rtol=1e-4
      )
