"""Rows and their silent documents by hand."""

import numpy as np

from weighted_mtp.training.rows import Rows, silent_documents

POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]], np.int32)


def rows(first: int) -> Rows:
    """Two rows whose ids count from `first`."""
    ids = np.arange(first, first + 12, dtype=np.int32).reshape(2, 6)
    sources = np.empty(2, object)
    sources[:] = [np.array([first]), np.array([first, first + 1])]
    return Rows(ids, POSITIONS, ids.astype(np.float32), np.array([5, 6]), np.array([0, 1]), sources)


def test_a_document_is_silent_if_none_of_its_targets_has_signal() -> None:
    """First tokens are no targets, and documents of one token have none. In the first row: 3, 2 and 1 tokens."""
    signal = np.zeros((2, 6), bool)
    assert silent_documents(signal, POSITIONS).tolist() == [2, 2]
    signal[:, 0] = True
    assert silent_documents(signal, POSITIONS).tolist() == [2, 2], "only first tokens"
    signal[0, 2] = signal[1, 5] = True
    assert silent_documents(signal, POSITIONS).tolist() == [1, 1]
    signal[0, 5] = True
    assert silent_documents(signal, POSITIONS).tolist() == [1, 1], "padding"
    assert silent_documents(signal, POSITIONS).dtype == np.int64


def test_taken_rows_are_copies_in_the_order_asked_for() -> None:
    both = rows(100)
    taken = both.take(np.array([1, 0]))
    assert taken.input_ids[:, 0].tolist() == [106, 100]
    assert taken.tokens.tolist() == [6, 5]
    assert [source.tolist() for source in taken.sources] == [[100, 101], [100]]
    one = both.take(slice(0, 1))
    assert one.weights.shape == (1, 6)
    assert not any(np.shares_memory(own, other) for own, other in zip(one, both, strict=True))


def test_batches_are_joined_in_order() -> None:
    joined = Rows.concatenate([rows(100), rows(200)])
    assert joined.input_ids[:, 0].tolist() == [100, 106, 200, 206]
    assert joined.silent.tolist() == [0, 1, 0, 1]
    assert [source.tolist() for source in joined.sources] == [[100], [100, 101], [200], [200, 201]]
