"""The benchmark program, whole, on a shape that a CPU can do."""

import dataclasses
import importlib
import json
import pathlib
import pkgutil
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ops
from pallas_kernels import shapes
from pallas_kernels import workloads
from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import check
from pallas_kernels.bench import peak
from pallas_kernels.bench import report as report_lib
from pallas_kernels.bench import timing
from pallas_kernels.cases import contract
from pallas_kernels.cases import data
from pallas_kernels.cases import setting as setting_lib
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


def make_case(op: str, shape: shapes.Shape = TINY) -> contract.Case:
  module = importlib.import_module(f"pallas_kernels.ops.{op}.case")
  return module.make(setting_lib.Setting(shape=shape))


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
    monkeypatch.setattr(timing, name, 0.0)


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
  start, end = (np.asarray(x) for x in data.ranges(whole, "causal"))
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
    (("sparse_mla", "--keys=1000000000000"), "S=1000000000000 must be"),
    (("sparse_mla", "--checked=0"), "--checked=0 must be"),
    (("sparse_mla", "--seed=-1"), "--seed=-1 must be"),
    (("sparse_mla", "--seed=4294967296"), "--seed=4294967296 must be"),
    (("sparse_mla", "--union=nan"), "--union=nan must be"),
    (("sparse_mla", "--union=inf"), "--union=inf must be"),
    (("sparse_mla", "--json=/nowhere/a.json"), "--json=/nowhere/a.json is not"),
    (("sparse_mla", "--topology=v5p:0x0x0"), "cannot be compiled for"),
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

  cotangents = case.cotangents(jax.random.key(1))
  rows = np.arange(TINY.T)
  with mock.patch.dict(sparse_mla.IMPLEMENTATIONS, {"chunked_xla": wrong}):
    findings = check.check(case, "chunked_xla", rows, cotangents)
  assert {x.name for x in findings if not x.right} == {f"d {name}"}


@pytest.mark.slow
def test_a_sample_checks_what_the_whole_does():
  """Cotangents outside it are zero, so that d kv is that of the sample."""
  case = make_case("sparse_mla")
  cotangents = case.cotangents(jax.random.key(1))
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
  setting = setting_lib.Setting(shape=TINY, order=order)
  indices = np.asarray(data.chosen(setting))[0]
  assert not ((indices[1] >= 0) & (indices[1] < TINY.S)).any()
  for row in indices[3:]:
    assert len(set(row.tolist())) == TINY.K
    assert 0 <= row.min() <= TINY.S - TINY.K
    assert TINY.K - 1 <= row.max() <= TINY.S - 1
  ascending = (np.diff(indices[3:]) > 0).all()
  assert ascending == (order == "ascending")


def test_the_benchmark_knows_no_op_by_name():
  names = {
    x.name
    for room in (ops, workloads)
    for x in pkgutil.iter_modules(room.__path__)
  }
  assert {"sparse_mla", "attention"} <= names
  files = [*pathlib.Path(bench.__file__).parent.rglob("*.py")]
  assert len(files) > 5
  for file in files:
    named = [x for x in names if x in file.read_text(encoding="utf-8")]
    assert not named, file


DOUBLING = """
from pallas_kernels import dispatch
from pallas_kernels.cases import contract, data, tolerance

def make(setting):
  q, _ = data.latents(setting)

  def call(q, *, implementation):
    implementations = {
      "reference": lambda q: q + q, "chunked_xla": lambda q: 2 * q
    }
    return dispatch.call("doubling", implementations, implementation, q)

  return contract.Case(
    op="doubling",
    call=call,
    inputs={"q": q},
    differentiated=1,
    shared=(),
    outputs={"twice": tolerance.OUT},
    flops=q.size,
    flops_backward=q.size,
    bytes_per_query=8 * q.size,
    kernels={},
  )
"""


@pytest.fixture
def made_up_op(monkeypatch, tmp_path):
  """An op whose folder was added to those of the package."""
  folder = tmp_path / "doubling"
  folder.mkdir()
  (folder / "__init__.py").touch()
  (folder / "case.py").write_text(DOUBLING, encoding="utf-8")
  (tmp_path / "no_case").mkdir()
  (tmp_path / "no_case" / "__init__.py").touch()
  monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
  yield
  for name in [*sys.modules]:
    if name.startswith(
      ("pallas_kernels.ops.doubling", "pallas_kernels.ops.no")
    ):
      del sys.modules[name]


@pytest.mark.usefixtures("made_up_op")
def test_an_op_with_a_case_is_run():
  values = run_main("doubling", "--implementation=reference")
  assert [x["name"] for x in values["checks"]] == ["twice"] * 2
  assert [x["what"] for x in values["times"]] == ["doubling forward"] * 2
  by = [x["implementations"]["doubling"] for x in values["times"]]
  assert by == [["reference"], ["chunked_xla"]]


@pytest.mark.usefixtures("made_up_op")
def test_help_lists_what_has_a_case(capsys):
  with pytest.raises(SystemExit):
    bench.main(["--help"])
  shown = capsys.readouterr().out
  assert "doubling" in shown and "crossover" in shown
  assert "no_case" not in shown and "grouped_matmul" not in shown


@pytest.mark.parametrize(
  "wrong, message",
  [("flops", "is autotuning off?"), ("bytes", "was its data in a cache?")],
)
def test_a_peak_below_what_is_reached_is_none(
  monkeypatch, capsys, tmp_path, wrong, message
):
  peaks = peak.measure()
  for name, x in peaks._asdict().items():
    x.rate = 1e15 if name == wrong else 1e30
  monkeypatch.setattr(peak, "measure", lambda: peaks)
  report = report_lib.Report()
  small, large = jnp.zeros(1), jnp.zeros(1 << 20)

  def time(array, flops):
    report.time("negative", jnp.negative, (array,), flops)
    report.write(tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

  before = time(small, 1)
  assert before["peak"][wrong] == 1e15
  assert before["times"][0]["floor_seconds"] > 0
  assert message not in capsys.readouterr().out
  peaks[wrong == "bytes"].rate = 1e3
  for _ in range(2):
    after = time(large, 1 << 20)
  assert after["peak"] == {"flops": 1e30, "bytes": 1e30} | {wrong: None}
  assert [x["floor_seconds"] for x in after["times"]] == [None] * 3
  assert capsys.readouterr().out.count(message) == 1
