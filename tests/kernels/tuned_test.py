"""Tables of tiles: what they say is found, and what they have is of a kind."""

import json
import pathlib

import pytest

from pallas_kernels import devices
from pallas_kernels import tuned

TABLE = {
  "op": [
    {"shape": {"N": 16, "K": 2048}, "tiles": {"bQ": 16}},
    {"shape": {"N": 16}, "tiles": {"bQ": 8}},
  ]
}


@pytest.mark.parametrize(
  "op, shape, expected",
  [
    ("op", dict(N=16, K=2048, S=7), {"bQ": 16}),
    ("op", dict(N=16, K=512), {"bQ": 8}),
    ("op", dict(N=128, K=2048), None),
    ("other", dict(N=16), None),
  ],
)
def test_the_first_entry_that_fits(monkeypatch, op, shape, expected):
  monkeypatch.setattr(tuned, "_table", {"chip": TABLE}.__getitem__)
  assert tuned.tiles(op, "chip", **shape) == expected


def test_a_chip_without_a_table_has_no_entries():
  assert tuned.tiles("sparse_mla", "v4", N=128) is None


def test_tables_are_of_known_chips_and_have_tiles():
  folder = pathlib.Path(tuned.__file__).parent
  files = {x.stem: x for x in folder.glob("*.json")}
  tpus = {x.name for x in devices.DEVICES if isinstance(x, devices.Tpu)}
  assert set(files) == tpus
  for file in files.values():
    for entries in json.loads(file.read_text(encoding="utf-8")).values():
      for entry in entries:
        assert set(entry) == {"shape", "tiles"}
        assert all(x > 0 for x in [*entry["shape"].values()])
        assert all(x > 0 for x in [*entry["tiles"].values()])
