"""Tables of runs, to the byte."""

from experiments.core import tables


def test_tables_of_runs_have_a_rule_and_numbers_at_the_right():
  rows = [{"run": "a", "loss": 1.23456}, {"run": "bcd", "steps": 12000}]
  assert tables.text(rows) == (
    "run   loss   steps\n"
    "---  -----  ------\n"
    "a    1.235       -\n"
    "bcd      -  12,000"
  )
  assert tables.text([]) == "\n"
