"""Tests have the same names whoever collects them, and whenever."""

import pytest


@pytest.mark.parametrize("value", [b"\0", (b"\0", 1), {"x": b"\0"}])
def test_names_hold_no_bytes(request: pytest.FixtureRequest, value):
  del value
  assert request.node.name.endswith(("[bytes]", "[bytes 1]", "[x=bytes]"))
