"""Whether two runs of one config came to the same, bit for bit."""

import collections
import json
import pathlib
from typing import Any, Final

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

# What may differ from run to run: how long things took.
_TIMINGS: Final = ("tokens_per_second", "ms_per_step", "mfu")
_KINDS: Final = ("train", "eval", "sample")


def differences(run: pathlib.Path, unbroken: pathlib.Path) -> list[str]:
  """What `run` has otherwise than `unbroken`, both of them finished.

  Compared are the checkpoints at the ends of all stages, arrays and place in
  the data, and every line of metrics.jsonl without its timings.
  """
  stages = json.loads((unbroken / "config.json").read_bytes())["stages"]
  ends = np.cumsum([stage["steps"] for stage in stages]).tolist()
  found = []
  for step in ends:
    paths = [folder / "checkpoints" / str(step) for folder in (run, unbroken)]
    if not paths[0].exists():
      found.append(f"checkpoint {step} is missing")
      continue
    one, other = map(_checkpoint, paths)
    found += [
      f"checkpoint {step}: {name} differs"
      for name in sorted(one.keys() | other.keys())
      if one.get(name) != other.get(name)
    ]
  return found + _metrics(run, unbroken)


def _checkpoint(path: pathlib.Path) -> dict[str, Any]:
  """All that a checkpoint holds by name, arrays as their type and bytes."""
  saved: Any = ocp.metadata(str(path), "state").metadata
  here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved
  )
  loaded: Any = ocp.load_checkpointables(str(path), {"state": like})
  leaves = jax.tree_util.tree_leaves_with_path(loaded["state"])
  held = {
    jax.tree_util.keystr(name): (x.shape, str(x.dtype), np.asarray(x).tobytes())
    for name, x in leaves
  }
  metadata: Any = ocp.checkpointables_metadata(str(path))
  progress = json.loads(metadata.custom_metadata["progress"])
  # Who was stopped right after this step evaluates when it goes on.
  del progress["owes_evaluation"]
  return held | {"the progress": progress}


def _metrics(run: pathlib.Path, unbroken: pathlib.Path) -> list[str]:
  one, other = (_lines(folder / "metrics.jsonl") for folder in (run, unbroken))
  found = []
  for (step, kind), texts in sorted(other.items()):
    have = one.pop((step, kind), [])
    if len(have) != len(texts):
      found.append(
        f"metrics: {len(have)} {kind} lines of step {step}, not {len(texts)}"
      )
    elif have != texts:
      found.append(f"metrics: {kind} of step {step}: {have}, not {texts}")
  return found + [
    f"metrics: {kind} of step {step} should not be there"
    for step, kind in sorted(one)
  ]


def _lines(file: pathlib.Path) -> dict[tuple[int, str], list[str]]:
  """By step and kind; as text, in which NaN equals itself."""
  lines = collections.defaultdict(list)
  for text in file.read_text(encoding="utf-8").splitlines():
    line = json.loads(text)
    if line["kind"] in _KINDS:
      values = {k: v for k, v in line.items() if k not in _TIMINGS}
      lines[line["step"], line["kind"]].append(json.dumps(values))
  return dict(lines)
