"""The memory that a program may use."""

import os

import pytest

from train.host import memory

HOST = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
  ("limits", "expected"),
  [
    ((None, None), HOST),
    (("max\n", None), HOST),
    (("1073741824\n", None), 2**30),
    ((None, "1073741824\n"), 2**30),
    ((None, "9223372036854771712\n"), HOST),  # version 1 has no word for none
    (("2147483648\n", "1073741824\n"), 2**30),
    (("", "not a number"), HOST),
  ],
)
def test_is_the_hosts_or_the_containers(
  tmp_path, monkeypatch, limits, expected
):
  files = []
  for i, text in enumerate(limits):
    files.append(tmp_path / str(i))
    if text is not None:
      files[-1].write_text(text)
  monkeypatch.setattr(memory, "_LIMITS", files)
  assert memory.total() == expected
