"""Whatever is asked of an engine and whenever, all of it comes, and is right.

Requests of every kind come to engines of many sizes while others run; some are
cancelled, and weights change. What each token, log-prob and expert must be is
known, see `fake_device`.
"""

import collections
import contextlib
import functools
import itertools

from flax import nnx
import jax
import jaxtyping
import numpy as np
import pytest

import dsa_jax
from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine import handle as handle_lib
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import Result
from dsa_jax.engine.request import SamplingParams
from dsa_jax.engine.request import seeds as seeds_of
from tests.engine import fake_device

TOKENIZER = tokenizer_lib.ByteTokenizer()
LONGEST = 36
ROUNDS = 30  # in each of which requests may come
# Of all of these, some must have been.
SEEN = (
  "stop",
  "length",
  "cancelled",
  "preempted",
  "preempted early",
  "shared",
  "drafts accepted",
  "drafts refused",
  "swaps with trunks",
  "of two versions",
  "selected",
  "prompt log-probs",
)


@functools.cache
def model() -> dsa_jax.Transformer:
  """Its config is read, and no more."""
  make = lambda: dsa_jax.Transformer(fake_device.CONFIG, rngs=nnx.Rngs(0))
  return nnx.eval_shape(make)


def make(seed: int, rng: np.random.Generator, groups: int) -> dsa_jax.Engine:
  """An engine of random sizes; every other one is short of pages, and slow, so
  that many lose theirs before their prompts are cached."""
  short = seed % 2 == 1
  page = int(rng.choice([1, 2, 4, 5]))
  pages = -(-int(LONGEST * (rng.choice([1, 1.5, 2]) if short else 3)) // page)
  return dsa_jax.Engine(
    model(),
    slots=groups * int(rng.integers(1, 6)),
    pool_tokens=groups * page * pages,
    page=page,
    chunk=1 if short else int(rng.choice([1, 3, 5, 16])),
    lanes=1 if short else int(rng.integers(1, 4)),
    steps=int(rng.choice([1, 2] if short else [1, 2, 5])),
    max_length=LONGEST,
    speculate=seed % 4 < 2,
    returns=("experts", "selected") if seed % 5 == 3 else ("experts",),
    tokenizer=TOKENIZER,
  )


def make_request(rng: np.random.Generator, beginnings: np.ndarray) -> Request:
  """It begins like others, as a rule."""
  vocab = fake_device.CONFIG.vocab_size
  prompt = np.append(
    rng.choice(beginnings)[: rng.choice([0, 9, 30])],
    rng.integers(0, vocab, rng.choice([1, 3, 20])),
  )[: rng.integers(1, LONGEST)]
  stops = ("\1", "\2\3", "\4\5\6") if rng.random() < 0.3 else ()
  most = min(int(rng.choice([1, 4, 20])), LONGEST - len(prompt))
  params = SamplingParams(
    max_tokens=int(rng.integers(1, most + 1)),
    seed=int(rng.integers(1000)),
    n=int(rng.choice([1, 1, 2, 4, 9])),
    stop_ids=tuple(map(int, rng.choice(vocab, rng.choice([0, 0, 2])))),
    stop=stops,
    prompt_log_probs=bool(rng.random() < 0.2),
  )
  return Request(prompt, params)


class Client:
  """Who asked for something, and reads a sample of it as it comes."""

  def __init__(self, engine: dsa_jax.Engine, request: Request, sample: int):
    self.handle = engine.submit(request)
    self.request = request
    self.sample = sample
    self.stream = self.handle.stream(sample)
    self.pieces: list[handle_lib.Delta] = []

  def read(self) -> None:
    """Reads the next piece, if there is one more."""
    self.pieces += itertools.islice(self.stream, 1)

  def check(self, versions: int) -> list[Result]:
    """Checks all that came, from weights of so many versions; returns it."""
    results = self.handle.results()
    params = self.request.params
    assert len(results) == params.n
    for result, seed in zip(results, seeds_of(params)):
      check_end(result, params)
      check_values(result, params, seed, versions)
    tokens = [token for piece in self.pieces for token in piece.tokens]
    assert tokens == results[self.sample].tokens.tolist()
    text = "".join(piece.text for piece in self.pieces)
    assert text == results[self.sample].text
    return results


def check_end(result: Result, params: SamplingParams) -> None:
  """A sample has ended where it had to, and its text before a stop."""
  ids = result.tokens.tolist()
  ended, text = "length" if len(ids) == params.max_tokens else None, ""
  for i, token in enumerate(ids):
    if token not in params.stop_ids:
      text += TOKENIZER.decode([token])
    found = [stop for stop in params.stop if text.endswith(stop)]
    if token in params.stop_ids or found:
      assert i == len(ids) - 1
      ended = "stop"
      if token not in params.stop_ids:
        text = text.removesuffix(max(found, key=len))
  assert result.finish == (ended or "cancelled")
  assert result.text == text


def check_values(
  result: Result, params: SamplingParams, seed: int, versions: int
) -> None:
  """All that a sample holds is what the weights make of its tokens."""
  P, T = len(result.prompt), len(result.tokens)
  whole = np.append(result.prompt, result.tokens)
  # Of each version of the weights, and of those that gave each token.
  rows_VS = np.array([fake_device.rows(whole, v) for v in range(versions)])
  rows_T = rows_VS[result.versions, np.arange(P - 1, P - 1 + T)]
  assert (np.diff(result.versions) >= 0).all()
  np.testing.assert_array_equal(
    result.tokens, fake_device.sampled(rows_T, seed, np.arange(P, P + T))
  )
  for of_result, of_row in (
    (result.log_probs, fake_device.log_probs),
    (result.untruncated, fake_device.untruncated),
  ):
    np.testing.assert_array_equal(of_result, of_row(rows_T, result.tokens))
  if result.finish == "cancelled":
    assert result.experts is None and result.prompt_log_probs is None
    return
  # The prompt's are those of the weights that cached it last.
  rows_S = np.append(rows_VS[result.versions[-1], : P - 1], rows_T)
  np.testing.assert_array_equal(result.experts, fake_device.experts(rows_S))
  if result.selected is not None:
    of_prompt, of_sampled = np.split(result.selected, [P - 1])
    wanted_VPLK = fake_device.selected(rows_VS[:, : P - 1])
    assert (of_prompt == wanted_VPLK).all((2, 3)).any(0).all()
    np.testing.assert_array_equal(of_sampled, fake_device.selected(rows_T))
  assert (result.prompt_log_probs is not None) == params.prompt_log_probs
  if result.prompt_log_probs is not None:
    wanted_VP = fake_device.log_probs(rows_VS[:, : P - 1], whole[1:P])
    assert (result.prompt_log_probs == wanted_VP).any(0).all()


def swap(engine: dsa_jax.Engine) -> None:
  """Gives an engine other weights."""
  version = engine.version + 1
  engine.swap_weights(fake_device.params(version), version)


def run(seed: int, seen: collections.Counter) -> None:
  """Asks an engine for many things, and checks all that comes."""
  rng = np.random.default_rng(seed)
  groups, swaps = 1 + seed % 3, rng.random() < 0.7
  with contextlib.ExitStack() as stack:
    if groups > 1:
      stack.enter_context(jax.set_mesh(dsa_jax.make_mesh(data=groups)))
    engine = make(seed, rng, groups)
  clients: list[Client] = []
  beginnings = rng.integers(0, fake_device.CONFIG.vocab_size, (3, 30))
  for _ in range(ROUNDS):
    for _ in range(rng.choice([0, 0, 1, 2])):
      request = make_request(rng, beginnings)
      sample = int(rng.integers(request.params.n))
      clients.append(Client(engine, request, sample))
    disturb(engine, clients, rng, swaps, seen)
  for pieces in itertools.zip_longest(*(client.stream for client in clients)):
    for client, piece in zip(clients, pieces):
      if piece is not None:
        client.pieces.append(piece)
  results = [r for c in clients for r in c.check(engine.version + 1)]
  check_nothing_is_left(engine, results)
  count(engine, results, seen)


def disturb(engine, clients: list[Client], rng, swaps: bool, seen) -> None:
  """Cancels, takes a slot, swaps weights, or none of it; and lets the engine
  take a step, or one of those who read as many as it needs."""
  running = [client for client in clients if not client.handle.done]
  any_of_them = lambda: running[rng.integers(len(running))]
  if running and rng.random() < 0.15:
    any_of_them().handle.cancel()
  # As if another needed its pages, which happens at such a time, but rarely.
  scheduler = engine._scheduler
  prefilling = [s for s in scheduler.placed if s is not None and s.prefills]
  if prefilling and rng.random() < 0.4:
    scheduler.preempt(prefilling[rng.integers(len(prefilling))])
    seen["preempted early"] += 1
  if swaps and rng.random() < 0.2:
    held = any(s.prompt.trunks for s in scheduler.waiting)
    seen["swaps with trunks"] += held
    swap(engine)
  if running and rng.random() < 0.2:
    any_of_them().read()
  else:
    engine.step()


def check_nothing_is_left(engine: dsa_jax.Engine, results: list[Result]):
  """All slots and pages are free, and no call waits to be read."""
  assert not engine.step()
  assert not engine._results._calls
  stats = engine.stats
  assert stats.waiting == stats.running == 0
  pages = engine._scheduler._pages
  assert stats.free_pages == sum(p.count for p in pages)
  assert not any(any(p._holders) for p in pages)
  assert stats.finished == len(results)
  assert stats.decoded_tokens == sum(len(r.tokens) for r in results)
  assert stats.preemptions == sum(r.preemptions for r in results)


def count(engine, results, seen: collections.Counter) -> None:
  """Notes what an engine has seen."""
  stats = engine.stats
  seen.update(result.finish for result in results)
  seen["preempted"] += stats.preemptions
  seen["shared"] += stats.found_tokens
  seen["drafts accepted"] += stats.accepted
  seen["drafts refused"] += stats.drafts - stats.accepted
  seen["of two versions"] += sum(len(set(r.versions)) > 1 for r in results)
  seen["selected"] += sum(r.selected is not None for r in results)
  seen["prompt log-probs"] += sum(
    r.prompt_log_probs is not None for r in results
  )


@pytest.fixture(autouse=True)
def quick():
  """Shapes are checked by other tests; here, it would take most of the time."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  "first", [12, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 24, 36))]
)
def test_all_that_is_asked_for_comes_and_is_right(first, monkeypatch):
  fake_device.install(monkeypatch)
  seen: collections.Counter[str] = collections.Counter()
  for seed in range(first, first + 12):
    try:
      run(seed, seen)
    except Exception as e:
      e.add_note(f"{seed=}")
      raise
  assert not [name for name in SEEN if not seen[name]], seen


def test_where_objects_lie_changes_nothing(monkeypatch):
  """Else, the processes of a mesh would tell their devices different things."""
  fake_device.install(monkeypatch)
  engines = []  # which stay, so that the next one's objects lie elsewhere
  for _ in range(6):
    engine = dsa_jax.Engine(model(), slots=5, pool_tokens=256, page=4)
    for token in range(5):
      params = SamplingParams(max_tokens=1, seed=0, n=8)
      engine.submit(Request([token] * (10 + token), params))
    engine.step()
    engine.step()
    waiting = engine._scheduler.waiting
    assert len({s.prompt for s in waiting if s.prompt.trunks}) > 2
    swap(engine)
    while engine.step():
      pass
    engines.append(engine)
  assert len({engine._pool.digest for engine in engines}) == 1
