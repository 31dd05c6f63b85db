"""What users reach is on a list: what goes from it, goes deliberately."""

from tests import reach
from tests.test_contents import ROOT

GOLDEN = ROOT / "tests" / "golden" / "reach.txt"
MEND = "python -m tests.reach > tests/golden/reach.txt"


def test_what_users_reach_is_on_the_list():
  listed = {*GOLDEN.read_text("utf-8").splitlines()}
  found = {*reach.reached()}
  assert sorted(listed - found) == [], f"is gone; if it should be: {MEND}"
  assert sorted(found - listed) == [], f"is new: {MEND}"
