"""What the benchmark checks on the device: right passes, and wrong is found."""

import json

import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax.engine import state
from dsa_jax.engine.bench import check
from dsa_jax.engine.bench import rows as rows_lib
from tests.engine.bench import command_line

CHECK = ["--slots=3", "--lengths=256", "--prompt=150", "--tokens=6"]
CHECK += ["--chunk=64", "--steps=4", "--speculate"]


@pytest.mark.slow
def test_what_is_right_passes_the_checks(monkeypatch, capsys):
  rows = command_line.run(monkeypatch, capsys, "check", *CHECK)
  company, layers, stored = rows[:8], rows[8:-3], rows[-3:]
  assert all(x["same"] and x["tokens"] == 6 for x in company)
  assert not any(x["cached_or_lost"] for x in company)
  assert [x["prompt"] for x in company][::7] == [5, 150]
  assert {x["temperature"] for x in company} == {0, 0.3, 0.7, 1}
  cfg = config_lib.tiny()
  assert [x["layer"] for x in layers] == [*range(cfg.num_layers + 1)]
  for x in layers:
    assert x["right"] and x["compared"] == [0, 1, 2]
    assert x["same_keys"] == 1 and x["same_keys_of_next_slot"] < 0.5
    assert x["rms"] < 1e-5 < 0.5 < x["rms_of_next_slot"]
  assert [x["slot"] for x in stored] == [0, 1, 2]
  assert all(x["same"] for x in stored)


@pytest.mark.slow
def test_a_sample_that_depends_on_its_slot_is_found(monkeypatch, capsys):
  write = state.write

  def wrong(slots, slot, sequence):
    write(slots, slot, sequence)
    slots.how.seed[slot] += slot

  monkeypatch.setattr(state, "write", wrong)
  said = command_line.failed(monkeypatch, capsys, "check", *CHECK)
  assert "other tokens or log-probs in company than alone" in said
  rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert not [x for x in rows if x.get("what") == "large pool"]


def large_pool():
  check.large_pool(config_lib.tiny(), 3, 256, command_line.DRAFTS)


def test_a_page_in_a_wrong_place_is_found(monkeypatch):
  one_slot = check._one_slot
  # As if the large pool's pages were read in another order.
  monkeypatch.setattr(
    check, "_one_slot", lambda pool, pages: one_slot(pool, pages[::-1])
  )
  layers = "layer 0, .*, layer 4, the rows of slot 0"
  with pytest.raises(rows_lib.Wrong, match=layers):
    large_pool()


def in_company(monkeypatch, change):
  """Lets `change` have what layers give for more than one slot."""
  layer = check._layer

  def changed(cfg, pool, l, pages, *arguments):
    given = layer(cfg, pool, l, pages, *arguments)
    return change(*given, l, pages) if len(pages) > 1 else given

  monkeypatch.setattr(check, "_layer", changed)


@pytest.mark.parametrize("what", ["result", "keys"])
def test_slots_that_are_alike_prove_nothing(monkeypatch, what):
  def first_in_all(pool, keys, out, l, pages):
    first = np.zeros(len(pages), int) if l == 2 else np.arange(len(pages))
    if what == "result":
      return pool, keys, out[first]
    return pool, keys[first], out

  in_company(monkeypatch, first_in_all)
  with pytest.raises(rows_lib.Wrong, match="tokens: layer 2: not what"):
    large_pool()


def test_a_row_that_is_lost_after_it_was_read_is_found(monkeypatch):
  def lose(pool, keys, out, l, pages):
    """Of the first layer, whose pages are the first."""
    if l == 3:
      pool = jax.tree.map(lambda x: x.at[pages[1, 0]].set(0), pool)
    return pool, keys, out

  in_company(monkeypatch, lose)
  with pytest.raises(rows_lib.Wrong, match="tokens: the rows of slot 1: not"):
    large_pool()


@pytest.mark.slow
def test_a_prompt_that_was_found_in_the_cache_proves_nothing(
  monkeypatch, capsys
):
  monkeypatch.setattr(dsa_jax.Engine, "swap_weights", lambda *_: None)
  said = command_line.failed(monkeypatch, capsys, "check", *CHECK)
  assert "requests [7] of 8" in said and "not computed whole and once" in said
