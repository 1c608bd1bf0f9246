"""A sample of a request on its way, as the host knows it.

Letters: P tokens of the prompt, T tokens sampled so far.
"""

import dataclasses

from jaxtyping import Float32, Int32
import numpy as np

from dsa_jax.engine import request as request_lib
from dsa_jax.engine import text as text_lib


@dataclasses.dataclass(eq=False)
class Prompt:
  """What the samples of one request share."""

  request: request_lib.Request
  leaders: "dict[int, Sequence]" = dataclasses.field(default_factory=dict)
  """The sample that caches the prompt for the others, in each group of slots
  where one does."""
  trunks: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  """The prompt's pages, in each group where it is cached: held until all of the
  samples have theirs."""
  unplaced: int = 0
  """Samples that have not had a slot yet."""
  log_probs: Float32[np.ndarray, " S"] | None = None
  """Of `tokens[1:]`, as far as they have been read; None if not asked for."""

  def __post_init__(self):
    if self.request.params.prompt_log_probs:
      missing = np.full(len(self.request.tokens) - 1, np.nan, np.float32)
      self.log_probs = missing


@dataclasses.dataclass(eq=False)
class Sequence:
  """A sample of a request.

  It has a slot from when it is placed until it ends or loses it; its tokens
  stay, so that another slot can go on with them.
  """

  prompt: Prompt
  seed: int
  stream: text_lib.TextStream | None
  """Makes its text, where there is a tokenizer."""
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  untruncated: list[float] = dataclasses.field(default_factory=list)
  versions: list[int] = dataclasses.field(default_factory=list)
  kept: list[np.ndarray] = dataclasses.field(default_factory=list)
  experts: list[np.ndarray] = dataclasses.field(default_factory=list)
  """Of each token that gave one: the prompt's last, then all but the last."""
  selected: list[np.ndarray] = dataclasses.field(default_factory=list)
  """Of every token from the first."""
  text: list[str] = dataclasses.field(default_factory=list)
  finish: request_lib.Finish | None = None
  preemptions: int = 0
  found: int | None = None
  """Tokens of the prompt that were in the cache when it came."""

  slot: int | None = None
  group: int = 0
  """Of its slot, or of its last one, like its pages."""
  pages: list[int] = dataclasses.field(default_factory=list)
  target: int = 0
  """Tokens to cache before it decodes: all but the last it had when placed."""
  cached: int = 0
  """Those of them that programs have been told to cache."""
  decodes: bool = False
  """Whether the device has it in its slot."""
  bound: int = 0
  """The most tokens that are cached after all programs that run."""
  registered: int = 0
  """Pages of it that can be found."""

  @property
  def known(self) -> Int32[np.ndarray, " S"]:
    """All of its tokens."""
    sampled = np.asarray(self.tokens, np.int32)
    return np.concatenate([self.prompt.request.tokens, sampled])

  @property
  def length(self) -> int:
    """How many these are."""
    return len(self.prompt.request.tokens) + len(self.tokens)

  @property
  def prefills(self) -> bool:
    """Whether it has a slot, and still has tokens to cache."""
    return self.slot is not None and self.cached < self.target

  @property
  def most_rows(self) -> int:
    """Tokens of it that are ever cached."""
    request = self.prompt.request
    return len(request.tokens) + request.params.max_tokens - 1
