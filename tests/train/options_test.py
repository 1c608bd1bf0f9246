"""Options: what they make of a config, and how errors name them."""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import json
import math
import random
import re
import time
import typing
from typing import Any, Literal

import pytest

from tests.model import ranges_test
from train import config as config_lib
from train import convert
from train import main
from train import options
from train import report

TINY = "--config=configs/tiny.py"
CONFIG = config_lib.load("configs/tiny.py")


def placed(cfg: Any, way: list[str], value: Any) -> Any:
  """What tyro gives where one option says something, as `make` takes it."""
  if not way:
    return value
  name, *rest = way
  if isinstance(cfg, tuple):
    i = int(name)
    return (*cfg[:i], placed(cfg[i], rest, value), *cfg[i + 1 :])
  made = not isinstance(cfg, options.Unmade)
  cls, values = (type(cfg), vars(cfg)) if made else (cfg.cls, cfg.values)
  return options.Unmade(
    cls, {**values, name: placed(values[name], rest, value)}
  )


def leaves(cfg: Any, path: str = ""):
  """The path and the type of every option."""
  if isinstance(cfg, tuple):
    for i, entry in enumerate(cfg):
      yield from leaves(entry, f"{path}{i}.")
    return
  for field in dataclasses.fields(cfg):
    value, inner = getattr(cfg, field.name), f"{path}{field.name}"
    holds = isinstance(value, tuple) and dataclasses.is_dataclass(value[:1])
    if dataclasses.is_dataclass(value) or holds or field.name in TUPLES:
      yield from leaves(value, f"{inner}.")
    elif not isinstance(value, tuple):
      yield inner, field.type


TUPLES = ("stages", "sources")
KINDS = dict(leaves(CONFIG))
SPELLED = {"--" + path.replace("_", "-") for path in KINDS}


def typed(kind: Any, text: str) -> Any:
  """A text as tyro reads it for a field of this type."""
  found = dict(ranges_test.leaves(kind))
  if type(None) in found and text == "None":
    return None
  if Literal in found:
    while isinstance(kind, typing.TypeAliasType):
      kind = kind.__value__
    choices = {str(x): x for x in typing.get_args(kind)}
    if text not in choices:
      raise ValueError(f"{text} is no choice")
    return choices[text]
  readers: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str}
  for leaf, read in readers.items():
    if leaf in found:
      return read(text)
  return {"True": True, "False": False}[text]


def given(*said: tuple[str, Any]) -> config_lib.TrainConfig:
  """The config that options, already read, make of configs/tiny.py."""
  whole: Any = CONFIG
  for path, value in said:
    whole = placed(whole, path.split("."), value)
  return options.make(whole, "")


def refused(*said: tuple[str, Any]) -> str:
  with pytest.raises(ValueError) as error:
    given(*said)
  return main.refusal(error.value)


@pytest.mark.parametrize(
  ("path", "value", "says"),
  [
    ("run_dir", "", "--run-dir='' must be 1 to 4096 characters"),
    ("log.sample_prompt", "", "--log.sample-prompt='' must be"),
    ("data.tokenizer", "", "--data.tokenizer='' must be"),
    ("data.sources.0.path", "", "--data.sources.0.path='' must be"),
    ("data.sources.0.weight", "nan", "--data.sources.0.weight=nan must be"),
    ("data.sources.0.weight", "-1", "--data.sources.0.weight=-1.0 must be"),
    ("data.sources.0.weight", "0", "--data.sources.0.weight=0.0 must be"),
    ("data.heldout_fraction", "1", "--data.heldout-fraction=1.0 must be"),
    ("data.max_bad_share", "1", "--data.max-bad-share=1.0 must be"),
    ("data.retrieval.fraction", "nan", "--data.retrieval.fraction=nan must"),
    ("stages.0.mtp_weight", "nan", "--stages.0.mtp-weight=nan must be"),
    ("stages.0.steps", "2147483600", "have 2147483700 steps, more than"),
    ("stages.0.batch_size", "1000000000", "--stages.0.batch-size=1000000000"),
    ("stages.1.seq_len", "16777217", "--stages.1.seq-len=16777217"),
    ("model.yarn.beta_slow", "nan", "--model.yarn.beta-slow=nan must be"),
    ("model.yarn.beta_slow", "32", "--model.yarn.beta-fast=32.0 must be above"),
    ("model.yarn.mscale", "-inf", "--model.yarn.mscale=-inf must be"),
    ("model.norm_eps", "-1", "--model.norm-eps=-1.0 must be"),
    ("model.rope_theta", "0", "--model.rope-theta=0.0 must be above 1"),
    ("model.num_layers", "1000000000000", "--model.num-layers=1000000000000"),
    ("optimizer.beta2", "2", "--optimizer.beta2=2.0 must be at least 0 and"),
    ("optimizer.peak_lr", "inf", "--optimizer.peak-lr=inf must be"),
    ("optimizer.weight_decay", "nan", "--optimizer.weight-decay=nan must be"),
    ("log.sample_temperature", "nan", "--log.sample-temperature=nan must be"),
    ("seed", "4294967296", "--seed=4294967296 must be"),
    ("seed", "18446744073709551616", "--seed=2^64 or more must be"),
    ("stop_at", "381", "--stop-at=381 is beyond the last step, 380"),
    ("profile", "370,381", "--profile='370,381' is beyond the last step"),
    ("profile", "٣,٤", "must be two steps"),
    ("profile", "3", "must be two steps"),
    ("profile", "4,3", "must be two steps"),
    ("profile", "0,3", "must be two steps"),
    ("profile", "1,99999999999", "must be two steps"),
    ("mesh.data", "1048577", "--mesh.data=1048577 must be"),
    ("distributed.process", "1", "belong together"),
  ],
)
def test_refuses(path, value, says):
  text = refused((path, typed(KINDS[path], value)))
  assert text.startswith("error: ") and says in text


POOL = (
  *("nan", "inf", "-inf", "NaN", "Infinity", "-0.0", "0", "-1", "1", "2", "3"),
  *("1e-320", "1e-46", "1e308", "1e400", "1e9", "0.99999999", "0.5", "2.0"),
  *("4294967295", "4294967296", "18446744073709551616", "1000000000000"),
  *("9" * 400, "9" * 5000, "1_0", " 7 ", "٣", "0x10", "1e3", "1,2", "--", "-"),
  *("", " ", "None", "True", "maybe", "a\udcffb", "a\nb", "é", "x" * 70000),
)


def in_range(cfg: Any) -> None:
  """Fails for a number that is not finite, or not where its type says."""
  if isinstance(cfg, tuple):
    for entry in cfg:
      in_range(entry)
  if not dataclasses.is_dataclass(cfg):
    return
  for field in dataclasses.fields(cfg):
    value = getattr(cfg, field.name)
    in_range(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      is_choice = Literal in dict(ranges_test.leaves(field.type))
      assert math.isfinite(value)
      assert is_choice or ranges_test.admits(field.type, value)


def is_told_well(text: str) -> bool:
  """Whether an error is a line, not long, that names an option there is."""
  named = re.findall(r"--[\w.-]*\w", text)
  known = SPELLED | {"--mesh.fsdp", "--stages"}
  return (
    text.startswith("error: ")
    and "\n" not in text
    and len(text) < 700
    and (any(name in known for name in named) or "The stages have" in text)
  )


def test_no_command_line_gets_past():
  """Each is a config whose numbers are in range, or is refused in a line."""
  rng = random.Random(17)
  taken = told = 0
  while taken + told < 600:
    chosen = rng.sample(sorted(KINDS), rng.choice((1, 1, 1, 2, 3)))
    said = [(path, rng.choice(POOL)) for path in chosen]
    began = time.monotonic()
    try:
      read = [(path, typed(KINDS[path], text)) for path, text in said]
    except (KeyError, ValueError):
      continue  # as tyro does
    try:
      cfg = given(*read)
    except ValueError as e:
      told += 1
      assert is_told_well(main.refusal(e)), (said, str(e))
    else:
      taken += 1
      in_range(cfg)
      json.dumps(dataclasses.asdict(cfg), allow_nan=False)
    assert time.monotonic() - began < 5
  assert min(taken, told) > 100


def found(said: Any, path: str) -> Any:
  """What tyro gave for one option."""
  for name in path.split("."):
    said = said[int(name)] if isinstance(said, tuple) else said.values[name]
  return said


def spelt(path: str, text: str) -> str:
  """An option as one types it."""
  if KINDS[path] is not bool or text not in ("True", "False"):
    return f"--{path}={text}"
  inside, _, name = path.rpartition(".")
  dot, no = "." * bool(inside), "no-" * (text == "False")
  return f"--{inside}{dot}{no}{name}"


def test_command_lines_are_read_as_here(monkeypatch):
  """Of real ones, which say all options: so the cases above are theirs too."""
  said: list[Any] = []
  make = lambda x, _: said.append(x) or CONFIG
  monkeypatch.setattr(options, "make", make)
  rng = random.Random(17)
  for _ in range(20):
    args, read, wrong = [], {}, []
    for path, kind in KINDS.items():
      text = rng.choice(("True", "False") if kind is bool else POOL)
      try:
        read[path] = typed(kind, text)
      except (KeyError, ValueError):
        wrong.append(spelt(path, text))
      else:
        args.append(spelt(path, text))
    rng.shuffle(args)
    main.parse([TINY, *args])
    for path, value in read.items():  # of numbers, nan is not equal to itself
      assert repr(found(said[-1], path)) == repr(value), path
    option = rng.choice(wrong)
    assert option.partition("=")[0].replace("_", "-") in told(option)
  assert len(said) == 20


def told(*args: str) -> str:
  """What a command line is refused with; fails if it is taken."""
  said = io.StringIO()
  with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    try:
      main.parse([TINY, *args])
    except ValueError as e:
      text = main.refusal(e)
      assert "\n" not in text
      return text
    except SystemExit as e:
      assert e.code == 2
      return " ".join(said.getvalue().replace("│", " ").split())
  raise AssertionError(f"{args} was taken")


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["--seed=1", "--seed=2"], "--seed is given twice"),
    (["--seed", "1", "--seed=2"], "--seed is given twice"),
    (["--resume", "--no-resume"], "--resume is given twice"),
    (["--log.tensorboard", "--log.no-tensorboard"], "--log.tensorboard is"),
    (
      ["--optimizer.peak-lr=1e-3", "--optimizer.peak_lr=2e-3"],
      "--optimizer.peak-lr is given twice",
    ),
    (["--config=configs/h200_node.py"], "--config is given twice"),
    (["--config", "configs/h200_node.py"], "--config is given twice"),
    (["--config"], "--config is given twice"),
    (["--data.sources.1.weight=1"], "Unrecognized options"),
    (["--seed=0x10"], "--seed"),
    (["--seed"], "--seed"),
    (["--resume=maybe"], "--resume takes no value, and is given 'maybe'"),
    (["--resume="], "--resume takes no value, and is given '': give --resume"),
    (["--log.tensorboard", "on"], "or --log.no-tensorboard alone"),
    (
      ["--model.normalize_expert_weights=0"],
      "--model.normalize-expert-weights",
    ),
    (["--seed=3", "--check", "true", "--kernels"], "--check takes no value"),
    (["--model.indexer-types", "full", "half"], "half"),
    (["--model.dtype=float16", "surplus"], "float16"),
    (["--tyro-write-completion", "nosh", "-"], "nosh"),
    (["--optimizer.beta2=2"], "error: --optimizer.beta2=2.0 must be at least"),
  ],
)
def test_refuses_command_lines(args, says):
  text = told(*args)
  assert says in text and len(text) < 1000


@pytest.mark.parametrize(
  ("program", "args"),
  [
    (convert, ["in", "out", "--dtype=bfloat16", "--dtype=float32"]),
    (report, ["run", "--out=a", "--out", "b"]),
  ],
)
def test_other_programs_take_an_option_once_too(monkeypatch, program, args):
  monkeypatch.setattr("sys.argv", ["program", *args])
  with pytest.raises(SystemExit, match="^error: --[a-z]* is given twice"):
    program.main()


def test_a_name_that_is_no_text_is_refused():
  """Bytes of a command line that are not UTF-8 come so."""
  text = refused(("run_dir", "a\udcffb"))
  assert "--run-dir='a\\udcffb' must be text, in UTF-8" in text


def test_the_same_twice_is_once():
  made = main.parse(
    [TINY, TINY, "--resume", "--seed=3", "--seed=3", "--resume"]
  )
  assert made.resume and made.seed == 3


def test_an_error_names_options_as_they_are_typed():
  spell = lambda text, path="": options.spelled(
    text, config_lib.TrainConfig, path
  )
  assert spell("run_dir=a is a file") == "--run-dir=a is a file"
  assert spell("raise data.max_bad_share to go on") == (
    "raise --data.max-bad-share to go on"
  )
  assert spell("set data.sources.0.text_field, stages.N.lr_scale.") == (
    "set --data.sources.0.text-field, --stages.N.lr-scale."
  )
  for plain in (
    *("data and steps, a/data.shards=2", "--mesh.data=2 is", "model.pyx"),
    *("my.run_dir=3", "model.top_k.x"),
  ):
    assert spell(plain) == plain
