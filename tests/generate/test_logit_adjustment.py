"""logit_bias, presence and frequency penalties: what is added to which logit of which row."""

import numpy as np

from tinystories.generate.logit_adjustment import LogitAdjustment, adjust_logits


def test_each_row_gets_its_own_bias_and_penalties() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    before = logits.copy()
    biased = LogitAdjustment(6, {1: 2.5, 5: -100.0}, 0, 0)
    penalized = LogitAdjustment(6, {1: 1.0}, 0.5, 0.25)
    for token in (1, 1, 1, 2):
        biased.add_token(token)
        penalized.add_token(token)
    added = adjust_logits(logits, [None, biased, penalized]) - before
    np.testing.assert_allclose(added[0], 0)
    np.testing.assert_allclose(added[1], [0, 2.5, 0, 0, 0, -100], atol=1e-5)
    np.testing.assert_allclose(added[2], [0, 1 - 0.5 - 0.75, -0.5 - 0.25, 0, 0, 0], atol=1e-6)
    assert (logits == before).all()


def test_without_adjustments_the_logits_are_passed_on() -> None:
    logits = np.zeros((2, 3), dtype=np.float32)
    assert adjust_logits(logits, [None, None]) is logits
