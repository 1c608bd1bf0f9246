"""What the engine is asked for, and what it gives back.

Letters: P tokens of the prompt, T tokens that were generated, V vocabulary.
"""

import dataclasses
import operator
import secrets
from typing import Annotated, Any, Final, Literal

from jaxtyping import Float32, Int32, Integer
import numpy as np

from dsa_jax import ranges

type _Temperature = Annotated[int | float, ranges.Interval(0, 1e6)]
type _TopP = Annotated[int | float, ranges.Interval(0, 1, open="low")]
type _MinP = Annotated[int | float, ranges.Interval(0, 1, open="high")]
type Finish = Literal["stop", "length", "cancelled"]

MOST_STOP_IDS: Final = 8  # that a slot of the engine has room for
type _StopIds = Annotated[
  tuple[ranges.Index, ...], ranges.Length(0, MOST_STOP_IDS, "entries")
]
type _Stops = Annotated[
  tuple[ranges.Text, ...], ranges.Length(0, 64, "entries")
]
type _Samples = Annotated[int, ranges.Interval(1, 1024)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How a request's tokens are drawn: temperature, top-k, top-p, then min-p."""

  max_tokens: ranges.Count = 256
  """Tokens of a sample; fewer, if it stops."""
  temperature: _Temperature = 1.0
  """0: the likeliest token, of equals the lowest id."""
  top_k: ranges.Index = 0
  """Keep this many of the likeliest tokens; 0: all."""
  top_p: _TopP = 1.0
  """Keep the likeliest tokens that have this probability together."""
  min_p: _MinP = 0.0
  """Keep tokens of at least this probability relative to the likeliest."""
  seed: ranges.Seed | None = None
  """What is drawn depends on it and the position alone; None: a fresh one."""
  stop_ids: _StopIds = ()
  """A sample ends with any of these ids."""
  stop: _Stops = ()
  """A sample ends where any of these texts would begin."""
  n: _Samples = 1
  """Samples of the prompt."""
  prompt_log_probs: bool = False
  """Return the log-probs of the prompt's tokens, too."""

  def __post_init__(self):
    ranges.check(self)

  @property
  def cuts(self) -> bool:
    """Whether some tokens may not be drawn."""
    return (
      self.temperature < float(np.finfo(np.float32).tiny)
      or self.top_k > 0
      or self.top_p < 1
      or self.min_p > 0
    )


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Request:
  """A prompt, and how it is to be continued."""

  tokens: Int32[np.ndarray, " P"]
  """The prompt's ids, read-only."""
  params: SamplingParams

  def __init__(self, tokens: Any, params: SamplingParams = SamplingParams()):
    """Copies the prompt.

    Args:
      tokens: Ids: a list, a tuple, or an array of one dimension.
      params: How to continue them.

    Raises:
      ValueError: There is no token, or one that is no id, or `params` are no
        `SamplingParams`.
    """
    if not isinstance(params, SamplingParams):
      raise ValueError(
        f"Request: params={ranges.shown(params)} must be SamplingParams(...)."
      )
    object.__setattr__(self, "tokens", _ids(tokens))
    object.__setattr__(self, "params", params)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Result:
  """One sample of a request.

  Of one that was cancelled, all but tokens, text and their log-probs is None.
  Where weights changed on the way, what is told of the prompt's tokens is by
  any of those that cached them.
  """

  prompt: Int32[np.ndarray, " P"]
  tokens: Int32[np.ndarray, " T"]
  """With the stop id or the tokens of the stop text that ended them."""
  text: str | None
  """Of the tokens, before a stop text; None: the engine has no tokenizer."""
  log_probs: Float32[np.ndarray, " T"]
  """Under the distribution that each token was drawn from."""
  untruncated: Float32[np.ndarray, " T"]
  """With the temperature alone, over the whole vocabulary; at temperature 0, as
  if it were 1."""
  finish: Finish
  versions: Int32[np.ndarray, " T"]
  """Of the weights that gave each token."""
  cached_tokens: int
  """Tokens of the prompt that were found in the prefix cache."""
  prompt_log_probs: Float32[np.ndarray, " P-1"] | None
  """Of `prompt[1:]`, untempered."""
  kept: tuple[Integer[np.ndarray, " T+1"], Int32[np.ndarray, " N"]] | None
  """Ids that each token was drawn from: those of token t are the second array's
  from the first one's [t] to its [t + 1]. None if all of them were."""
  experts: Integer[np.ndarray, "P+T-1 Lmoe J"] | None
  """Of every token that was fed: all but the last."""
  selected: Int32[np.ndarray, "P+T-1 L K"] | None
  """Keys that it read, ascending, then -1."""
  preemptions: int
  """How often it lost its pages and was computed again."""


def seeds(params: SamplingParams) -> list[int]:
  """One seed a sample, all different; the first is the request's own.

  Sample j's depends on the request's and j: not on how many there are.
  """
  first = secrets.randbits(32) if params.seed is None else params.seed
  # Of 32 bits, two are equal now and then: more are made than needed.
  more = np.random.SeedSequence(first).generate_state(2 * params.n).tolist()
  return list(dict.fromkeys([first, *more]))[: params.n]


def check(
  request: Request,
  *,
  vocab: int,
  max_length: int,
  has_tokenizer: bool,
) -> None:
  """Refuses what an engine can never do.

  Args:
    request: What is asked for.
    vocab: V, the model's.
    max_length: Tokens of the longest sequence that a slot can hold.
    has_tokenizer: Whether the engine can tell a token's text.

  Raises:
    ValueError: An id is not in the vocabulary, the sequence would be too long,
      or there are stop texts but no tokenizer.
  """
  params = request.params
  for (i,) in np.argwhere(request.tokens >= vocab)[:1]:
    raise ValueError(
      f"Request: tokens[{i}]={request.tokens[i]} is no id: the vocabulary has "
      f"{vocab}, from 0."
    )
  for i, stop in enumerate(params.stop_ids):
    if stop >= vocab:
      raise ValueError(
        f"SamplingParams: stop_ids[{i}]={stop} is no id: the vocabulary has "
        f"{vocab}, from 0."
      )
  if params.top_k > vocab:
    raise ValueError(
      f"SamplingParams: top_k={params.top_k} is above the vocabulary's {vocab} "
      "tokens; 0 keeps all."
    )
  P, T = len(request.tokens), params.max_tokens
  if P + T > max_length:
    raise ValueError(
      f"Request: {P} tokens of the prompt and max_tokens={T} are more than the "
      f"{max_length} that a slot of the engine can hold; shorten the prompt, "
      "lower max_tokens, or make the engine's pool_tokens or max_length larger."
    )
  if params.stop and not has_tokenizer:
    raise ValueError(
      f"SamplingParams: stop={ranges.shown(params.stop)} are texts, but the "
      "engine has no tokenizer; give it one, or use stop_ids."
    )


def _ids(tokens: Any) -> Int32[np.ndarray, " P"]:
  """A copy of a prompt, which nobody can change."""
  if isinstance(tokens, list | tuple):
    for i, token in enumerate(tokens):
      if not _is_whole(token):
        raise _no_id(i, token)
    # Ids too large for any array are told like others.
    ids_P = np.array([operator.index(x) for x in tokens], object)
  else:
    ids_P = _array(tokens)
  if ids_P.ndim != 1 or ids_P.size == 0:
    raise ValueError(
      f"Request: the tokens have shape {ids_P.shape}, which is empty or not "
      "[P]; give one prompt, of at least one token."
    )
  for (i,) in np.argwhere((ids_P < 0) | (ids_P >= 2**31))[:1]:
    raise _no_id(int(i), ids_P[i])
  ids_P = ids_P.astype(np.int32)
  ids_P.flags.writeable = False
  return ids_P


def _array(tokens: Any) -> Integer[np.ndarray, "..."]:
  try:
    array = np.asarray(tokens)
  except (TypeError, ValueError):  # such as a key of jax.random
    array = None
  # To NumPy, spans of time are integers.
  if array is None or array.dtype.kind not in "iu":
    raise ValueError(
      f"Request: tokens={ranges.shown(tokens)} must be a list or an array of "
      "whole numbers; encode a text first."
    )
  return array


def _is_whole(token: Any) -> bool:
  try:
    operator.index(token)
  except TypeError:
    return False
  return not isinstance(token, bool)


def _no_id(i: int, token: Any) -> ValueError:
  return ValueError(
    f"Request: tokens[{i}]={ranges.shown(token)} is no id; give whole numbers "
    "from 0 to the size of the vocabulary."
  )
