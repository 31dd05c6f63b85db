"""What every worker pays before its first test, and what of it is left."""

import collections


def test_importing_the_tests_compiles_next_to_nothing(pytestconfig):
  """A value that a program computes belongs in a test, or behind a function.

  Each worker imports all files, with a cold cache and for a single test, too.
  """
  assert pytestconfig.programs_compiled < 200


def test_what_is_left_of_a_test_is_not_the_reference_alone(request):
  """That is compared with itself: such a test cannot fail.

  Of the tests that are collected, here those of a run of the suite.
  """
  kept = collections.defaultdict(set)
  for item in request.session.items:
    if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
      kept[item.nodeid.partition("[")[0]].add(item.callspec.id)
  compared = {
    item.nodeid.partition("[")[0]
    for item in request.session.items
    if hasattr(item, "callspec") and item.callspec.id != "reference"
  }
  assert not [test for test in compared if kept.get(test) == {"reference"}]
