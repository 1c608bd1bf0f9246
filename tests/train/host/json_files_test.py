"""Files of JSON that are what was written, or are named."""

import pytest

from train.host import json_files

BAD = {
  "empty": b"",
  "blank": b" \n",
  "half": b'{"a": ',
  "zeros": b"\0" * 8,
  "no text": b"\xff\xfe\x00",
  "deep": b"[" * 10**5,
  "long": b"1" * 5000,
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_damaged_is_named(tmp_path, bad):
  file = tmp_path / "state.json"
  file.write_bytes(BAD[bad])
  with pytest.raises(json_files.Damaged) as e:
    json_files.read(file)
  assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_so_is_what_cannot_be_read(tmp_path):
  (tmp_path / "folder").mkdir()
  for name in ("folder", "missing"):
    with pytest.raises(json_files.Damaged, match=f"{name} cannot be read"):
      json_files.read(tmp_path / name)
    with pytest.raises(json_files.Damaged, match=f"{name} cannot be read"):
      list(json_files.read_lines(tmp_path / name))


def test_half_a_line_at_the_end_is_left_out(tmp_path):
  file = tmp_path / "lines.jsonl"
  file.write_text('{"a": 1}\n[2]\n{"a": ')
  assert list(json_files.read_lines(file)) == [(1, {"a": 1}), (2, [2])]
  file.write_text('{"a": 1}\n[2]')  # only its end is missing
  assert list(json_files.read_lines(file)) == [(1, {"a": 1}), (2, [2])]


@pytest.mark.parametrize("bad", [x for x in BAD.values() if b"\n" not in x])
def test_a_bad_line_is_counted(tmp_path, bad):
  file = tmp_path / "lines.jsonl"
  file.write_bytes(b"1\n" + bad + b"\n3\n")
  lines = json_files.read_lines(file)
  assert next(lines) == (1, 1)
  with pytest.raises(json_files.Damaged, match="jsonl, line 2 is malformed"):
    next(lines)
