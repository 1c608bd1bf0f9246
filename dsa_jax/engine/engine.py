"""The engine: many sequences at once, each as if it were alone.

One loop on the host: sequences get slots and pages, chunks of their prompts are
cached, and all that decode take a few steps in one call. The results of a call
are read while the next one runs.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
import contextlib
import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import numpy as np

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import ranges
from dsa_jax import transformer
from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine import programs
from dsa_jax.engine import request as request_lib
from dsa_jax.engine import results as results_lib
from dsa_jax.engine import scheduler as scheduler_lib
from dsa_jax.engine import sequence as sequence_lib
from dsa_jax.engine import settings as settings_lib
from dsa_jax.engine import state
from dsa_jax.engine import text as text_lib
from dsa_jax.engine import weights
from dsa_jax.engine.handle import Handle
from dsa_jax.engine.request import Request
from dsa_jax.engine.request import Result
from dsa_jax.engine.request import SamplingParams
from dsa_jax.engine.sequence import Sequence


class Engine:
  """Continues prompts: many at once, in a cache of fixed size.

  What a sample is depends on its prompt, its parameters and its seed: not on
  what else runs, in which slot or on which pages, or when it came. (To the
  last bits, where no part of it was found in the cache, and it never lost its
  pages.)

  On a mesh (`jax.set_mesh`), slots and pages are shared out among the devices
  that share a batch, heads among those of "tensor", experts among those of
  "expert" and "fsdp". Where there are several processes, each makes the same
  calls in the same order, and gets the same results.

  Memory: the parameters in the dtype of the activations, and pool_tokens
  (C+R+I) values for each layer, MTP's included: 1,408 bytes a token and layer
  in bfloat16 at DeepSeek-V3.2's widths, 788 with index keys and latents in 8
  bits. Parameters are copies, but for those that have that dtype and are not a
  layer's, and routed experts' matrices that have it: do not donate these.

  Attributes:
    model_config: The model's, with the rules that the engine runs it by.
    version: Of the weights, 0 at first.
  """

  model_config: config_lib.ModelConfig
  version: int

  def __init__(
    self,
    model: transformer.Transformer,
    *,
    slots: int = 16,
    pool_tokens: int = 65536,
    page: int = 128,
    chunk: int = 512,
    lanes: int = 1,
    steps: int = 16,
    max_length: int | None = None,
    attention: frame_lib.Attention = "sparse",
    index_key_dtype: cache_lib.StoredDType | None = None,
    latent_dtype: cache_lib.StoredDType | None = None,
    speculate: bool = False,
    returns: tuple[settings_lib.Extra, ...] = (),
    tokenizer: tokenizer_lib.Tokenizer | None = None,
  ):
    """Makes an engine; programs are compiled as they are first needed.

    Args:
      model: The model.
      slots: Sequences that decode at once.
      pool_tokens: Tokens that the cache has room for, all sequences together.
      page: Tokens of a page, which sequences that begin alike may share.
      chunk: Tokens of a prompt that are cached at once.
      lanes: Prompts of which a chunk is cached at once.
      steps: Tokens that each sequence gets in a call of the decoding program,
        and the most chunks of prompts that are cached between two calls. The
        host decides nothing during a call: more steps cost it less, and let
        new requests wait longer.
      max_length: Tokens of the longest sequence, prompt included; by default
        what the pool has room for.
      attention: "sparse" reads K chosen keys a query, "dense" all of them.
      index_key_dtype: What the cache holds index keys in: "float8_e4m3fn", or
        None for the activations' dtype. In 8 bits queries are rounded, too, and
        other keys are selected where scores are close.
      latent_dtype: Likewise latents; their rotated keys stay in bfloat16.
      speculate: Whether the model's MTP block drafts each token after the
        next. The samples are the same with and without.
      returns: What results hold besides tokens and log-probs: "kept", the
        tokens that each was drawn from; "experts", of every token; "selected",
        the keys that each layer read for it (many: K a token and layer; and
        nothing is shared or found in the cache).
      tokenizer: For the text of samples, and stop texts.

    Raises:
      ValueError: An argument is not of its kind or out of its range, the model
        has no MTP block to speculate with, no experts to return, or widths that
        cannot be kept in 8 bits; or slots or pool are too small, or do not
        divide among the devices.
    """
    self._settings = settings_lib.Settings(
      slots=slots,
      pool_tokens=pool_tokens,
      page=page,
      chunk=chunk,
      lanes=lanes,
      steps=steps,
      max_length=max_length,
      attention=attention,
      index_key_dtype=index_key_dtype,
      latent_dtype=latent_dtype,
      speculate=speculate,
      returns=returns,
    )
    cfg = weights.config_for_decoding(model.config)
    self._mesh = jax.sharding.get_mesh()
    self._groups = cfg.rules.shards("batch")
    self._settings.check(cfg, self._groups)
    pages = self._settings.pages(self._groups)
    self._longest = min(max_length or pages * page, pages * page)
    self.model_config, self.version = cfg, 0
    self._tokenizer = tokenizer
    self._graphdef, self._params, self._shapes = weights.prepare(model, cfg)
    self._kind = programs.Kind(
      attention=attention,
      steps=steps,
      speculates=speculate,
      kept="kept" in returns,
      experts="experts" in returns,
      selected="selected" in returns,
    )
    # The most tokens that a sequence gets in a call.
    self._most = steps * (2 if speculate else 1)
    self._scheduler = scheduler_lib.Scheduler(
      slots=slots,
      groups=self._groups,
      pages=pages,
      page_size=page,
      pages_per_slot=-(-self._longest // page),
      most=self._most,
      lookahead=int(speculate),
      shares=not self._kind.selected,
    )
    experts = None
    if self._kind.experts:
      shape = self._groups, pages, page, cfg.num_moe_layers
      experts = np.zeros((*shape, cfg.experts_per_token), np.uint16)
    self._results = results_lib.Results(self._scheduler, experts, page)
    self._pool = programs.make_pool(
      cfg, pages, page, index_key_dtype, latent_dtype
    )
    self._slots = programs.make_slots(cfg, slots)

  @property
  def stats(self) -> results_lib.Stats:
    """What the engine has done, and what it has to do."""
    scheduler = self._scheduler
    return results_lib.Stats(
      **dataclasses.asdict(self._results.counts),
      found_tokens=scheduler.found,
      preemptions=scheduler.preemptions,
      waiting=len(scheduler.waiting),
      running=sum(s is not None for s in scheduler.placed),
      free_pages=scheduler.available,
    )

  def submit(self, request: Request) -> Handle:
    """Takes a request; `step` or its handle get it done.

    Raises:
      ValueError: The engine can never do it, or it has no seed and there are
        several processes; nothing has changed then.
    """
    self._check(request)
    params = request.params
    prompt = sequence_lib.Prompt(request, unplaced=params.n)
    stream = None
    if self._tokenizer is not None:
      stream = functools.partial(
        text_lib.TextStream, self._tokenizer, params.stop
      )
    sequences = [
      Sequence(prompt, seed, None if stream is None else stream())
      for seed in request_lib.seeds(params)
    ]
    self._scheduler.waiting.extend(sequences)
    return Handle(self, sequences)

  def _check(self, request: Request) -> None:
    if not isinstance(request, Request):
      raise ValueError(
        f"Engine: {ranges.shown(request)} is no request; give "
        "Request(tokens, SamplingParams(...))."
      )
    if request.params.seed is None and jax.process_count() > 1:
      raise ValueError(
        "Engine: seed=None is another one in each process; give a seed."
      )
    request_lib.check(
      request,
      vocab=self.model_config.vocab_size,
      max_length=self._longest,
      has_tokenizer=self._tokenizer is not None,
    )

  def generate(
    self,
    prompts: Iterable[Any],
    params: SamplingParams | Items[SamplingParams],
  ) -> list[list[Result]]:
    """Continues prompts, by the same parameters or each by its own.

    Args:
      prompts: Ids of each.
      params: For all of them, or one for each. Of one seed, equal prompts get
        equal samples; `n` samples of a prompt have seeds of their own.

    Returns:
      The samples of each prompt.

    Raises:
      ValueError: As of `submit`; then none has been continued.
    """
    prompts = list(prompts)
    if isinstance(params, SamplingParams):
      params = [params] * len(prompts)
    if len(params) != len(prompts):
      raise ValueError(
        f"Engine.generate: there are {len(prompts)} prompts, but {len(params)} "
        "SamplingParams; give one for all, or one for each."
      )
    requests = [Request(*each) for each in zip(prompts, params)]
    for request in requests:
      self._check(request)
    handles = [self.submit(request) for request in requests]
    try:
      return [handle.results() for handle in handles]
    except BaseException:
      for handle in handles:
        handle.cancel()
      raise

  def cancel(self, handle: Handle) -> None:
    """Ends what has not ended of a request."""
    for sequence in handle.sequences:
      if sequence.finish is None:
        self._results.end(sequence, "cancelled")

  def swap_weights(self, params: nnx.State, version: int) -> None:
    """Goes on with other weights, between two steps.

    Nothing that older ones have cached is read again: sequences on their way
    are cached anew, and keep the tokens that they have.

    Args:
      params: All of a model's parameters and biases, of the same shapes. Those
        of layers are copied, but for routed experts' matrices. Others that have
        the activations' dtype, or stay fp32, are not: do not donate them.
      version: Their number; results say which gave each token.

    Raises:
      ValueError: They are not those of this model; nothing has changed then.
    """
    ranges.require("swap_weights: version", version, ranges.Index)
    with self._on_mesh():
      placed = weights.place(params, self._shapes, self.model_config)
    self._results.read()
    self._scheduler.forget()
    self._params, self.version = placed, version

  def warm_up(self) -> None:
    """Compiles all programs, so that no request waits for that.

    Raises:
      ValueError: There are requests already.
    """
    if self._scheduler.waiting or any(self._scheduler.placed):
      raise ValueError("warm_up: there are requests already; call it before.")
    with self._on_mesh():
      for with_log_probs in (False, True):
        self._run_prefill(self._empty_chunk(), with_log_probs)
      self._run_copies(
        *np.full((2, self._groups, self._settings.lanes), -1, np.int32)
      )
      nobody = np.zeros(self._settings.slots, bool)
      self._run_admit(state.blank(len(nobody)), nobody)
      jax.block_until_ready(self._run_decode(nobody, False))

  def step(self) -> bool:
    """Launches what is next, and reads what was launched before.

    Returns:
      Whether anything is left to do.
    """
    with self._on_mesh():
      before = self._results.launches
      self._fill_slots()
      self._decode()
      self._results.read(but=self._results.launches - before)
    return bool(self._scheduler.waiting or any(self._scheduler.placed))

  def _on_mesh(self):
    """The mesh that the engine was made on, whoever calls."""
    if self._mesh.empty:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _fill_slots(self) -> None:
    """Places sequences and caches their prompts. Those that decode wait for it:
    for as many tokens, at most, as a chunk for each step has."""
    size = self._settings
    # The keys that were selected in a chunk may take hundreds of megabytes.
    chunks = 1 if self._kind.selected else size.steps
    room = chunks * size.chunk * size.lanes * self._groups
    while room > 0:
      self._place()
      tokens = self._prefill()
      if not tokens:
        return
      room -= tokens

  def _place(self) -> None:
    copies = self._scheduler.place()
    while self._scheduler.waiting and not any(self._scheduler.placed):
      if not self._scheduler.unblock():
        break
      copies += self._scheduler.place()
    for at_once in itertools.batched(copies, self._settings.lanes):
      shape = self._groups, self._settings.lanes
      source, target = np.full((2, *shape), -1, np.int32)
      for i, copy in enumerate(at_once):
        source[copy.group, i] = copy.source
        target[copy.group, i] = copy.target
        self._results.launched(copy)
      self._run_copies(source, target)

  def _prefill(self) -> int:
    """Caches a chunk of the prompts that came first, one a lane; returns its
    tokens."""
    lanes, T = self._settings.lanes, self._settings.chunk
    chunk, parts = self._empty_chunk(), []
    for group in range(self._groups):
      chosen = (s for s in self._scheduler.of_group(group) if s.prefills)
      for lane, sequence in enumerate(itertools.islice(chosen, lanes)):
        row, offset = group * lanes + lane, sequence.cached
        # Borders lie at multiples of a chunk, wherever it begins.
        count = min(T - offset % T, sequence.target - offset)
        part = sequence.known[offset : offset + count + 1]
        chunk.tokens[row, :count] = part[:-1]
        chunk.next_tokens[row, :count] = part[1:]
        chunk.pages[row] = self._scheduler.table[sequence.slot]
        chunk.offset[row], chunk.count[row] = offset, count
        parts.append(
          results_lib.Part(row, sequence, group, sequence.pages, offset, count)
        )
    if not parts:
      return 0
    given = self._run_prefill(
      chunk, any(part.sequence.prompt.log_probs is not None for part in parts)
    )
    self._results.launched(results_lib.Prefill(parts, given))
    for part in parts:
      self._scheduler.cached(part.sequence, part.count)
    tokens = sum(part.count for part in parts)
    self._results.counts.prefill_tokens += tokens
    return tokens

  def _empty_chunk(self) -> programs.Chunk:
    rows = self._groups * self._settings.lanes
    zeros = lambda *shape: np.zeros((rows, *shape), np.int32)
    T, P = self._settings.chunk, self._scheduler.table.shape[1]
    return programs.Chunk(zeros(T), zeros(T), zeros(P), zeros(), zeros())

  def _run_prefill(self, chunk, with_log_probs) -> programs.Prefilled:
    self._pool, given = programs.prefill(
      *(self._graphdef, self._params, self._pool, chunk),
      kind=self._kind,
      with_log_probs=with_log_probs,
    )
    return given

  def _run_decode(self, stays, hurries) -> programs.Decoded:
    self._pool, self._slots, given = programs.decode(
      *(self._graphdef, self._params, self._pool, self._slots),
      # A copy: the device may read it while the next call is prepared.
      *(self._scheduler.table.copy(), stays, np.asarray(hurries)),
      kind=self._kind,
    )
    return given

  def _run_copies(self, source, target) -> None:
    self._pool = programs.copy_pages(
      self.model_config, self._pool, source, target
    )

  def _decode(self) -> None:
    """Lets all whose prompts are cached take some steps."""
    self._scheduler.reserve()
    decoding = self._scheduler.decoding()
    if not decoding:
      return
    self._admit([(slot, s) for slot, s in decoding if not s.decodes])
    stays = np.zeros(self._settings.slots, bool)
    for slot, sequence in decoding:
      stays[slot] = True
      sequence.bound += self._most
    given = self._run_decode(stays, bool(self._scheduler.waiting))
    self._results.launched(
      results_lib.Decode(decoding, self._most, self.version, given)
    )

  def _admit(self, sequences: list[tuple[int, Sequence]]) -> None:
    """Tells the device of sequences that begin to decode."""
    if not sequences:
      return
    fresh = state.blank(self._settings.slots)
    is_fresh = np.zeros(self._settings.slots, bool)
    for slot, sequence in sequences:
      state.write(fresh, slot, sequence)
      is_fresh[slot] = sequence.decodes = True
    self._run_admit(fresh, is_fresh)

  def _run_admit(self, fresh, is_fresh) -> None:
    self._slots = programs.admit(
      self.model_config, self._slots, fresh, is_fresh
    )
