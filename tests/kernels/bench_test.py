"""The benchmark program, whole, on a shape that a CPU can do."""

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import cases
from pallas_kernels.bench import check
from pallas_kernels.bench import measure
from pallas_kernels.ops.dense_indexer_loss import api as dense_indexer_loss
from pallas_kernels.ops.dense_mla import api as dense_mla
from pallas_kernels.ops.indexer_topk import api as indexer_topk
from pallas_kernels.ops.sparse_indexer_loss import api as sparse_indexer_loss
from pallas_kernels.ops.sparse_mla import api as sparse_mla

TINY = shapes.SHAPES["tiny"]
APIS = {
  "indexer_topk": indexer_topk,
  "sparse_mla": sparse_mla,
  "dense_mla": dense_mla,
  "sparse_indexer_loss": sparse_indexer_loss,
  "dense_indexer_loss": dense_indexer_loss,
}


def make_case(op: str, shape: shapes.Shape = TINY) -> cases.Case:
  index_key, key, chosen_key = jax.random.split(jax.random.key(0), 3)
  index = cases.index_inputs(index_key, shape)
  if op == "indexer_topk":
    return cases.indexer_topk(index, shape, "causal", None)
  if op in ("sparse_mla", "sparse_indexer_loss"):
    indices = cases.chosen(chosen_key, shape, "random")
    attention = cases.sparse_mla(key, shape, indices)
    loss = cases.sparse_indexer_loss
  else:
    attention = cases.dense_mla(key, shape, "causal")
    loss = cases.dense_indexer_loss
  if op == attention.op:
    return attention
  _, lse = jax.jit(attention.forward("chunked_xla"))(*attention.inputs.values())
  return loss(index, attention, lse, shape, True)


def spoil(name: str, x: jax.Array) -> jax.Array:
  """A single query's result (or key's, of a gradient) is wrong."""
  if name == "indices":
    # The last key is another one; the list still ascends.
    return x.at[0, 20, -1].set(jnp.where(x[0, 20, -1] == 70, 71, 70))
  return x.at[0, 20].add(jnp.full_like(x[0, 20], 0.02) + x[0, 20] / 8)


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
  """Measurements take no longer than they must."""
  for name in ("_BATCH_SECONDS", "_ALL_SECONDS"):
    monkeypatch.setattr(measure, name, 0.0)


def run_main(op, *options):
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "out.json"
    bench.main([op, "--shape=tiny", "--seed=1", f"--json={file}", *options])
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
  "op, grad",
  [
    ("indexer_topk", False),
    ("sparse_mla", True),
    ("dense_indexer_loss", False),
  ],
)
def test_checks_then_times(op, grad):
  values = run_main(op, *["--grad"] * grad, "--implementation=reference")
  assert all(x["right"] for x in values["checks"])
  names = [f"{op} forward"]
  if grad:
    names += [f"{op} backward", f"{op} forward and backward"]
    gradients = [x for x in values["checks"] if x["name"].startswith("d ")]
    assert gradients
  assert [x["what"] for x in values["times"]] == names * 2
  by = [x["implementations"][op] for x in values["times"]]
  expected = [["reference"], ["chunked_xla"]]
  assert by == [x for x in expected for _ in names]
  for x in values["times"]:
    assert x["seconds"] > 0
    assert x["bytes"] > 0
  assert values["seed"] == 1
  assert values["jax"] == jax.__version__
  assert "S=97" in values["shape"]


@pytest.mark.slow
def test_scores_in_8_bits():
  values = run_main("indexer_topk", "--score-dtype=float8_e4m3fn")
  assert values["scores"] == "float8_e4m3fn"
  assert all(x["right"] for x in values["checks"])


@pytest.mark.slow
def test_attention_stands_beside_dense_attention():
  values = run_main("attention", "--grad")
  assert "T=97" in values["shape"]
  assert [x["what"] for x in values["ratios"]] == [
    "dense over DSA, forward",
    "dense_mla over sparse_mla, forward",
    "dense over DSA, forward and backward",
    "dense_mla over sparse_mla, forward and backward",
    "what the loss adds over sparse_mla, forward and backward",
  ]
  (dsa,) = [x for x in values["times"] if x["what"] == "DSA forward"]
  assert set(dsa["implementations"]) == {"indexer_topk", "sparse_mla"}


@pytest.mark.slow
def test_warmup():
  values = run_main("warmup")
  (ratio,) = values["ratios"]
  assert ratio["what"] == "warm-up over dense_mla forward"


@pytest.mark.slow
def test_crossover():
  values = run_main("crossover", "--grad")
  both = [x["value"] for x in values["ratios"]]
  assert len(both) == 2
  seconds = {x["what"]: x["seconds"] for x in values["times"]}
  whole = dataclasses.replace(TINY, T=TINY.S)
  start, end = (np.asarray(x) for x in cases.ranges(whole, "causal"))
  seen = end - start
  per_pair = seen.sum() / np.minimum(seen, TINY.K).sum()
  for ratio, what in zip(both, ("forward", "forward and backward")):
    times = [seconds[f"{op} {what}"] for op in ("sparse_mla", "dense_mla")]
    np.testing.assert_allclose(ratio, per_pair * times[0] / times[1], 1e-6)


def test_what_is_wrong_is_not_timed():
  def wrong(*args):
    out, lse = sparse_mla.chunked_xla.sparse_mla(*args)
    return spoil("out", out), lse

  wrong_one = mock.patch.dict(
    sparse_mla.IMPLEMENTATIONS, {"chunked_xla": wrong}
  )
  with wrong_one, pytest.raises(SystemExit, match="out differ"):
    run_main("sparse_mla")


@pytest.mark.parametrize(
  "options, message",
  [
    (("indexer_topk", "--grad"), "no gradient; leave out --grad"),
    (("sparse_mla", "--queries=98"), "98 queries exceed self.S=97"),
    (("sparse_mla", "--top-k=0"), "K=0 must be at least 1"),
    (("sparse_mla", "--checked=0"), "checked=0 must be"),
  ],
)
def test_refuses(options, message):
  with pytest.raises(SystemExit, match=f"error: .*{message}"):
    run_main(*options)


@pytest.mark.parametrize(
  "op, name",
  [
    ("indexer_topk", "indices"),
    ("indexer_topk", "scores"),
    ("sparse_mla", "out"),
    ("sparse_mla", "lse"),
    ("dense_mla", "lse"),
    ("sparse_indexer_loss", "loss"),
    ("dense_indexer_loss", "loss"),
  ],
)
def test_finds_one_wrong_query(op, name):
  case, api = make_case(op), APIS[op]

  def wrong(*args, **kwargs):
    result = api.IMPLEMENTATIONS["reference"](*args, **kwargs)
    if not isinstance(result, tuple):
      return spoil(name, result)
    return tuple(
      spoil(n, x) if n == name else x for n, x in zip(case.outputs, result)
    )

  rows = np.arange(TINY.T)
  with mock.patch.dict(api.IMPLEMENTATIONS, {"chunked_xla": wrong}):
    findings = check.check(case, "chunked_xla", rows, None)
  bad = {x.name for x in findings if not x.right}
  assert {name} <= bad <= {name, "scores"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "kv"])
def test_finds_one_wrong_row_of_a_gradient(name):
  case = make_case("sparse_mla")

  def wrong(q, kv, *args):
    @jax.custom_vjp
    def same(x):
      return x

    same.defvjp(lambda x: (x, None), lambda _, d: (spoil(name, d),))
    q, kv = (same(q), kv) if name == "q" else (q, same(kv))
    return sparse_mla.reference.sparse_mla(q, kv, *args)

  cotangents = cases.cotangents(case, jax.random.key(1))
  rows = np.arange(TINY.T)
  with mock.patch.dict(sparse_mla.IMPLEMENTATIONS, {"chunked_xla": wrong}):
    findings = check.check(case, "chunked_xla", rows, cotangents)
  assert {x.name for x in findings if not x.right} == {f"d {name}"}


@pytest.mark.slow
def test_a_sample_checks_what_the_whole_does():
  """Cotangents outside it are zero, so that d kv is that of the sample."""
  case = make_case("sparse_mla")
  cotangents = cases.cotangents(case, jax.random.key(1))
  rows = check.sample(TINY.T, 9, seed=0)
  assert len(rows) == 9
  assert {0, 1, 2, 3, TINY.T - 1} <= set(rows.tolist())
  for x in check.check(case, "chunked_xla", rows, cotangents):
    assert x.right, x


def test_work_is_counted_as_in_the_bars():
  shape = shapes.Shape(T=16, S=64, K=8, N=2)
  case = make_case("sparse_mla", shape)
  indices = case.inputs["indices"]
  selected = int(((indices >= 0) & (indices < 64)).sum())
  assert selected < 16 * 8  # one sees no key, one a few
  assert case.flops == 2 * selected * 2 * 1088
  assert case.flops_backward == 2 * selected * 2 * 2752
  case = make_case("dense_mla", shape)
  start, end = case.inputs["start"], case.inputs["end"]
  pairs = int((end - start).sum())
  assert case.flops == 2 * pairs * 2 * (192 + 128)
  assert case.flops_backward == 2 * pairs * 2 * (3 * 192 + 2 * 128)
  case = make_case("indexer_topk", shape)
  assert case.flops == 2 * pairs * 64 * 128


@pytest.mark.parametrize("order", ["random", "ascending"])
def test_chosen_keys_are_distinct(order):
  indices = np.asarray(cases.chosen(jax.random.key(0), TINY, order))[0]
  assert not ((indices[1] >= 0) & (indices[1] < TINY.S)).any()
  for row in indices[3:]:
    assert len(set(row.tolist())) == TINY.K
    assert 0 <= row.min() <= TINY.S - TINY.K
    assert TINY.K - 1 <= row.max() <= TINY.S - 1
  ascending = (np.diff(indices[3:]) > 0).all()
  assert ascending == (order == "ascending")
