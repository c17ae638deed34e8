"""Scores of a classifier: against counts made by hand, and what any score must keep to."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.evaluate.classification import Classification, classify_score, wilson


def test_scores_are_those_counted_by_hand():
    #          true positives 3, false positives 1, false negatives 2, true negatives 4
    labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    guess = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = classify_score(guess, labels, 2)
    assert found.accuracy == 0.7
    assert found.precision == 0.75
    assert found.recall == 0.6
    assert found.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert found.confusion == ((4, 1), (2, 3))


def test_of_more_classes_the_mean_counts():
    found = classify_score([0, 1, 2, 2], [0, 1, 1, 2], 3)
    assert found.precision == pytest.approx((1 + 1 + 0.5) / 3)
    assert found.recall == pytest.approx((1 + 0.5 + 1) / 3)
    assert found.f1 == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_wilsons_interval_is_the_one_of_the_tables():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.randoms())
def test_the_order_of_rows_is_no_matter_and_intervals_hold_the_score(pairs, chance):
    found = classify_score([a for a, _ in pairs], [b for _, b in pairs], 3)
    mixed = list(pairs)
    chance.shuffle(mixed)
    assert classify_score([a for a, _ in mixed], [b for _, b in mixed], 3) == found
    assert found.accuracy_interval[0] <= found.accuracy <= found.accuracy_interval[1]
    assert sum(map(sum, found.confusion)) == len(pairs)
    assert Classification.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_what_is_all_right_has_the_best_scores():
    found = classify_score([0, 1, 1], [0, 1, 1], 2)
    assert found.accuracy == found.precision == found.recall == found.f1 == 1.0


def test_lists_of_other_lengths_or_classes_are_refused():
    with pytest.raises(ValueError, match="2 predictions and 1 labels"):
        classify_score([0, 1], [0], 2)
    with pytest.raises(ValueError, match="not among the 2"):
        classify_score([2], [0], 2)
