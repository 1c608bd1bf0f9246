"""Layers that read the keys that an earlier one chose: values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import frame as frame_lib
from dsa_jax import mla as mla_lib
from dsa_jax import rope
from tests.model import cached_test
from tests.model import mesh_test
from tests.model import models
from tests.model import transformer_test

TOKENS, PACKED = transformer_test.TOKENS, transformer_test.PACKED
FULL = dataclasses.replace(models.CONFIG, num_layers=5, num_dense_layers=2)
# The first indexer serves a layer of its own stack and one of the next.
CONFIG = dataclasses.replace(
  FULL, indexer_types=("full", "shared", "shared", "full", "shared")
)
SERVED = {0: (0, 1, 2), 3: (3, 4)}


@functools.cache
def gradients(attention):
  """A forward pass; the gradients of the index losses, and of the others."""

  def losses(model):
    output = model.forward(TOKENS, *PACKED, attention=attention)
    parts = output.losses
    if attention == "dense":  # of which `forward` has no index loss
      parts = model.losses(
        *(TOKENS, *PACKED), attention="dense", lm_loss=True, index_loss=True
      )
    others = parts.lm.sum() + parts.mtp.sum() + parts.balance.sum()
    return (parts.index.sum(), others), (output, parts)

  @jax.jit
  def run(model):
    _, pullback, aux = jax.vjp(losses, model, has_aux=True)
    return aux, pullback((1.0, 0.0))[0], pullback((0.0, 1.0))[0]

  return run(models.model(CONFIG))


def layer(model, i):
  """A layer, or what a tree like the model has of it."""
  dense = CONFIG.num_dense_layers
  if i < dense:
    return jax.tree.map(lambda y: y[i], model.dense_layers)
  return jax.tree.map(lambda y: y[i - dense], model.moe_layers)


def attention_weights(mla, x, frame, read_BTS):
  """What a layer attends to: the mean over heads of a softmax, as defined."""
  H, C = CONFIG.nope_head_dim, CONFIG.kv_rank
  rotate = lambda y: rope.rotate(y, frame.cos, frame.sin, interleaved=True)
  q_BTNX = jnp.einsum("BTQ,QNX->BTNX", q_latent(mla, x), mla.q_b_QNX[...])
  kv_BSX = x @ mla.kv_a_DX[...]
  k_BSNH = jnp.einsum(
    "BSC,CNH->BSNH", mla.kv_norm(kv_BSX[..., :C]), mla.k_b_CNH[...]
  )
  logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNX[..., :H], k_BSNH)
  logits_BNTS += jnp.einsum(
    "BTNR,BSR->BNTS", rotate(q_BTNX[..., H:]), rotate(kv_BSX[..., C:])
  )
  logits_BNTS *= mla_lib.softmax_scale(CONFIG)
  logits_BNTS = jnp.where(read_BTS[:, None], logits_BNTS, -1e30)
  return jax.nn.softmax(logits_BNTS).mean(1)


def q_latent(mla, x):
  return mla.q_norm(x @ mla.q_a_DQ[...])


def log_index(indexer, mla, x, frame, read_BTS):
  """The log of the softmax of an indexer's scores."""
  index = indexer(x, q_latent(mla, x), frame)
  similarity = jnp.einsum("BTMI,BSI->BTMS", index.q, index.k)
  scores_BTS = jnp.einsum("BTMS,BTM->BTS", jax.nn.relu(similarity), index.w)
  return jax.nn.log_softmax(jnp.where(read_BTS, scores_BTS, -1e30))


def divergence(p_BTS, log_q_BTS, frame):
  """KL of each query that sees a key."""
  gap = jnp.where(p_BTS > 0, jnp.log(jnp.maximum(p_BTS, 1e-30)) - log_q_BTS, 0)
  return jnp.where(frame.valid, (p_BTS * gap).sum(-1), 0)


@functools.cache
def by_definition(attention):
  """KL of each layer from its indexer; each indexer's gradient, where the
  target is the mean of its layers' attention (IndexCache)."""
  (output, _), _, _ = gradients(attention)

  @jax.jit
  def run(model, hidden, selected):
    frame = frame_lib.make_frame(CONFIG, TOKENS.shape, *PACKED)
    keys = jnp.arange(TOKENS.shape[1])[None, None]
    read_BTS = (frame.start[..., None] <= keys) & (keys < frame.end[..., None])
    kl, grads = {}, {}
    for source, served in SERVED.items():
      if selected is not None:
        picks = selected[source][..., None] == keys[:, None]
        read_BTS = picks.any(2)
      blocks = [layer(model, i) for i in served]
      inputs = [b.attention_norm(hidden[i]) for b, i in zip(blocks, served)]
      targets = [
        attention_weights(b.attention, x, frame, read_BTS)
        for b, x in zip(blocks, inputs)
      ]
      mla, x = blocks[0].attention, inputs[0]
      index = functools.partial(
        log_index, mla=mla, x=x, frame=frame, read_BTS=read_BTS
      )
      for i, p_BTS in zip(served, targets):
        kl[i] = divergence(p_BTS, index(mla.indexer), frame)
      mean_BTS = sum(targets) / len(targets)
      grads[source] = jax.grad(
        lambda indexer, p=mean_BTS, index=index: divergence(
          p, index(indexer), frame
        ).sum()
      )(mla.indexer)
    return kl, grads

  return run(models.model(CONFIG), output.hidden, output.selected)


both = pytest.mark.parametrize("attention", ["sparse", "dense"])


@pytest.mark.slow
@both
def test_is_each_layers_kl_over_the_layers_that_its_indexer_serves(attention):
  (_, parts), _, _ = gradients(attention)
  kl, _ = by_definition(attention)
  assert len(parts.index) == 6  # MTP's is the last
  for served in SERVED.values():
    for i in served:
      expected = kl[i] / len(served)
      np.testing.assert_allclose(parts.index[i], expected, atol=1e-5, rtol=0)
      assert expected.max() > 0.01


@pytest.mark.slow
@both
def test_an_indexer_learns_the_mean_attention_of_its_layers(attention):
  _, of_index, _ = gradients(attention)
  _, expected = by_definition(attention)
  for source, grads in expected.items():
    actual = layer(of_index, source).attention.indexer
    actual = dict(transformer_test.leaves(actual))
    for name, grad in transformer_test.leaves(grads):
      scale = np.abs(grad).max()
      assert scale > 1e-3, name
      np.testing.assert_allclose(
        actual[name], grad, atol=1e-5 * scale, rtol=0, err_msg=name
      )


@pytest.mark.slow
@both
def test_nothing_else_learns_from_it(attention):
  _, of_index, _ = gradients(attention)
  for name, grad in transformer_test.leaves(of_index):
    if "indexer" not in name:
      np.testing.assert_array_equal(grad, 0, name)
    if "mtp" in name and "indexer" in name:
      assert np.abs(grad).max() > 0, name
  for i in (1, 2, 4):
    shared = layer(of_index, i).attention.indexer
    for name, grad in transformer_test.leaves(shared):
      np.testing.assert_array_equal(grad, 0, name)


@pytest.mark.slow
@both
def test_the_other_losses_teach_all_but_the_indexers(attention):
  _, _, of_others = gradients(attention)
  for name, grad in transformer_test.leaves(of_others):
    if "indexer" in name or "bias_E" in name:
      np.testing.assert_array_equal(grad, 0, name)
    else:
      assert np.abs(grad).max() > 0, name


@pytest.mark.slow
def test_recall_is_of_the_keys_that_the_indexer_would_choose():
  """Dense attention has chosen none."""
  (output, parts), _, _ = gradients("dense")
  model, K = models.model(CONFIG), CONFIG.top_k

  @jax.jit
  def expected(model, hidden):
    frame = frame_lib.make_frame(CONFIG, TOKENS.shape, *PACKED)
    keys = jnp.arange(TOKENS.shape[1])[None, None]
    seen = (frame.start[..., None] <= keys) & (keys < frame.end[..., None])
    held = {}
    for source, served in SERVED.items():
      first = layer(model, source)
      x = first.attention_norm(hidden[source])
      scores = log_index(
        first.attention.indexer, first.attention, x, frame, seen
      )
      _, chosen = jax.lax.top_k(scores, K)
      for i in served:
        block = layer(model, i)
        x = block.attention_norm(hidden[i])
        p_BTS = attention_weights(block.attention, x, frame, seen)
        held[i] = jnp.take_along_axis(p_BTS, chosen, -1).sum(-1)
    return held

  held = expected(model, output.hidden)
  counted = np.asarray(parts.recall_queries)
  assert counted.any()
  for i, expected_BT in held.items():
    np.testing.assert_allclose(
      parts.recall[i][counted], expected_BT[counted], atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_a_shared_layer_reads_what_the_last_full_one_chose():
  (output, _), _, _ = gradients("sparse")
  selected_LBTK = output.selected
  for source, served in SERVED.items():
    for i in served:
      np.testing.assert_array_equal(selected_LBTK[i], selected_LBTK[source])
  assert (selected_LBTK[0] != selected_LBTK[3]).any()
  # With the same parameters, each layer would choose otherwise.
  own = transformer_test.forward(models.model(FULL), TOKENS, *PACKED).selected
  np.testing.assert_array_equal(own[0], selected_LBTK[0])
  for i in (1, 2, 4):
    assert (own[i] != selected_LBTK[i]).any()


def test_the_mtp_block_has_an_indexer_of_its_own():
  np.testing.assert_array_equal(CONFIG.layers_served, [3, 3, 3, 2, 2, 1])
  np.testing.assert_array_equal(CONFIG.has_indexer, [1, 0, 0, 1, 0, 1])
  np.testing.assert_array_equal(FULL.layers_served, 1)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [(1, 5), (12, 9)])
def test_decoding_equals_the_full_forward(prefill):
  decoded = cached_test.run("sparse", prefill, cfg=CONFIG).decoded
  output, _ = cached_test.full("sparse", CONFIG)
  cached_test.compare(decoded["logits"], output.logits, 1e-4)
  selected = np.moveaxis(np.asarray(output.selected), 0, 2)
  cached_test.compare(decoded["selected"], selected, 0)


@pytest.mark.slow
def test_dense_decoding_equals_the_full_forward():
  decoded = cached_test.run("dense", cfg=CONFIG).decoded
  output, experts = cached_test.full("dense", CONFIG)
  cached_test.compare(decoded["logits"], output.logits, 1e-4)
  cached_test.compare(decoded["experts"], experts, 0)


@pytest.mark.slow
def test_dense_attention_does_not_ask_the_indexers():
  forward = jax.jit(lambda m: m(TOKENS, attention="dense"))
  np.testing.assert_array_equal(
    forward(models.model(CONFIG)), forward(models.model(FULL))
  )


@pytest.mark.parametrize(
  ("types", "message"),
  [
    (
      ("full", "shared"),
      r"indexer_types=\('full', 'shared'\) has 2 entries for self.num_layers=5",
    ),
    (
      ("shared", "full", "full", "full", "full"),
      r"indexer_types=\('shared', .*\) begins with 'shared'",
    ),
  ],
)
def test_refuses(types, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(FULL, indexer_types=types)


@pytest.mark.long
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_on_a_mesh(attention):
  axes = dict(fsdp=2, context=2, tensor=2)
  cfg = dataclasses.replace(
    mesh_test.MODEL,
    num_layers=3,
    indexer_types=("full", "shared", "shared"),  # into the next stack
  )
  mesh_test.check(attention, axes, cfg)
