"""Times the engine on random weights: `python -m dsa_jax.engine.bench -h`."""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import time
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax.engine import programs
from dsa_jax.engine import state
from dsa_jax.engine import weights

_HELP: Final = """\
modes:
  decode  ms a step for each number of --slots and each of --lengths, on a pool
          of random rows, and the memory of the compiled program
  prefill seconds to cache a prompt of each of --lengths, in chunks
  group   seconds to the last first token of 8 samples of one prompt, as one
          request and as 8 prompts that share nothing
  load    tokens/s of --prompts x --samples with log-normal lengths: by an
          engine, or with --static by batches of `generate`
  host    the share of the engine's time that the device waits for the host

examples:
  python -m dsa_jax.engine.bench decode --slots 1 8 32 --lengths 4096 131072
  python -m dsa_jax.engine.bench load --model=tiny --prompts=16 --samples=4
"""

_WIDE: Final[dict[str, Any]] = dict(
  num_layers=4,
  num_dense_layers=1,
  num_experts=32,
  expert_groups=1,
  groups_per_token=1,
  vocab_size=32768,
  num_mtp_layers=0,
  param_dtype="bfloat16",
)
MODELS: Final = {
  "wide": lambda: dataclasses.replace(config_lib.v32_671b(), **_WIDE),
  "tiny": config_lib.tiny,
}
_PAGE: Final = 128


def make_model(cfg: dsa_jax.ModelConfig) -> dsa_jax.Transformer:
  """Random weights, one array at a time: a program for all takes minutes."""
  graphdef, shapes = nnx.split(
    nnx.eval_shape(lambda: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0)))
  )

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

  def fill(path, x):
    name = jax.tree_util.keystr(path)
    if "scale_" in name or "bias_" in name:
      return jnp.full(x.shape, float("scale_" in name), x.dtype)
    # Not `hash`, which is another one in each process.
    seed = sum(map(ord, name))
    return normal(jax.random.key(seed), x.shape, x.dtype)

  return nnx.merge(graphdef, jax.tree.map_with_path(fill, shapes))


def timed(run: Callable[[], object], times: int = 5) -> float:
  """Median seconds, after a first run that is not counted."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(times):
    begin = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - begin)
  return sorted(seconds)[times // 2]


class Decoding:
  """The decoding program on a pool of random rows, all slots equally long."""

  def __init__(self, model, slots: int, length: int, args):
    graphdef, self._params, _ = weights.prepare(model)
    per_slot = length // _PAGE
    pool = programs.make_pool(model.config, slots * per_slot, _PAGE)
    key = jax.random.key(1)
    self._pool = dataclasses.replace(
      pool,
      kv=_random_rows(key, pool.kv.shape, pool.kv.dtype),
      k_index=_random_rows(key, pool.k_index.shape, pool.k_index.dtype),
    )
    pages = np.random.default_rng(0).permutation(slots * per_slot)
    self._pages = pages.astype(np.int32).reshape(slots, per_slot)
    blank = state.blank(slots)
    blank.how.temperature[:], blank.how.seed[:] = 1, np.arange(slots)
    blank.left[:], blank.live[:] = 2**30, True
    blank.length[:] = length - 1 - 8 * args.steps
    self._slots = jax.tree.map(jnp.asarray, blank)
    kind = programs.Kind(
      attention=args.attention,
      steps=args.steps,
      speculates=False,
      kept=False,
      experts=False,
      selected=False,
    )
    arguments = (self._params, self._pool, self._slots, *self._rest())
    lowered = programs.decode.lower(graphdef, *arguments, kind=kind)
    self._program = lowered.compile()
    self.memory: Any = self._program.memory_analysis()
    self.pool_bytes = sum(x.nbytes for x in jax.tree.leaves(self._pool))

  def _rest(self):
    stays = np.ones(len(self._pages), bool)
    return self._pages, stays, np.asarray(False)

  def __call__(self):
    self._pool, self._slots, given = self._program(
      self._params, self._pool, self._slots, *self._rest()
    )
    return given


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_rows(key, shape, dtype):
  """A page at a time: the generator's own temporaries are small."""
  page = lambda key: jax.random.normal(key, shape[1:], dtype)
  return jax.lax.map(page, jax.random.split(key, shape[0]))


def decode(model, args) -> None:
  for slots in args.slots:
    for length in args.lengths:
      program = Decoding(model, slots, length, args)
      _say(
        mode="decode",
        attention=args.attention,
        slots=slots,
        length=length,
        ms_a_step=round(timed(program) / args.steps * 1e3, 3),
        temporaries_mb=round(program.memory.temp_size_in_bytes / 1e6, 1),
        aliased_mb=round(program.memory.alias_size_in_bytes / 1e6, 1),
        pool_mb=round(program.pool_bytes / 1e6, 1),
      )


def prefill(model, args) -> None:
  for length in args.lengths:
    engine = dsa_jax.Engine(
      model,
      slots=1,
      pool_tokens=length + 2 * _PAGE,
      chunk=args.chunk,
      steps=1,
      attention=args.attention,
    )
    engine.warm_up()
    rng, seconds = np.random.default_rng(0), []
    for _ in range(4):
      prompt = rng.integers(0, model.config.vocab_size, length)
      begin = time.perf_counter()
      engine.generate([prompt], dsa_jax.SamplingParams(max_tokens=1))
      seconds.append(time.perf_counter() - begin)
    _say(
      mode="prefill",
      attention=args.attention,
      length=length,
      chunk=args.chunk,
      ms=round(sorted(seconds[1:])[1] * 1e3, 1),
    )


def group(model, args) -> None:
  """A group's first tokens; the prompts of the others differ in one token."""
  samples, length = 8, args.lengths[-1]
  engine = dsa_jax.Engine(
    model,
    slots=samples,
    pool_tokens=2 * samples * (length + 2 * _PAGE),
    chunk=args.chunk,
    steps=1,
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
  _say(
    mode="group",
    length=length,
    **{f"{name}_s": round(x, 4) for name, x in medians.items()},
    times=round(medians["apart"] / medians["together"], 2),
  )


def load(model, args) -> None:
  """Prompts of one length; tokens of a sample are log-normal, or all alike."""
  rng = np.random.default_rng(0)
  slots, prompt, n = args.slots[-1], args.prompt, args.samples
  prompts = rng.integers(0, model.config.vocab_size, (args.prompts, prompt))
  lengths = np.exp(rng.normal(0, args.sigma, args.prompts * n))
  lengths = np.maximum(lengths * args.mean / lengths.mean(), 1).astype(int)
  run = _static if args.static else _continuous
  run(model, args, slots, prompts[:1].repeat(slots, 0), lengths[:slots] * 0 + 4)
  begin = time.perf_counter()
  stats = run(model, args, slots, prompts.repeat(n, 0), lengths)
  seconds = time.perf_counter() - begin
  _say(
    mode="load",
    how="static" if args.static else "continuous",
    slots=slots,
    tokens=int(lengths.sum()),
    longest_over_mean=round(float(lengths.max() / lengths.mean()), 2),
    seconds=round(seconds, 2),
    tokens_a_second=round(float(lengths.sum() / seconds), 1),
    **stats,
  )


_engines: dict[int, dsa_jax.Engine] = {}


def _continuous(model, args, slots, prompts, lengths):
  longest = prompts.shape[1] + args.longest
  if slots not in _engines:
    _engines[slots] = dsa_jax.Engine(
      model,
      slots=slots,
      pool_tokens=slots * (-(-longest // _PAGE) + 1) * _PAGE,
      max_length=longest,
      chunk=args.chunk,
      lanes=args.lanes,
      steps=args.steps,
    )
    _engines[slots].warm_up()
  engine = _engines[slots]
  params = [
    dsa_jax.SamplingParams(max_tokens=int(T), seed=i)
    for i, T in enumerate(lengths)
  ]
  engine.generate(list(prompts), params)
  return {"calls": engine.stats.calls, "found": engine.stats.found_tokens}


def _static(model, args, slots, prompts, lengths):
  """Batches of `generate`: each takes as long as its longest row."""
  key = jax.random.key(0)
  for i in range(0, len(prompts), slots):
    T = int(lengths[i : i + slots].max())
    # Few lengths, so that few programs are compiled: in favour of this way,
    # compiling is not timed.
    jax.block_until_ready(
      dsa_jax.generate(model, prompts[i : i + slots], T, 1.0, key)
    )
  return {}


def host(model, args) -> None:
  """The engine's loop beside the same program called with nothing between."""
  slots, length = args.slots[-1], args.lengths[-1]
  calls, program = 20, Decoding(model, slots, length, args)
  alone = timed(lambda: [program() for _ in range(calls)][-1], 3) / calls
  engine = dsa_jax.Engine(
    model,
    slots=slots,
    pool_tokens=slots * (length + 2 * _PAGE),
    max_length=length,
    chunk=args.chunk,
    steps=args.steps,
  )
  params = dsa_jax.SamplingParams(max_tokens=(calls + 8) * args.steps)
  prompt = np.zeros(length - params.max_tokens - 1, np.int32)
  engine.submit(dsa_jax.Request(prompt, dataclasses.replace(params, n=slots)))
  while engine.stats.decoded_tokens < slots * args.steps:
    engine.step()
  begin = time.perf_counter()
  for _ in range(calls):
    engine.step()
  loop = (time.perf_counter() - begin) / calls
  _say(
    mode="host",
    slots=slots,
    length=length,
    ms_a_call=round(loop * 1e3, 2),
    ms_of_the_program=round(alone * 1e3, 2),
    idle=round(1 - alone / loop, 4),
  )


def _say(**row: object) -> None:
  print(json.dumps(row), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m dsa_jax.engine.bench",
    description=__doc__,
    epilog=_HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  modes = {f.__name__: f for f in (decode, prefill, group, load, host)}
  parser.add_argument("mode", choices=modes)
  parser.add_argument("--model", choices=MODELS, default="wide")
  parser.add_argument("--slots", type=int, nargs="+", default=[32])
  parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
  parser.add_argument("--steps", type=int, default=16)
  parser.add_argument("--chunk", type=int, default=512)
  parser.add_argument("--lanes", type=int, default=1)
  parser.add_argument(
    "--attention", choices=["sparse", "dense"], default="sparse"
  )
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--samples", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--mean", type=int, default=128)
  parser.add_argument("--sigma", type=float, default=1.0)
  parser.add_argument("--longest", type=int, default=4096)
  parser.add_argument("--static", action="store_true")
  args = parser.parse_args()
  device = jax.devices()[0].device_kind
  _say(device=device, jax=jax.__version__, **vars(args))
  modes[args.mode](make_model(MODELS[args.model]()), args)


if __name__ == "__main__":
  main()
