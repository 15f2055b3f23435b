"""Factors by which a parallel value is guessed to be the reference's: sizes of groups, and what the reference divides by."""
from fractions import Fraction

import numpy as np

from trainverify.kernel.store import Store
from trainverify.relate.guess import MOST_COUNTS, Dictionary


def test_what_the_reference_divides_by_is_a_factor_also_with_sizes_of_groups():
    store = Store()
    guesses = Dictionary(store, [Fraction(3), Fraction(1, 3)])
    guesses.learn(np.array([7]), np.array([store.constant(Fraction(-1, 34))]))
    assert {Fraction(34), Fraction(1, 34), Fraction(102), Fraction(34, 3), Fraction(3, 34)} <= set(guesses.factors)
    assert len(set(guesses.factors)) == len(guesses.factors)


def test_other_numbers_are_none_and_there_are_not_many():
    store = Store()
    guesses = Dictionary(store, [Fraction(2), Fraction(1, 2)])
    before = guesses.factors
    for q in (Fraction(999, 1000), Fraction(5), Fraction(1, 2), Fraction(1, 1 << 40), Fraction(1, 10 ** 8)):
        guesses.learn(np.array([int(q * 1000)]), np.array([store.constant(q)]))
    assert guesses.factors == before
    for n in range(100, 100 + 3 * MOST_COUNTS, 3):
        guesses.learn(np.array([n]), np.array([store.constant(Fraction(1, n))]))
    assert len([f for f in guesses.factors if f.denominator == 1 and f >= 100]) <= 3 * MOST_COUNTS
