"""What every worker pays before its first test."""


def test_importing_the_tests_compiles_next_to_nothing(pytestconfig):
  """A value that a program computes belongs in a test, or behind a function.

  Each worker imports all files, with a cold cache and for a single test, too.
  """
  assert pytestconfig.programs_compiled < 200
