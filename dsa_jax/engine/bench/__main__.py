"""Times and checks the engine on random weights, each mode what it says.

Rows of results are lines of JSON. With MODE -h: a mode's options.
"""

import argparse
from collections.abc import Callable
import pathlib
import sys
import textwrap
from typing import Any, Final, NamedTuple

import jax

from dsa_jax.engine.bench import attention
from dsa_jax.engine.bench import check
from dsa_jax.engine.bench import engines
from dsa_jax.engine.bench import models
from dsa_jax.engine.bench import picture
from dsa_jax.engine.bench import positions
from dsa_jax.engine.bench import rows

_PROGRAM: Final = "python -m dsa_jax.engine.bench"
_DEFAULT_LENGTHS: Final = [
  *(512, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768, 65536, 98304),
  131072,
]


def _count(text: str) -> int:
  if not text.isascii() or not text.isdigit() or int(text) == 0:
    raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
  return int(text)


def _rate(text: str) -> float:
  try:
    rate = float(text)
  except ValueError:
    rate = 0.0
  if not 0 < rate < 1e3:
    raise argparse.ArgumentTypeError(f"{text} is no rate in TB/s")
  return rate


def _one(default: int, about: str) -> dict[str, Any]:
  about = f"{about} (default: {default})"
  return dict(type=_count, metavar="N", default=default, help=about)


def _counts(default: list[int], about: str) -> dict[str, Any]:
  shown = " ".join(map(str, default))
  return _one(0, "") | dict(
    nargs="+", default=default, help=f"{about} (default: {shown})"
  )


_ATTENTION: Final = ["sparse", "dense"]
_FLAG: Final[dict[str, Any]] = dict(action="store_true")
_STORED: Final = "of {} in the cache (default: the activations')"
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
  "model": dict(
    choices=models.MODELS,
    default="wide",
    help="DeepSeek-V3.2's widths with 32 experts, 4 layers of which the first "
    "has none (wide), or 2 of experts (experts); or a model for CPUs (tiny)",
  ),
  "slots": _counts([32], "sequences at once"),
  "lengths": _counts([4096], "tokens of a sequence"),
  "steps": _one(16, "steps of a call"),
  "chunk": _one(512, "tokens of a prompt cached at once"),
  "lanes": _one(1, "prompts cached at once"),
  "attention": dict(choices=_ATTENTION, default="sparse"),
  "speculate": _FLAG | {"help": "verify a draft with each token"},
  "prompts": _one(64, "prompts"),
  "samples": _one(8, "samples of each"),
  "prompt": _one(128, "tokens of a prompt"),
  "mean": _one(128, "tokens of a sample, in the mean"),
  "longest": _one(4096, "the most tokens of a sample"),
  "sigma": dict(
    type=float, default=1.0, help="of their lengths' logarithms (default: 1)"
  ),
  "tokens": _one(32, "tokens of a sample"),
  "index-key-dtype": dict(
    choices=["float8_e4m3fn"], help=_STORED.format("index keys")
  ),
  "latent-dtype": dict(
    choices=["float8_e4m3fn"], help=_STORED.format("latents")
  ),
  "phases": dict(
    nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"]
  ),
  "bandwidth": dict(
    type=_rate, metavar="TB/S", help="of the device; measured if not given"
  ),
  "json": dict(type=pathlib.Path, metavar="FILE", help="for all results"),
  "out": dict(type=pathlib.Path, metavar="PNG", required=True),
}


class Mode(NamedTuple):
  """A mode of the command line."""

  run: Callable[[Any], None]
  does: str
  example: str
  options: str
  """Names of those of `_OPTIONS` that it takes."""
  others: dict[str, dict[str, Any]] = {}
  """Options that are other ones here."""


MODES: Final = {
  "decode": Mode(
    engines.decode,
    "times steps for each number of --slots and each of --lengths, of a "
    "program and a pool of random rows for the longest of them, whose memory "
    "it tells",
    "--slots 1 8 32 --lengths 4096 131072",
    "model slots lengths steps attention speculate",
  ),
  "positions": Mode(
    positions.positions,
    "times a token by its position, in prefill (a chunk after so many tokens "
    "of one prompt) and in decoding (steps that end there), by programs and "
    "pools for the last position, beside the least time at the rates of a "
    "matmul and a copy measured here; then slopes above K, and where sparse "
    "attention bends",
    "--slots 1 32 --chunk 2048 --json positions.json",
    "model slots lengths steps chunk attention phases bandwidth json",
    {
      "lengths": _counts(_DEFAULT_LENGTHS, "positions"),
      "attention": dict(nargs="+", choices=_ATTENTION, default=_ATTENTION),
    },
  ),
  "picture": Mode(
    picture.picture,
    "draws what `positions` wrote, on any machine: cost by position, dense and "
    "sparse",
    "positions.json --out positions.png",
    "files out",
    {"files": dict(type=pathlib.Path, metavar="FILE", nargs="+")},
  ),
  "attention": Mode(
    attention.attention,
    "checks one layer's attention at decode against plain XLA, then times "
    "indexer_topk, sparse_mla, and dense attention; on a GPU also each kernel",
    "--slots 1 8 32 64 --lengths 4096 131072",
    "model slots lengths speculate",
  ),
  "check": Mode(
    check.check,
    "compares samples in company with those alone, bit for bit, and each "
    "layer's attention in a pool of --slots sequences with that in a pool of "
    "each alone",
    "--slots 32 --lengths 131072",
    "model slots lengths chunk steps speculate prompt tokens",
    {"prompt": _one(3000, "tokens of the longest prompt in company")},
  ),
  "prefill": Mode(
    engines.prefill,
    "times whole prompts of each of --lengths, cached in chunks",
    "--lengths 131072 --chunk 4096",
    "model lengths chunk attention",
  ),
  "group": Mode(
    engines.group,
    "times the last first token of 8 samples of one prompt, as one request "
    "and as 8 prompts that share nothing",
    "--lengths 4096",
    "model lengths chunk",
  ),
  "load": Mode(
    engines.load,
    "times --prompts x --samples with log-normal lengths, in tokens/s",
    "--model=tiny --prompts=16 --samples=4 --slots=8",
    "model slots steps chunk lanes prompts samples prompt mean longest sigma",
  ),
  "host": Mode(
    engines.host,
    "times what the host does for a call, and counts the calls that come so "
    "late that the device has waited for them",
    "--slots 32 --lengths 4096",
    "model slots lengths steps chunk",
  ),
}


def _parser() -> argparse.ArgumentParser:
  examples = "\n".join(
    f"  {_PROGRAM} {name} {mode.example}" for name, mode in MODES.items()
  )
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(
    prog=_PROGRAM,
    description=__doc__,
    epilog=f"examples:\n{examples}",
    formatter_class=raw,
  )
  modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
  for name, mode in MODES.items():
    of_mode = modes.add_parser(
      name,
      help=mode.does,
      description=textwrap.fill(f"{mode.does[0].upper()}{mode.does[1:]}.", 80),
      epilog=f"example:\n  {_PROGRAM} {name} {mode.example}",
      formatter_class=raw,
    )
    options = _OPTIONS | mode.others
    names = mode.options.split()
    if "model" in names:
      names += ["index-key-dtype", "latent-dtype"]
    for option in names:
      flag = option if option == "files" else f"--{option}"
      of_mode.add_argument(flag, **options[option])
    # Modes that cannot draft do not.
    of_mode.set_defaults(refuse=of_mode.error, speculate=False)
  return parser


def main() -> None:
  args = _parser().parse_args()
  refuse = vars(args).pop("refuse")
  try:
    if args.mode != "picture":
      device = jax.devices()[0].device_kind
      rows.say(device=device, jax=jax.__version__, **vars(args))
    MODES[args.mode].run(args)
  except ValueError as e:
    refuse(str(e))
  except (rows.Wrong, ImportError, OSError) as e:
    sys.exit(f"error: {e}")
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    sys.exit(f"error: {_too_large(args)}")


def _too_large(args) -> str:
  sizes = {x: getattr(args, x, None) for x in ("slots", "lengths", "prompt")}
  given = ", ".join(f"{x}={n}" for x, n in sizes.items() if n is not None)
  return (
    f"the device's memory is too small for {args.mode} with {given}; the last "
    "row above is the last that was measured. Give fewer slots, or shorter "
    "lengths."
  )


if __name__ == "__main__":
  main()
