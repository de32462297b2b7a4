from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.masking import EVALUATION_EPOCH, Masked, mask_tokens

VOCABULARY, MASK, SPECIAL = 1000, 4, [0, 1, 2, 3, 4]


def mask(ids, lengths, documents, seed=1, epoch=0, rate=0.15, **shares) -> Masked:
    return mask_tokens(ids, lengths, documents, seed, epoch, rate, VOCABULARY, MASK, SPECIAL, **shares)


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, VOCABULARY, count)


def test_shares_are_those_of_bert():
    ids = words(400_000)
    masked = mask(ids, [1000] * 400, range(400))
    put_in = masked.inputs_T[masked.positions_M]
    assert len(put_in) / len(ids) == pytest.approx(0.15, abs=0.003)
    assert (put_in == MASK).mean() == pytest.approx(0.8, abs=0.006)
    assert (put_in == masked.targets_M).mean() == pytest.approx(0.1, abs=0.005)
    assert ((put_in != MASK) & (put_in != masked.targets_M)).mean() == pytest.approx(0.1, abs=0.005)


def test_random_words_cover_the_vocabulary_evenly_without_special_ones():
    ids = words(200_000)
    masked = mask(ids, [200_000], [0], rate=1.0, mask_share=0.0, random_share=1.0)
    counts = np.bincount(masked.inputs_T, minlength=VOCABULARY)
    assert counts[SPECIAL].sum() == 0
    expected = len(ids) / (VOCABULARY - len(SPECIAL))
    chi2 = ((counts[5:] - expected) ** 2 / expected).sum()
    assert abs(chi2 - 994) < 5 * np.sqrt(2 * 994)


def test_only_the_asked_positions_change_and_targets_are_the_originals():
    ids = words(5000)
    before = ids.copy()
    masked = mask(ids, [5000], [3])
    assert (ids == before).all()
    assert (masked.targets_M == ids[masked.positions_M]).all()
    untouched = np.delete(np.arange(5000), masked.positions_M)
    assert (masked.inputs_T[untouched] == ids[untouched]).all()
    assert (np.diff(masked.positions_M) > 0).all()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 60)), min_size=1, max_size=8, unique_by=lambda d: d[0]))
def test_a_sequence_is_masked_alike_in_any_company(documents):
    """Masked alone, each sequence loses the same tokens to the same words as in the micro-batch."""
    texts = [words(length, seed=number) for number, length in documents]
    together = mask(np.concatenate(texts), [len(text) for text in texts], [number for number, _ in documents], rate=0.4)
    alone = [mask(text, [len(text)], [number], rate=0.4) for text, (number, _) in zip(texts, documents, strict=True)]
    assert together.inputs_T.tolist() == [token for each in alone for token in each.inputs_T.tolist()]
    assert together.targets_M.tolist() == [token for each in alone for token in each.targets_M.tolist()]


@given(st.integers(0, 2**63), st.integers(-1, 1000), st.sampled_from([0.15, 1.0]))
def test_special_tokens_are_never_masked_nor_put_in(seed, epoch, rate):
    ids = np.random.default_rng(0).integers(0, 10, 500)
    masked = mask(ids, [200, 300], [0, 1], seed, epoch, rate)
    assert not np.isin(masked.targets_M, SPECIAL).any()
    special = np.isin(ids, SPECIAL)
    assert (masked.inputs_T[special] == ids[special]).all()
    assert not np.isin(masked.inputs_T[~special], [0, 1, 2, 3]).any()
    if rate == 1.0:
        assert len(masked.positions_M) == (~special).sum()


def test_seed_epoch_and_sequence_each_change_the_mask_and_nothing_else_does():
    ids = words(2000)

    def places(**other) -> set[int]:
        arguments = {"seed": 1, "epoch": 0, "documents": [0], **other}
        return set(mask(ids, [2000], **arguments).positions_M.tolist())

    assert places() == places()
    for other in ({"seed": 2}, {"epoch": 1}, {"documents": [1]}, {"epoch": EVALUATION_EPOCH}):
        shared = len(places() & places(**other)) / len(places())
        assert shared < 0.25, other  # independent masks share 15 %


def test_neighbouring_places_and_sequences_are_masked_independently():
    """The hash leaves no pattern: of 400 x 500 tokens, both neighbours are masked as often as chance says."""
    masked = mask(words(200_000), [500] * 400, range(400))
    grid = np.zeros(200_000)
    grid[masked.positions_M] = 1
    grid = grid.reshape(400, 500)
    for pair in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        assert pair.mean() == pytest.approx(0.15**2, abs=0.0025)
