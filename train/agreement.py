"""What a cache in 8 bits changes: python -m train.agreement MODEL --text=FILE.

An engine reads prompts that a text is cut into, and continues each by its
likeliest tokens, once with every kind of cache. Prints a line of JSON for each:

  nats      by which log-probs of the prompts' own tokens differ from those with
            the plain cache; nats_worse: by which they are lower, with sign
  selected  part of the keys selected with the plain cache that are selected, by
            queries of the prompts that see more than K
  tokens    of a continuation that are the same, up to the first that is not
"""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any, Final

from train.host import program

if __name__ == "__main__":
  program.begin()  # before the imports that take seconds

import jax
from jaxtyping import Float
import numpy as np
import tyro

import dsa_jax
from dsa_jax import ranges
from dsa_jax.chat import tokenizer as tokenizer_lib
from dsa_jax.engine import request as request_lib
from train import options
from train.host import processes
from train.run import trained

_PAGE: Final = 128
_MOST_SLOTS: Final = 16
_KINDS: Final[dict[str, tuple[str, ...]]] = {
  "plain": (),
  "index keys": ("index_key_dtype",),
  "latents": ("latent_dtype",),
  "both": ("index_key_dtype", "latent_dtype"),
}


@dataclasses.dataclass(frozen=True)
class Agreement:
  """A model that attends sparsely, and a text to compare its caches on."""

  model: Annotated[
    tyro.conf.Positional[ranges.Text], tyro.conf.arg(metavar="MODEL")
  ]
  """As of train.generate."""
  text: ranges.Text
  """A file with a text, best one that the model was not trained on."""
  prompts: ranges.Count = 16
  """Prompts that are cut from its beginning."""
  length: ranges.Count = 1024
  """Tokens of each; more than K + 1, or no query has keys to select from."""
  max_tokens: ranges.Count = 256
  """Tokens of each continuation."""

  def __post_init__(self):
    ranges.check(self)

  def cut(self, tokens: np.ndarray) -> np.ndarray:
    """The prompts."""
    needed = self.prompts * self.length
    if len(tokens) < needed:
      raise ValueError(
        f"text={self.text} has {len(tokens)} tokens, but prompts="
        f"{self.prompts} of length={self.length} take {needed}; lower one."
      )
    return tokens[:needed].reshape(self.prompts, self.length)


def compare(cfg: Agreement) -> None:
  """Prints how each kind of cache agrees with the plain one.

  Raises:
    ValueError: The text is too short, or the model's widths cannot be kept in
      8 bits.
    OSError: A file cannot be read, or is not what was saved.
  """
  source = trained.Trained(cfg.model, None, None)
  tokenizer = tokenizer_lib.load_tokenizer(source.tokenizer)
  text = pathlib.Path(cfg.text).read_text(encoding="utf-8")
  prompts = cfg.cut(np.asarray(tokenizer.encode(text)))
  if cfg.length <= (least := source.config.top_k + 1):
    raise ValueError(
      f"length={cfg.length}: the model selects top_k={least - 1} keys, so that "
      f"no query of such a prompt leaves one out; give more than {least}."
    )
  params = dsa_jax.SamplingParams(
    max_tokens=cfg.max_tokens, temperature=0, prompt_log_probs=True
  )
  with jax.set_mesh(mesh := dsa_jax.make_mesh()):
    model = source.load(mesh, "sparse")
    plain: list[request_lib.Result] = []
    for name, flags in _KINDS.items():
      dtypes: dict[str, Any] = dict.fromkeys(flags, "float8_e4m3fn")
      engine = dsa_jax.Engine(
        model,
        slots=(slots := min(cfg.prompts, _MOST_SLOTS)),
        pool_tokens=slots
        * _PAGE
        * (2 + (cfg.length + cfg.max_tokens) // _PAGE),
        page=_PAGE,
        returns=("selected",),
        **dtypes,
      )
      found = [each for (each,) in engine.generate(list(prompts), params)]
      plain = plain or found
      rows = [_compare(*x, source.config.top_k) for x in zip(plain, found)]
      means = np.round(np.mean(rows, 0), 5).tolist()
      names = "nats", "nats_worse", "selected", "tokens"
      print(json.dumps({"cache": name} | dict(zip(names, means))), flush=True)


def _compare(
  a: request_lib.Result, b: request_lib.Result, K: int
) -> Float[np.ndarray, " 4"]:
  assert a.prompt_log_probs is not None and b.prompt_log_probs is not None
  assert a.selected is not None and b.selected is not None
  worse = a.prompt_log_probs - b.prompt_log_probs
  same = [
    np.isin(x, y).mean()
    for t in range(K, len(a.prompt) - 1)  # queries that see more than K keys
    for x, y in zip(a.selected[t], b.selected[t])
  ]
  first = int(np.append(a.tokens != b.tokens, True).argmax())
  means = np.abs(worse).mean(), worse.mean(), np.mean(same)
  return np.array([*means, first], float)


def main() -> None:
  processes.configure_platform()
  try:
    compare(
      options.parse(
        Agreement,
        sys.argv[1:],
        program="python -m train.agreement",
        description=str(__doc__),
      )
    )
  except (ValueError, OSError, ImportError, MemoryError) as e:
    sys.exit(f"error: {options.spelled(str(e), Agreement)}")


if __name__ == "__main__":
  program.run(main)
