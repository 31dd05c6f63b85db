"""Sizes that are rounded up."""

from research import rounding


def test_powers_of_two_stay_and_others_go_up():
  sizes = [rounding.next_power_of_two(n) for n in range(10)]
  assert sizes == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]
  assert rounding.next_power_of_two(2**70 + 1) == 2**71
