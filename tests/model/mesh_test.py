"""On every mesh, the model is the one of one device."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from dsa_jax import sharding
import pallas_kernels
from pallas_kernels import devices
from tests.train import runs
from tests.train.learn import step_test
from train.learn import step as step_lib

MODEL = dataclasses.replace(runs.MODEL, experts_per_token=2)
# A layer of experts and MTP's, and the first of them alone.
EXPERTS = dataclasses.replace(MODEL, num_layers=1, num_dense_layers=0)
LAYER = dataclasses.replace(EXPERTS, num_mtp_layers=0)
# A layer with a dense MLP.
DENSE = dataclasses.replace(LAYER, num_dense_layers=1)

# Every axis alone, in pairs, and all at once.
PAIRS = [
  dict(data=2, fsdp=2),
  dict(data=2, expert=2),
  dict(data=2, context=2),
  dict(data=2, tensor=2),
  dict(fsdp=2, expert=2),
  dict(fsdp=2, context=4),
  dict(fsdp=2, tensor=2),
  dict(expert=2, context=4),
  dict(expert=4, tensor=2),
  dict(context=4, tensor=2),
]
ALONE = [dict(data=4), dict(fsdp=4), dict(expert=4), dict(context=4)]
ALL = dict(data=2, fsdp=2, expert=2, context=2, tensor=2)
# Of the others every second one in each way, so that an axis comes in both: it
# would be minutes more for them all.
MORE = [
  (ALL, "sparse"),
  (ALL, "dense"),
  (dict(fsdp=4, context=2), "dense"),
  (dict(data=2, expert=2, tensor=2), "sparse"),
  *zip([*PAIRS, *ALONE, dict(tensor=2)], itertools.cycle(["sparse", "dense"])),
]


@functools.cache
def on(attention, cfg, **axes):
  """Loss, what else the forward pass gives, and gradients."""
  with jax.set_mesh(sharding.make_mesh(**axes)):
    model, init = step_lib.init(cfg, 0)
    params, bias = init(jax.random.key(0))
    arrays = {
      name: jax.device_put(x, cfg.rules("batch", None))
      for name, x in step_test.batch().items()
    }
    arguments = arrays["tokens"], arrays["positions"], arrays["segment_ids"]

    def loss_fn(params):
      whole = model.merge(params, bias)
      if attention == "dense":  # LM and KL: pretraining and warm-up in one
        losses = whole.losses(
          *arguments, attention="dense", lm_loss=True, index_loss=True
        )
        rest = {}
      else:
        output = whole.forward(*arguments)
        losses = output.losses
        rest = {"selected": output.selected, "hidden": output.hidden}
      parts: Any = losses.lm, losses.mtp, losses.index, losses.balance
      exact = {"load": losses.load}
      close = {"lm": losses.lm, "index": losses.index, "recall": losses.recall}
      total = sum(x.sum() for x in parts if x is not None)
      return total, (exact, close, rest)

    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return jax.device_get(grad(params))


def check(attention, axes, cfg=MODEL, other=None):
  (loss, (exact, close, rest)), grads = on(attention, cfg)
  (other_loss, (other_exact, other_close, other_rest)), other = other or on(
    attention, cfg, **axes
  )
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  np.testing.assert_array_equal(other_exact["load"], exact["load"])
  if attention == "sparse":
    assert (rest["selected"] >= 0).any()
    np.testing.assert_array_equal(other_rest["selected"], rest["selected"])
    np.testing.assert_allclose(
      other_rest["hidden"], rest["hidden"], rtol=1e-5, atol=1e-5
    )
  for name in ("lm", "index"):
    np.testing.assert_allclose(
      other_close[name], close[name], rtol=1e-5, atol=1e-5
    )
  # Their order is that of the shards.
  np.testing.assert_allclose(
    np.sort(other_close["recall"]), np.sort(close["recall"]), rtol=1e-5
  )
  step_test.assert_close_each(other, grads, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes",
  [
    pytest.param(dict(), marks=pytest.mark.long),
    dict(context=2, tensor=2),
  ],
  ids=str,
)
def test_sparse_attention_may_be_done_densely(monkeypatch, axes):
  done = []

  def dense_mla(*args, **kwargs):
    if not kwargs:  # as the recall has
      done.append(len(args) == 7)  # with indices
    return dense_mla_api(*args, **kwargs)

  dense_mla_api = pallas_kernels.dense_mla
  with monkeypatch.context() as patch:
    patch.setattr(pallas_kernels, "dense_mla", dense_mla)
    cpu = devices.Device(name="cpu", kinds=("cpu",), flops=1e9, dense_pairs=1e6)
    patch.setattr(devices, "of", {"cpu": cpu}.get)
    other = on.__wrapped__("sparse", LAYER, **axes)
  assert done and all(done)
  check("sparse", axes, LAYER, other)


@pytest.mark.slow
def test_on_all_axes():
  check("sparse", ALL, EXPERTS)


@pytest.mark.slow
def test_dense_attention_and_mlp():
  check("dense", dict(fsdp=2, context=2, tensor=2), DENSE)


@pytest.mark.long
@pytest.mark.parametrize(("axes", "attention"), MORE, ids=str)
def test_every_mesh(axes, attention):
  check(attention, axes)
