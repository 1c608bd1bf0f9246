"""What the benchmark checks on the device: right passes, and wrong is found."""

import json

import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax.engine import state
from dsa_jax.engine.bench import check
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import rows as rows_lib
from tests.engine.bench import command_line

CHECK = ["--slots=3", "--lengths=256", "--prompt=150", "--tokens=6"]
CHECK += ["--chunk=64", "--steps=4", "--speculate"]


@pytest.mark.slow
def test_what_is_right_passes_the_checks(monkeypatch, capsys):
  rows = command_line.run(monkeypatch, capsys, "check", *CHECK)
  company, pool = rows[:8], rows[8:]
  assert all(x["same"] and x["tokens"] == 6 for x in company)
  assert not any(x["cached_or_lost"] for x in company)
  assert [x["prompt"] for x in company][::7] == [5, 150]
  assert {x["temperature"] for x in company} == {0, 0.3, 0.7, 1}
  assert [x["slot"] for x in pool] == [0, 1, 2]
  for x in pool:
    assert x["right"] and x["same_keys"] == 1
    assert x["rms_over_deviation"] < 1e-4 < 0.5 < x["of_the_next_slot"]


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
  assert not [x for x in rows if x.get("what") == "big pool"]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_key_in_a_wrong_place_is_found(monkeypatch):
  one_slot = check._one_slot
  # As if the large pool's pages were read in another order.
  monkeypatch.setattr(
    check, "_one_slot", lambda pool, pages: one_slot(pool, pages[::-1])
  )
  with pytest.raises(rows_lib.Wrong, match=r"slots \[0, 1, 2\] are not"):
    check.big_pool(
      models.make_model(config_lib.tiny()), 3, 256, command_line.DRAFTS
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", ["logits", "keys"])
def test_slots_that_are_alike_prove_nothing(monkeypatch, what):
  step = check._step

  def alike(graphdef, params, pool, pages, tokens, offset):
    """The first slot's logits, or keys, in all."""
    first = np.zeros(len(pages), int)
    logits, keys, pool = step(graphdef, params, pool, pages, tokens, offset)
    if what == "logits":
      return logits[first], keys, pool
    return logits, keys[:, first], pool

  monkeypatch.setattr(check, "_step", alike)
  with pytest.raises(rows_lib.Wrong, match=r"slots \[0, 1, 2\] are not"):
    check.big_pool(
      models.make_model(config_lib.tiny()), 3, 256, command_line.DRAFTS
    )


@pytest.mark.slow
def test_a_prompt_that_was_found_in_the_cache_proves_nothing(
  monkeypatch, capsys
):
  monkeypatch.setattr(dsa_jax.Engine, "swap_weights", lambda *_: None)
  said = command_line.failed(monkeypatch, capsys, "check", *CHECK)
  assert "requests [7] of 8" in said and "not computed whole and once" in said
