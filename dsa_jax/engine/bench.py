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
from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax.engine import programs
from dsa_jax.engine import state
from dsa_jax.engine import weights

_HELP: Final = """\
modes:
  decode  ms a step for each number of --slots and each of --lengths, on a pool
          of random rows, and the memory of the compiled program; --speculate
          for steps that verify a draft and make the next
  prefill ms to cache a prompt of each of --lengths, in chunks
  group   seconds to the last first token of 8 samples of one prompt, as one
          request and as 8 prompts that share nothing
  load    tokens/s of --prompts x --samples with log-normal lengths
  host    what the host does for a call, and how many calls come so late that
          the device has waited for them

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
  param_dtype="bfloat16",
)
MODELS: Final = {
  "wide": lambda: dataclasses.replace(config_lib.v32_671b(), **_WIDE),
  "tiny": config_lib.tiny,
}
_PAGE: Final = 128
_CALLS: Final = 20  # that `host` looks at


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
    cfg = weights.config_for_decoding(model.config)
    graphdef, self._params, _ = weights.prepare(model, cfg)
    per_slot = -(-max(length, cfg.top_k) // _PAGE)  # an engine's least
    pool = programs.make_pool(
      cfg, slots * per_slot, _PAGE, *_dtypes(args).values()
    )
    key = jax.random.key(1)
    self._pool = dataclasses.replace(
      pool,
      kv=_random_rows(key, pool.kv, cfg.kv_rank + cfg.rope_head_dim),
      k_index=_random_rows(key, pool.k_index, cfg.index_head_dim),
    )
    pages = np.random.default_rng(0).permutation(slots * per_slot)
    self._pages = pages.astype(np.int32).reshape(slots, per_slot)
    blank = state.blank(slots)
    blank.how.temperature[:], blank.how.seed[:] = 1, np.arange(slots)
    blank.left[:], blank.live[:] = 2**30, True
    blank.length[:] = length - _fed(args)
    self._slots = jax.tree.map(jnp.asarray, blank)
    kind = programs.Kind(
      attention=args.attention,
      steps=args.steps,
      speculates=args.speculate,
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

  def tokens(self) -> int:
    """Tokens of the slots in the cache, all together."""
    return int(np.asarray(self._slots.length).sum())

  def __call__(self):
    self._pool, self._slots, given = self._program(
      self._params, self._pool, self._slots, *self._rest()
    )
    return given


def _fed(args) -> int:
  """The most tokens that a slot is fed while it is timed."""
  calls = 2 * _CALLS + 8 if args.mode == "host" else 7
  return calls * args.steps * (2 if args.speculate else 1) + 1


def _dtypes(args) -> dict[str, Any]:
  """What the cache holds keys in, as `Engine` takes it."""
  names = "index_key_dtype", "latent_dtype"
  return {name: getattr(args, name) for name in names}


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def _random_rows(key, stored, width):
  """A page at a time: the generator's own temporaries are small."""
  pages, size = jax.tree.leaves(stored)[0].shape[:2]

  def page(key):
    return cache_lib.as_stored(stored, jax.random.normal(key, (size, width)))

  return jax.lax.map(page, jax.random.split(key, pages))


def decode(model, args) -> None:
  for slots in args.slots:
    for length in args.lengths:
      program = Decoding(model, slots, length, args)
      before, runs = program.tokens(), 5
      seconds = timed(program, runs)
      fed = (program.tokens() - before) / ((runs + 1) * args.steps * slots)
      _say(
        mode="decode",
        attention=args.attention,
        slots=slots,
        length=length,
        ms_a_step=round(seconds / args.steps * 1e3, 3),
        tokens_a_step=round(fed, 2),
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
      **_dtypes(args),
    )
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
  """First tokens of a group, and of as many prompts that share nothing."""
  samples, length = 8, args.lengths[-1]
  engine = dsa_jax.Engine(
    model,
    slots=samples,
    pool_tokens=2 * samples * (length + 2 * _PAGE),
    chunk=args.chunk,
    steps=1,
    **_dtypes(args),
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
  slots, n, shape = args.slots[-1], args.samples, (args.prompts, args.prompt)
  prompts = rng.integers(0, model.config.vocab_size, shape)
  lengths = np.exp(rng.normal(0, args.sigma, args.prompts * n))
  lengths = np.maximum(lengths * args.mean / lengths.mean(), 1).astype(int)
  if lengths.max() > args.longest:
    raise ValueError(
      f"--longest={args.longest}: a sample of {lengths.max()} tokens is drawn; "
      "give more."
    )
  longest = args.prompt + args.longest
  engine = dsa_jax.Engine(
    model,
    slots=slots,
    pool_tokens=slots * (-(-longest // _PAGE) + 1) * _PAGE,
    max_length=longest,
    chunk=args.chunk,
    lanes=args.lanes,
    steps=args.steps,
    **_dtypes(args),
  )
  engine.warm_up()
  params = [
    dsa_jax.SamplingParams(max_tokens=int(T), seed=i)
    for i, T in enumerate(lengths)
  ]
  begin = time.perf_counter()
  engine.generate(list(prompts.repeat(n, 0)), params)
  seconds = time.perf_counter() - begin
  _say(
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

  def _run_decode(self, stays, hurries):
    self.late += self.given is not None and self.given.tokens.is_ready()
    self.given = super()._run_decode(stays, hurries)
    return self.given


def host(model, args) -> None:
  """Work of the host while all slots decode, and nobody waits for one."""
  slots, length = args.slots[-1], args.lengths[-1]
  engine = _Watched(
    model,
    slots=slots,
    pool_tokens=slots * (length + 2 * _PAGE),
    max_length=length,
    chunk=args.chunk,
    steps=args.steps,
    **_dtypes(args),
  )
  params = dsa_jax.SamplingParams(max_tokens=_fed(args) - 1)
  shape = slots, length - params.max_tokens
  for prompt in np.random.default_rng(0).integers(
    0, model.config.vocab_size, shape
  ):
    engine.submit(dsa_jax.Request(prompt, params))
  while engine.stats.decoded_tokens < 2 * slots * args.steps:
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
  _say(
    mode="host",
    slots=slots,
    length=length,
    ms_a_call=round(seconds / _CALLS * 1e3, 2),
    ms_of_the_host=round(sorted(work)[_CALLS // 2] * 1e3, 2),
    late=f"{late} of {_CALLS} calls",
  )


def _say(**row: object) -> None:
  print(json.dumps(row), flush=True)


def _count(text: str) -> int:
  if not text.isascii() or not text.isdigit() or int(text) == 0:
    raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
  return int(text)


def _check(args) -> None:
  """Raises a ValueError for what a mode cannot time."""
  if args.speculate and args.mode != "decode":
    raise ValueError(f"--speculate is for decode, not for {args.mode}.")
  if args.attention == "dense" and args.mode not in ("decode", "prefill"):
    raise ValueError(
      f"--attention=dense is for decode and prefill, not for {args.mode}."
    )
  for length in args.lengths if args.mode in ("decode", "host") else ():
    if length % _PAGE or length <= _fed(args):
      raise ValueError(
        f"--lengths {length}: {args.mode} with --steps={args.steps} takes "
        f"multiples of {_PAGE} above {_fed(args)}."
      )
  if not 0 <= args.sigma <= 4:
    raise ValueError(f"--sigma={args.sigma} is not from 0 to 4.")


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
  add = functools.partial(parser.add_argument, type=_count, metavar="N")
  add("--slots", nargs="+", default=[32], help="sequences at once")
  add("--lengths", nargs="+", default=[4096], help="tokens of a sequence")
  add("--steps", default=16, help="steps of a call (default: 16)")
  add("--chunk", default=512, help="tokens cached at once (default: 512)")
  add("--lanes", default=1, help="prompts cached at once (default: 1)")
  parser.add_argument(
    "--attention", choices=["sparse", "dense"], default="sparse"
  )
  for name, of in (("index-key", "index keys"), ("latent", "latents")):
    parser.add_argument(
      f"--{name}-dtype",
      choices=["float8_e4m3fn"],
      help=f"of {of} in the cache (default: the activations')",
    )
  parser.add_argument("--speculate", action="store_true")
  load_only = parser.add_argument_group("of load")
  add = functools.partial(load_only.add_argument, type=_count, metavar="N")
  add("--prompts", default=64, help="prompts (default: 64)")
  add("--samples", default=8, help="samples of each (default: 8)")
  add("--prompt", default=128, help="tokens of a prompt (default: 128)")
  add("--mean", default=128, help="tokens of a sample (default: 128)")
  add("--longest", default=4096, help="the most of a sample (default: 4096)")
  load_only.add_argument(
    "--sigma", type=float, default=1.0, help="of their logarithms (default: 1)"
  )
  args = parser.parse_args()
  cfg = dataclasses.replace(
    MODELS[args.model](), num_mtp_layers=1 if args.speculate else 0
  )
  try:
    _check(args)
    device = jax.devices()[0].device_kind
    _say(device=device, jax=jax.__version__, **vars(args))
    modes[args.mode](make_model(cfg), args)
  except ValueError as e:
    parser.error(str(e))


if __name__ == "__main__":
  main()
