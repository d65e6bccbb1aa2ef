from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.schemas.weights.nodes import columns_of, is_live, labels_of, waits_for_batch


def test_columns_and_labels_of_a_formula() -> None:
    node = parse_formula("signed(standardise(reward, by=prompt)) ")
    assert (columns_of(node), labels_of(node)) == (["reward"], ["prompt"])
    node = parse_formula("top(live - loss_a, 0.5) * sigmoid(loss_b - loss_a)")
    assert (columns_of(node), labels_of(node)) == (["loss_a", "loss_b"], [])
    assert is_live(node)
    assert waits_for_batch(node)
    static = parse_formula("top(loss_a, 0.5, by=batch)")
    assert not is_live(static)
    assert waits_for_batch(static)
