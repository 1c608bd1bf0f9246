"""Modes that time a whole engine, and the decoding program alone."""

import dataclasses
import time
from typing import Any, Final

import jax
import numpy as np

import dsa_jax
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import pools
from dsa_jax.engine.bench import rows

_CALLS: Final = 20  # that `host` looks at


def decode(args) -> None:
  """Times the decoding program on a pool of random rows."""
  longest = max(args.lengths)
  pools.check_lengths(args, pools.most_fed(args))
  model = models.make_model(models.config_of(args))
  for slots in args.slots:
    program = pools.Decoding(model, slots, longest, args, args.attention)
    rows.say(
      mode="decode",
      slots=slots,
      longest=longest,
      temporaries_mb=round(program.memory.temp_size_in_bytes / 1e6, 1),
      aliased_mb=round(program.memory.alias_size_in_bytes / 1e6, 1),
      pool_mb=round(program.pool_bytes / 1e6, 1),
    )
    for length in args.lengths:
      program.end_at(length)
      seconds = rows.timed(program)
      sampled = int((np.asarray(program().tokens) >= 0).sum())
      rows.say(
        mode="decode",
        attention=args.attention,
        slots=slots,
        length=length,
        ms_a_step=round(seconds / args.steps * 1e3, 3),
        tokens_a_step=round(sampled / (args.steps * slots), 2),
      )
    del program  # and its pool, before the next one is made


def prefill(args) -> None:
  """Times whole prompts, cached in chunks."""
  model = models.make_model(models.config_of(args))
  for length in args.lengths:
    engine = dsa_jax.Engine(
      model,
      slots=1,
      pool_tokens=length + 2 * pools.PAGE,
      chunk=args.chunk,
      steps=1,
      attention=args.attention,
      **pools.dtypes(args),
    )
    rng, seconds = np.random.default_rng(0), []
    for _ in range(4):
      prompt = rng.integers(0, model.config.vocab_size, length)
      begin = time.perf_counter()
      engine.generate([prompt], dsa_jax.SamplingParams(max_tokens=1))
      seconds.append(time.perf_counter() - begin)
    rows.say(
      mode="prefill",
      attention=args.attention,
      length=length,
      chunk=args.chunk,
      ms=round(sorted(seconds[1:])[1] * 1e3, 1),
    )


def group(args) -> None:
  """First tokens of a group, and of as many prompts that share nothing."""
  model = models.make_model(models.config_of(args))
  samples, length = 8, args.lengths[-1]
  engine = dsa_jax.Engine(
    model,
    slots=samples,
    pool_tokens=2 * samples * (length + 2 * pools.PAGE),
    chunk=args.chunk,
    steps=1,
    **pools.dtypes(args),
  )
  engine.warm_up()
  rng = np.random.default_rng(0)
  one = dsa_jax.SamplingParams(max_tokens=1, n=1)
  seconds: dict[str, list[float]] = {"together": [], "apart": []}
  for _ in range(3):
    for name, prompts, n in (("together", 1, samples), ("apart", samples, 1)):
      tokens = rng.integers(0, model.config.vocab_size, (prompts, length))
      begin = time.perf_counter()
      engine.generate(list(tokens), dataclasses.replace(one, n=n))
      seconds[name].append(time.perf_counter() - begin)
  medians = {name: sorted(x)[1] for name, x in seconds.items()}
  rows.say(
    mode="group",
    length=length,
    **{f"{name}_s": round(x, 4) for name, x in medians.items()},
    times=round(medians["apart"] / medians["together"], 2),
  )


def load(args) -> None:
  """Prompts of one length; tokens of a sample are log-normal, or all alike."""
  if not 0 <= args.sigma <= 4:
    raise ValueError(f"--sigma={args.sigma} is not from 0 to 4.")
  cfg, rng = models.config_of(args), np.random.default_rng(0)
  slots, n, shape = args.slots[-1], args.samples, (args.prompts, args.prompt)
  prompts = rng.integers(0, cfg.vocab_size, shape)
  lengths = np.exp(rng.normal(0, args.sigma, args.prompts * n))
  lengths = np.maximum(lengths * args.mean / lengths.mean(), 1).astype(int)
  if lengths.max() > args.longest:
    raise ValueError(
      f"--longest={args.longest}: a sample of {lengths.max()} tokens is drawn; "
      "give more."
    )
  longest = args.prompt + args.longest
  engine = dsa_jax.Engine(
    models.make_model(cfg),
    slots=slots,
    pool_tokens=slots * (-(-longest // pools.PAGE) + 1) * pools.PAGE,
    max_length=longest,
    chunk=args.chunk,
    lanes=args.lanes,
    steps=args.steps,
    **pools.dtypes(args),
  )
  engine.warm_up()
  params = [
    dsa_jax.SamplingParams(max_tokens=int(T), seed=i)
    for i, T in enumerate(lengths)
  ]
  begin = time.perf_counter()
  engine.generate(list(prompts.repeat(n, 0)), params)
  seconds = time.perf_counter() - begin
  rows.say(
    mode="load",
    slots=slots,
    tokens=int(lengths.sum()),
    longest_over_mean=round(float(lengths.max() / lengths.mean()), 2),
    seconds=round(seconds, 2),
    tokens_a_second=round(float(lengths.sum() / seconds), 1),
    calls=engine.stats.calls,
    found=engine.stats.found_tokens,
  )


class _Watched(dsa_jax.Engine):
  """Counts the calls of `decode` that came when the device had nothing left."""

  late = 0
  given: Any = None  # of the last one

  def fill(self, tokens: int) -> None:
    """Caches so many tokens of prompts before anyone decodes."""
    while self.stats.prefill_tokens < tokens:
      self._fill_slots()

  def _run_decode(self, stays, hurries):
    self.late += self.given is not None and self.given.tokens.is_ready()
    self.given = super()._run_decode(stays, hurries)
    return self.given


def host(args) -> None:
  """Work of the host while all slots decode, and nobody waits for one."""
  slots, length = args.slots[-1], args.lengths[-1]
  fed = (2 * _CALLS + 8) * args.steps  # the most while it is looked at
  pools.check_lengths(args, fed)
  cfg = models.config_of(args)
  engine = _Watched(
    models.make_model(cfg),
    slots=slots,
    pool_tokens=slots * (length + 2 * pools.PAGE),
    max_length=length,
    chunk=args.chunk,
    steps=args.steps,
    **pools.dtypes(args),
  )
  params = dsa_jax.SamplingParams(max_tokens=fed)
  shape = slots, length - params.max_tokens
  prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, shape)
  for prompt in prompts:
    engine.submit(dsa_jax.Request(prompt, params))
  engine.fill(prompts.size - slots)  # the last of each comes with a step
  for _ in range(2):
    engine.step()
  engine.late, begin = 0, time.perf_counter()
  for _ in range(_CALLS):
    engine.step()
  seconds, late = time.perf_counter() - begin, engine.late
  work = []
  for _ in range(_CALLS):
    jax.block_until_ready(engine.given)  # so that the host waits for nothing
    begin = time.perf_counter()
    engine.step()
    work.append(time.perf_counter() - begin)
  rows.say(
    mode="host",
    slots=slots,
    length=length,
    ms_a_call=round(seconds / _CALLS * 1e3, 2),
    ms_of_the_host=round(sorted(work)[_CALLS // 2] * 1e3, 2),
    late=f"{late} of {_CALLS} calls",
  )
