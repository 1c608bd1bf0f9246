"""Whole training steps run on the kernels; only traced and lowered here."""

import dataclasses
from unittest import mock
import warnings

import jax
import pytest

from dsa_jax import sharding
from pallas_kernels import dispatch
from train import config as config_lib
from train.aot import compile as compile_lib

KERNEL, PLAIN = ["mosaic_gpu"], ["chunked_xla"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "seq_len, attention",
  [
    (32_768, {"sparse_mla_with_loss": KERNEL, "dense_mla": PLAIN}),
    # All visible keys through a mask, which is faster there.
    (8192, {"sparse_indexer_loss": KERNEL, "dense_mla": KERNEL + PLAIN}),
  ],
)
def test_a_step_of_the_h200_config_runs_on_kernels(seq_len, attention):
  """Every op of it, lowered for CUDA at the real shapes."""
  cfg = config_lib.load("configs/h200_sparse.py")
  stage = dataclasses.replace(cfg.stages[0], seq_len=seq_len)
  cfg = dataclasses.replace(cfg, stages=(stage,))
  mesh = sharding.make_mesh()
  with (
    jax.set_mesh(mesh),
    mock.patch.object(dispatch, "platform", lambda: "gpu"),
    mock.patch.object(dispatch, "device_kind", lambda: "NVIDIA H200"),
    dispatch.record() as chosen,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("error")  # a kernel that refuses warns
    traced = compile_lib.trace(cfg.step_plan, cfg.stages[0], mesh)
    lowered = traced.lower(lowering_platforms=("cuda",))
  # The recall, now and then, measures both ways, dense attention by plain XLA.
  always = {"indexer_topk": KERNEL, "sparse_mla": KERNEL}
  assert chosen == always | {"grouped_matmul": PLAIN} | attention
  assert "mosaic_gpu" in lowered.as_text()
