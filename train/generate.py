"""Continues a text: python -m train.generate MODEL [--OPTION=...].

MODEL is the folder of a run (its newest checkpoint, or that of --step), one
checkpoint, or a Hugging Face folder (DeepSeek-V3, V3.1, V3.2, or GLM with DSA).

  python -m train.generate runs/tiny --prompt="def "
  python -m train.generate runs/tiny --prompt="def " --temperature=0 --speculate
  python -m train.generate runs/tiny --step=280 --top-p=0.9 --n=4 < begun.py
  python -m train.generate DeepSeek-V3.2 --mesh.expert=8 --dtype=bfloat16
    --prompt-file=question.txt --stop "Question:" > answer.txt

The text goes to standard output as it comes, and nothing else does; what there
is to say of it goes to standard error.
"""

import collections
import dataclasses
import secrets
import sys
import time
from typing import Annotated, Final, Literal

from train.host import program

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

import jax
import tyro

import dsa_jax
from dsa_jax import cache as cache_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine import handle as handle_lib
from dsa_jax.engine import request as request_lib
from dsa_jax.engine import results as results_lib
from train import options
from train.host import mesh as mesh_lib
from train.host import processes
from train.run import trained

_PAGE: Final = 64
_CHUNK: Final = 1024  # tokens of a prompt that are cached at once
_STEPS: Final = 8  # tokens between two looks at what has come
_MOST_SLOTS: Final = 64
_MOST_BYTES: Final = 2**28  # of a prompt

type _Positive = Annotated[float, ranges.Interval(0, 1, open="low")]
type _Share = Annotated[float, ranges.Interval(0, 1, open="high")]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A model, a prompt, and how to continue it."""

  model: Annotated[
    tyro.conf.Positional[ranges.Text], tyro.conf.arg(metavar="MODEL")
  ]
  """A run's folder, one checkpoint of it, or a Hugging Face folder."""
  prompt: str = "-"
  """The text to continue; "-" takes it from standard input, with its last line
  break."""
  prompt_file: ranges.Text | None = None
  """A file with the text to continue, in place of --prompt."""
  step: ranges.Index | None = None
  """Of a run's folder: the checkpoint to take; by default the newest."""
  tokenizer: ranges.Text | None = None
  """"bytes", or the path of a tokenizer.json; by default what the run was
  trained with, or the Hugging Face folder's."""
  max_tokens: ranges.Count = 256
  """Tokens of a sample; fewer, if it ends before."""
  temperature: Annotated[float, ranges.Interval(0, 1e6)] = 1.0
  """0 takes the likeliest token each time."""
  top_k: ranges.Index = 0
  """Draw from this many of the likeliest tokens; 0: from all."""
  top_p: _Positive = 1.0
  """Draw from the likeliest tokens that have this probability together."""
  min_p: _Share = 0.0
  """Draw from tokens of at least this probability relative to the likeliest."""
  seed: ranges.Seed | None = None
  """The same seed, the same samples; by default a fresh one, which is said."""
  stop: tuple[ranges.Text, ...] = ()
  """A sample ends where one of these texts would begin. (It also ends where the
  model ends its document.)"""
  n: Annotated[int, ranges.Interval(1, 1024)] = 1
  """Samples; a line break follows each if there are several."""
  speculate: bool = False
  """Let the model's MTP block draft tokens. The samples are the same."""
  attention: frame_lib.Attention | None = None
  """"sparse" reads the K keys that the indexer selects, "dense" all; by default
  as the checkpoint was trained last. (A model without an indexer: "dense".)"""
  index_key_dtype: cache_lib.StoredDType | None = None
  """"float8_e4m3fn" caches index keys in 8 bits; by default in the dtype of the
  computation."""
  latent_dtype: cache_lib.StoredDType | None = None
  """Likewise latents, which take most of the cache."""
  slots: Annotated[int, ranges.Interval(1, 1024)] | None = None
  """Samples that are computed at once, each with room in the cache; by default
  all, up to 64."""
  max_length: ranges.Count | None = None
  """Room of each, in tokens of the prompt and the sample; by default what they
  need."""
  dtype: Literal["bfloat16", "float32"] | None = None
  """What to compute in; by default the model's own."""
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  """Devices to spread the model over."""

  def __post_init__(self):
    ranges.check(self)
    if self.prompt != "-" and self.prompt_file is not None:
      raise ValueError(
        f"prompt={ranges.shown(self.prompt)} and "
        f"prompt_file={self.prompt_file} are both given; give one of them."
      )

  def longest(self, request: dsa_jax.Request) -> int:
    """Tokens that each slot has room for."""
    return self.max_length or len(request.tokens) + self.max_tokens

  def params(self, eos_id: int) -> dsa_jax.SamplingParams:
    """How to sample; a document's end ends a sample."""
    seed = self.seed if self.seed is not None else secrets.randbits(32)
    return dsa_jax.SamplingParams(
      max_tokens=self.max_tokens,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      min_p=self.min_p,
      seed=seed,
      stop_ids=(eos_id,),
      stop=self.stop,
      n=self.n,
    )


def read_prompt(cfg: Generation) -> str:
  """The text to continue.

  Raises:
    ValueError: There is none, it is empty, too long, or not UTF-8.
    OSError: Its file cannot be read.
  """
  if cfg.prompt_file is not None:
    where, raw = cfg.prompt_file, _read_file(cfg.prompt_file)
  elif cfg.prompt == "-":
    where, raw = "standard input", _read_stdin()
  else:
    where, raw = "--prompt", cfg.prompt.encode()
  if not raw:
    raise ValueError(f"The prompt ({where}) is empty; give some text.")
  if len(raw) > _MOST_BYTES:
    raise ValueError(f"The prompt ({where}) has more than {_MOST_BYTES} bytes.")
  try:
    return raw.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f"The prompt ({where}) is no UTF-8: {e}.") from e


def _read_file(path: str) -> bytes:
  try:
    with open(path, "rb") as file:
      return file.read(_MOST_BYTES + 1)
  except OSError as e:
    raise OSError(f"prompt_file={path} cannot be read ({e.strerror}).") from e


def _read_stdin() -> bytes:
  if sys.stdin is None or sys.stdin.isatty():
    raise ValueError(
      "There is no prompt: give --prompt=TEXT or --prompt-file=FILE, or send "
      "it to standard input."
    )
  return sys.stdin.buffer.read(_MOST_BYTES + 1)


def make_engine(
  cfg: Generation,
  model: dsa_jax.Transformer,
  attention: frame_lib.Attention,
  tokenizer: tokenizer_lib.Tokenizer,
  request: dsa_jax.Request,
) -> dsa_jax.Engine:
  """An engine with room for the samples that are asked for, and no more.

  Raises:
    ValueError: The model cannot do what is asked for; see `Engine`.
  """
  length = cfg.longest(request)
  groups = model.config.rules.shards("batch")
  slots = cfg.slots or min(cfg.n, _MOST_SLOTS)
  slots = -(-slots // groups) * groups
  # A page to spare for each slot: the engine begins no sequence without.
  pages = slots * (-(-length // _PAGE) + 1)
  least = groups * -(-model.config.top_k // _PAGE)
  return dsa_jax.Engine(
    model,
    slots=slots,
    pool_tokens=max(pages, least) * _PAGE,
    page=_PAGE,
    chunk=min(len(request.tokens), _CHUNK),
    steps=min(cfg.max_tokens, _STEPS),
    max_length=length,
    attention=attention,
    index_key_dtype=cfg.index_key_dtype,
    latent_dtype=cfg.latent_dtype,
    speculate=cfg.speculate,
    tokenizer=tokenizer,
  )


def write(handle: handle_lib.Handle, samples: int) -> float | None:
  """Writes samples to standard output as they come.

  Returns:
    The time at which the first token was there.
  """
  # A terminal would obey some of what a model may write.
  shown = processes.visible if sys.stdout.isatty() else str
  first = None
  for i in range(samples):
    if samples > 1:
      tell(f"sample {i + 1} of {samples}:")
    for delta in handle.stream(i):
      first = first or time.perf_counter()
      sys.stdout.write(shown(delta.text))
      sys.stdout.flush()
    if samples > 1 or sys.stdout.isatty():
      sys.stdout.write("\n")
      sys.stdout.flush()
  return first


def tell(text: str) -> None:
  print(processes.visible(text), file=sys.stderr, flush=True)


def generate(cfg: Generation) -> None:
  """Continues a prompt, as the config says.

  Raises:
    ValueError: Something that is asked for cannot be.
    OSError: A file cannot be read, or is not what was saved.
  """
  begin = time.perf_counter()
  source = trained.Trained(cfg.model, cfg.step, cfg.dtype)
  attention = cfg.attention or source.attention
  tokenizer = tokenizer_lib.load_tokenizer(cfg.tokenizer or source.tokenizer)
  request = dsa_jax.Request(
    tokenizer.encode(read_prompt(cfg)), cfg.params(tokenizer.eos_id)
  )
  check(cfg, source.config, tokenizer, request)  # before much is loaded
  mesh = cfg.mesh.make()
  with jax.set_mesh(mesh):
    model = source.load(mesh, attention)
    engine = make_engine(cfg, model, attention, tokenizer, request)
  del model  # of which the engine may have made a copy
  loaded = time.perf_counter()
  engine.warm_up()
  before, start = engine.stats, time.perf_counter()
  tell(
    f"{source.path}: {attention} attention; loaded in {loaded - begin:.1f} s, "
    f"compiled in {start - loaded:.1f} s; {len(request.tokens)} tokens of "
    f"prompt, seed {request.params.seed}"
  )
  handle = engine.submit(request)
  first = write(handle, cfg.n)
  tell(summary(handle.results(), before, engine.stats, start, first))


def check(
  cfg: Generation,
  model: dsa_jax.ModelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  request: dsa_jax.Request,
) -> None:
  """Raises a ValueError for what this model cannot do."""
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} ids, but the model only "
      f"{model.vocab_size}: it was trained with another; give --tokenizer."
    )
  if cfg.speculate and not model.num_mtp_layers:
    raise ValueError(
      f"speculate={cfg.speculate}, but the model has no MTP block to draft "
      "with; leave it out."
    )
  cache_lib.check_dtypes(model, cfg.index_key_dtype, cfg.latent_dtype)
  request_lib.check(
    request,
    vocab=model.vocab_size,
    max_length=cfg.longest(request),
    has_tokenizer=True,
  )


def summary(
  results: list[request_lib.Result],
  before: results_lib.Stats,
  after: results_lib.Stats,
  start: float,
  first: float | None,
) -> str:
  """What there is to say of samples, in one line."""
  seconds = time.perf_counter() - start
  tokens = sum(len(result.tokens) for result in results)
  counts = collections.Counter(result.finish for result in results)
  ends = [f"{n} {end}" for end, n in sorted(counts.items())]
  text = (
    f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), "
    f"the first after {(first or start) - start:.2f} s; finished: "
    f"{', '.join(ends) if len(results) > 1 else results[0].finish}"
  )
  if drafts := after.drafts - before.drafts:
    share = (after.accepted - before.accepted) / drafts
    text += f"; {share:.0%} of {drafts} drafts were right"
  return text


def main() -> None:
  processes.configure_platform()
  try:
    generate(
      options.parse(
        Generation,
        sys.argv[1:],
        program="python -m train.generate",
        description=str(__doc__),
      )
    )
  except (ValueError, OSError, ImportError, MemoryError) as e:
    sys.exit(f"error: {options.spelled(str(e), Generation)}")
  except jax.errors.JaxRuntimeError as e:  # memory ran out, as a rule
    said = str(e).splitlines()[0]
    sys.exit(f"error: {said} (Less: --max-tokens, --slots, --dtype=bfloat16.)")


if __name__ == "__main__":
  program.run(main)
