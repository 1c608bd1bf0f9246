"""The engine's benchmark, whole, on a model that a CPU can do."""

import dataclasses
import itertools
import json
import sys
import types
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax.engine import programs
from dsa_jax.engine.bench import __main__ as bench
from dsa_jax.engine.bench import attention
from dsa_jax.engine.bench import engines
from dsa_jax.engine.bench import floors
from dsa_jax.engine.bench import kernel_times
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import positions
from pallas_kernels import crossover
from pallas_kernels import dispatch
from pallas_kernels.bench import peak
from tests.engine.bench import command_line


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  "more",
  [[], ["--speculate"], ["--index-key-dtype=float8_e4m3fn"]],
  ids=["", "drafts", "8 bits"],
)
def test_steps_are_timed_at_each_length(monkeypatch, capsys, more):
  lengths = ["--lengths", "128", "384", "--slots", "2", "--steps=2"]
  pool, short, long = command_line.run(
    monkeypatch, capsys, "decode", *lengths, *more
  )
  assert (short["length"], long["length"]) == (128, 384)
  for row in short, long:
    assert row["ms_a_step"] > 0
    if "--speculate" in more:  # of a model with random weights, few are right
      assert 1 <= row["tokens_a_step"] <= 2
    else:
      assert row["tokens_a_step"] == 1
  # Slots, tokens, layers and bytes: of latents, rotated and index keys.
  layers, keys = 5 if "--speculate" in more else 4, 4 * (32 + 16)
  keys += 32 + 4 if "--index-key-dtype=float8_e4m3fn" in more else 4 * 32
  assert pool["pool_mb"] == round(2 * 384 * layers * keys / 1e6, 1)
  assert pool["aliased_mb"] >= pool["pool_mb"]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_programs_are_where_they_are_told_to_be():
  model = models.make_model(command_line.TINY)
  decoding = pools.Decoding(model, 2, 384, command_line.ARGS, "sparse")
  for length in (384, 128, 128):  # calls do not move on
    decoding.end_at(length)
    assert (np.asarray(decoding().tokens) >= 0).sum() == 2 * 2
    assert list(np.asarray(decoding._slots.length)) == [length, length]
  prefilling = pools.Prefilling(model, 256, command_line.ARGS, "sparse")
  before = np.array(prefilling._pool.kv)
  prefilling.begin_at(120)
  after = np.asarray(prefilling().kv)
  pages = len(after) // command_line.TINY.num_layers
  written = (
    (before != after).any(-1).reshape(command_line.TINY.num_layers, pages, -1)
  )
  # 8 rows at the end of the sequence's first page, 8 in its second one.
  first, second, *others = prefilling._chunk.pages[0]
  assert written[:, first, 120:].all() and not written[:, first, :120].any()
  assert written[:, second, :8].all() and not written[:, second, 8:].any()
  assert not written[:, others].any()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_positions_are_timed_and_drawn(monkeypatch, capsys, tmp_path):
  file, png = tmp_path / "out.json", tmp_path / "out.png"
  options = ["--lengths", "64", "128", "256", "--slots", "2", "--steps=2"]
  options += ["--chunk=16", "--bandwidth=1e-5", f"--json={file}"]
  peaks, *rows = command_line.run(monkeypatch, capsys, "positions", *options)
  rows, (decode, prefill) = rows[:-2], rows[-2:]
  assert peaks["top_k"] == command_line.TINY.top_k
  assert [
    (row["attention"], row["phase"], row["slots"], row["position"])
    for row in rows
  ] == [
    (way, *phase, position)
    for way in ("sparse", "dense")
    for phase in (("decode", 2), ("prefill", 1))
    for position in (64, 128, 256)
  ]
  for row in rows:
    assert row["us_a_token"] > 0 and row["bound"] == "bytes"
    assert row["share"] == pytest.approx(
      row["floor_us"] / row["us_a_token"], abs=6e-4
    )
    # At 10 MB/s the floor is all that counts, far above what XLA takes.
    B, T, offsets = 2, 1, [row["position"] - 2, row["position"] - 1]
    if row["phase"] == "prefill":
      B, T, offsets = 1, 16, [row["position"]]
    least = [
      _bytes(command_line.TINY, row["attention"], B, T, cached, samples=T == 1)
      for cached in offsets
    ]
    per_token = np.mean(least) / (B * T) / 1e7 * 1e6
    assert row["floor_us"] == pytest.approx(per_token, rel=1e-6)
  found = json.loads(file.read_text())
  assert found["rows"] == rows
  assert found["summary"] == [decode, prefill]
  assert decode["sparse_slope"] is not None and decode["slots"] == 2
  _draw(monkeypatch, [file], png)
  assert png.stat().st_size > 10_000


def _draw(monkeypatch, files, png):
  """Without --model, which that mode has not."""
  argv = ["bench", "picture", *map(str, files), f"--out={png}"]
  monkeypatch.setattr(sys, "argv", argv)
  bench.main()


KEYS = "kv_a_DX", "k_DI"  # weights that the last layer needs to be cached


def _bytes(cfg, way, B, T, cached, *, samples) -> float:
  """The least of a pass, from the arrays of a model and of a pool."""
  shapes = nnx.state(
    nnx.eval_shape(lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0)))
  )
  total = 0.0
  for path, x in jax.tree.leaves_with_path(shapes):
    name = jax.tree_util.keystr(path)
    part = 1.0
    if "scale_" in name or "bias_" in name or "embed" in path[0].key:
      part = 0.0
    elif "head" in path[0].key:
      part = float(samples)
    elif "indexer" in name:
      part = float(way == "sparse")
    elif "_EDF" in name or "_EFD" in name:
      part = _distinct(cfg, B * T) / cfg.num_experts
    if not samples and "moe_layers" in name and path[-2].key not in KEYS:
      part *= (cfg.num_moe_layers - 1) / cfg.num_moe_layers
    total += part * x.size
  pool = programs.make_pool(cfg, 1, 1)  # one token's
  read = cached + T if way == "dense" else min(cached + T, cfg.top_k)
  # Absorbed, or expanded: a chunk's dense attention reads the same.
  of_cache = B * read * pool.kv.size
  if way == "sparse":
    of_cache += B * (cached + T) * pool.k_index.values.size
  total += of_cache * (1 if samples else 1 - 1 / cfg.num_layers)
  return 4 * total


def _distinct(cfg, tokens) -> float:
  """Experts that tokens choose, the mean of all ways that they can."""
  J, sets = cfg.experts_per_token, {0: 1.0}  # by mask: how likely
  ways = list(itertools.combinations(range(cfg.num_experts), J))
  for _ in range(tokens):
    new: dict[int, float] = {}
    for mask, share in sets.items():
      for way in ways:
        both = mask | sum(1 << e for e in way)
        new[both] = new.get(both, 0.0) + share / len(ways)
    sets = new
  return sum(mask.bit_count() * share for mask, share in sets.items())


def test_floors_count_flops_as_those_who_choose_a_form_do():
  cfg, T, cached = models.MODELS["wide"](), 3, 5000
  N, seen, stored = cfg.num_heads, 5001 + 5002 + 5003, floors.stored(cfg)
  absorbed = floors.absorbed("dense", cfg, stored, 2, T, cached)
  assert absorbed.flops == 2 * N * seen * crossover._OF_AN_ABSORBED_PAIR
  assert absorbed.bytes == 2 * 5003 * 576 * 2
  expanded = floors.expanded(cfg, stored, 2, T, cached)
  assert expanded.flops == 2 * N * (
    seen * crossover._OF_A_PAIR + cached * crossover._OF_A_KEY
  )
  sparse = floors.absorbed("sparse", cfg, stored, 2, T, cached)
  assert sparse.flops == 2 * N * 3 * 2048 * crossover._OF_AN_ABSORBED_PAIR
  scores = floors.select(cfg, stored, 2, T, cached)
  assert scores == floors.Work(2 * seen * 64 * 128 * 2, 2 * 5003 * 128 * 2)


def test_floors_know_what_the_cache_holds():
  cfg = models.MODELS["wide"]()
  assert floors.stored(cfg) == floors.Stored(1152, 256)
  eight_bits: Any = "float8_e4m3fn"
  assert floors.stored(
    cfg, index_key_dtype=eight_bits, latent_dtype=eight_bits
  ) == floors.Stored(656, 132)
  half = floors.Stored(576, 128)
  assert floors.select(cfg, half, 1, 1, 99).bytes == 100 * 128
  assert floors.absorbed("dense", cfg, half, 1, 1, 99).bytes == 100 * 576
  assert floors.expanded(cfg, half, 1, 1, 99).bytes == 100 * 576


def test_a_pass_takes_the_form_with_fewer_flops():
  cfg = dataclasses.replace(models.MODELS["wide"](), num_layers=1)
  stored = floors.stored(cfg)

  def whole(T, offset):
    return floors.whole(cfg, stored, "dense", 1, T, offset, samples=True).flops

  weights = whole(64, 0) - floors.expanded(cfg, stored, 1, 64, 0).flops
  absorbed = floors.absorbed("dense", cfg, stored, 1, 64, 65536).flops
  expanded = floors.expanded(cfg, stored, 1, 512, 65536).flops
  assert whole(64, 65536) == pytest.approx(weights + absorbed)
  assert whole(512, 65536) == pytest.approx(8 * weights + expanded)


def test_time_is_of_what_takes_longer():
  peaks = peak.Peaks(
    peak.Peak("", "FLOP/s", "", 10.0), peak.Peak("", "B/s", "", 2.0)
  )
  work = floors.Work(10, 1) + floors.Work(40, 4)
  assert (work.seconds(peaks), work.bound(peaks)) == (5.0, "flops")
  work += floors.Work(0, 7)
  assert (work.seconds(peaks), work.bound(peaks)) == (6.0, "bytes")


def test_slopes_and_the_bend_of_known_curves_are_found():
  points = [512, 1024, 1536, 2048, 3072, 4096, 8192, 65536, 131072]
  cost = {
    "dense": lambda x: 100 + 8 * x / 1024,
    # Steeper up to K.
    "sparse": lambda x: 100 + 0.5 * x / 1024 + 6 * min(x, 2048) / 1024,
  }
  rows = [
    dict(
      phase="decode",
      attention=way,
      slots=4,
      position=x,
      us_a_token=cost[way](x),
    )
    for way in cost
    for x in points
  ]
  (row,) = positions.summary(rows, 2048)
  assert (row["phase"], row["slots"]) == ("decode", 4)
  assert row["dense_slope"] == pytest.approx(8)
  assert row["sparse_slope"] == pytest.approx(0.5)
  assert row["dense_over_sparse"] == pytest.approx(16)
  assert row["bend"] == 2048
  (row,) = positions.summary(rows[:3], 2048)
  assert row["dense_slope"] is row["sparse_slope"] is row["bend"] is None


@pytest.mark.slow
def test_a_layers_attention_is_checked_and_timed(monkeypatch, capsys):
  sizes = ["--slots", "3", "--lengths", "128", "256", "--speculate"]
  peaks, *rows = command_line.run(monkeypatch, capsys, "attention", *sizes)
  assert len(peaks["peaks"]) == 2
  for length, part in zip((128, 256), itertools.batched(rows, 5)):
    checked, *ops, ratio = part
    assert {x["length"] for x in part} == {length}
    assert checked["same_keys"] == 1
    assert 0 <= max(checked["sparse_rms"], checked["dense_rms"]) < 1e-5
    us = {x["op"]: x["us"] for x in ops}
    assert list(us) == ["indexer_topk", "sparse_mla", "dense"]
    for x in ops:
      assert x["queries"] == 2 and x["kernels"] == {}
      assert x["share"] == pytest.approx(x["floor_us"] / x["us"], abs=6e-3)
    both = us["indexer_topk"] + us["sparse_mla"]
    assert ratio["dense_over_dsa"] == pytest.approx(us["dense"] / both, 0.01)


@pytest.mark.parametrize(
  "broken, said",
  [
    ("_select", "indexer_topk finds "),
    ("_attend sparse", "sparse attention of a query is "),
    ("_attend dense", "dense attention of a query is "),
  ],
)
def test_a_wrong_layer_is_found(monkeypatch, capsys, broken, said):
  """One query of the last slot, as kernels would have it."""
  name, _, way = broken.partition(" ")
  right = getattr(attention, name)

  def wrong(cfg, pool, pages, offset, q, last):
    out = right(cfg, pool, pages, offset, q, last)
    if not dispatch._allowed.get():
      return out
    if name == "_select":
      return out.at[-1, 0].set(out[-1, 0] - 1)
    if (last is None) == (way == "dense"):
      return out.at[-1, 0].multiply(1.05)
    return out

  monkeypatch.setattr(attention, name, wrong)
  sizes = ["--slots", "2", "--lengths", "128"]
  found = command_line.failed(monkeypatch, capsys, "attention", *sizes)
  assert "2 slots of 128 tokens" in found and said in found


def test_calls_in_a_row_read_keys_that_lie_apart(monkeypatch):
  monkeypatch.setitem(attention._SPREAD, "cpu", 1 << 20)
  layer = attention.Layer(command_line.TINY, 2, 300, 1, command_line.ARGS)
  tables = [np.asarray(x) for x in layer.tables(200)]
  # 1 MB of pages of 128 x 80 x 4 bytes are 26; a table names 4 of them.
  assert layer.pool.kv.shape[0] == 26 and len(tables) == 6
  named = np.concatenate([x[:, :2].reshape(-1) for x in tables])
  assert len(set(named)) == 24 and named.max() < 26


def test_kernels_times_are_those_of_the_gpus_streams():
  event = lambda name, us: types.SimpleNamespace(
    name=name, duration_ns=us * 1e3
  )
  line = lambda name, *events: types.SimpleNamespace(name=name, events=events)
  plane = lambda name, *lines: types.SimpleNamespace(name=name, lines=lines)
  stream = line("Stream #1", event("a", 4), event("b", 10), event("a", 8))
  planes = [
    plane("/host:CPU", line("Stream", event("a", 100))),
    plane("/device:GPU:0", stream, line("XLA Ops", event("a", 100))),
    plane("/device:GPU:1", line("Stream #2", event("b", 20))),
  ]
  found = kernel_times.sums(planes, 2)
  assert list(found.items()) == [("b", 15.0), ("a", 6.0)]


@pytest.mark.slow
def test_prompts_are_timed(monkeypatch, capsys):
  (row,) = command_line.run(
    monkeypatch, capsys, "prefill", "--lengths=100", "--chunk=64"
  )
  assert row["ms"] > 0
  (row,) = command_line.run(
    monkeypatch, capsys, "group", "--lengths=100", "--chunk=64"
  )
  assert row["times"] == pytest.approx(row["apart_s"] / row["together_s"], 0.1)


@pytest.mark.slow
def test_a_load_is_done_whole(monkeypatch, capsys):
  sizes = ["--prompts=3", "--samples=2", "--prompt=9", "--mean=8"]
  sizes += ["--longest=64", "--steps=4", "--chunk=8", "--slots=2"]
  (row,) = command_line.run(monkeypatch, capsys, "load", *sizes)
  # 6 samples of 8 tokens in the mean, each rounded down.
  assert 6 * 7 <= row["tokens"] <= 6 * 8
  assert row["calls"] >= row["tokens"] / (2 * 4)


@pytest.mark.slow
def test_the_host_is_watched_while_all_decode(monkeypatch, capsys):
  calls = []
  for name in ("_run_prefill", "_run_decode"):
    run = getattr(dsa_jax.Engine, name)
    monkeypatch.setattr(
      dsa_jax.Engine,
      name,
      lambda *x, run=run, name=name: (calls.append(name), run(*x))[1],
    )
  sizes = ["--lengths=256", "--slots=2", "--steps=4", "--chunk=8"]
  (row,) = command_line.run(monkeypatch, capsys, "host", *sizes)
  assert 0 < row["ms_of_the_host"]
  assert row["late"].endswith(f" of {engines._CALLS} calls")
  # 63 tokens of each prompt, though steps go on after 32 of all.
  steps = 2 + 2 * engines._CALLS
  assert calls == ["_run_prefill"] * 16 + ["_run_decode"] * steps


@pytest.mark.parametrize(
  "options, said",
  [
    (["decode", "--lengths", "0"], "0 is no whole number above 0"),
    (["decode", "--slots", "²"], "² is no whole number above 0"),
    (
      ["decode", "--lengths", "16"],
      "--lengths 16: decode feeds each sequence 16",
    ),
    (["positions", "--lengths", "9"], "give more than 16"),
    (["attention", "--lengths", "1"], "--lengths 1: attention feeds each"),
    (["positions", "--bandwidth=nan"], "nan is no rate in TB/s"),
    (["positions", "--json=/no/such/file"], "--json=/no/such/file is not in"),
    (
      ["host", "--lengths", "768"],
      "--lengths 768: host feeds each sequence 768",
    ),
    (["group", "--speculate"], "unrecognized arguments: --speculate"),
    (["host", "--attention=dense"], "unrecognized arguments: --attention"),
    (["check", "--slots=1"], "--slots 1: a check compares with another slot"),
    (
      ["check", "--lengths=127"],
      "--lengths 127: of so few tokens, the 64 that are chosen tell no slot",
    ),
    (["load", "--sigma=nan"], "--sigma=nan is not from 0 to 4"),
    (["load", "--longest=100"], "--longest=100: a sample of"),
    (["prefill", "--chunk=70000"], "chunk=70000"),
    (["prefill", "--latent-dtype=float8_e4m3fn"], "kv_rank=32, no multiple"),
  ],
)
def test_what_cannot_be_timed_is_refused(monkeypatch, capsys, options, said):
  with pytest.raises(SystemExit) as e:
    command_line.run(monkeypatch, capsys, *options)
  assert e.value.code == 2
  assert said in capsys.readouterr().err


@pytest.mark.parametrize("mode", sorted({*bench.MODES} - {"picture"}))
def test_a_device_that_is_too_small_is_named(monkeypatch, capsys, mode):
  def full(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(programs, "make_pool", full)
  said = command_line.failed(monkeypatch, capsys, mode)
  assert f"the device's memory is too small for {mode} with " in said
  sizes = {"load": "slots=[32]", "prefill": "lengths=[4096]"}
  assert sizes.get(mode, "lengths=[") in said


def test_other_errors_of_the_device_are_not_hidden(monkeypatch, capsys):
  def broken(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: no")

  monkeypatch.setattr(programs, "make_pool", broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no"):
    command_line.run(monkeypatch, capsys, "attention")


@pytest.mark.parametrize("mode", bench.MODES)
def test_every_mode_teaches_itself(monkeypatch, capsys, mode):
  monkeypatch.setattr(sys, "argv", ["bench", mode, "-h"])
  with pytest.raises(SystemExit) as e:
    bench.main()
  assert e.value.code == 0
  out = capsys.readouterr().out
  example = bench.MODES[mode].example
  assert f"python -m dsa_jax.engine.bench {mode} {example}" in out
  # And the example is one that it takes.
  bench._parser().parse_args([mode, *example.split()])
