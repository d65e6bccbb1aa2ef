from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.schemas.weights.nodes import Call, ColumnRef
from weighted_mtp.schemas.weights.stages import StagedFormula


def test_a_live_formula_is_split_into_three_stages() -> None:
    split = StagedFormula.split(
        parse_formula("top(live - loss_a, 0.5, by=sequence) * rank(loss_b, by=batch) * sigmoid(x)")
    )
    assert split.stored == (ColumnRef("loss_a"), ColumnRef("loss_b"), parse_formula("sigmoid(x)"))
    assert split.batch == (ColumnRef("0"), Call("rank", (ColumnRef("1"),), by="batch"), ColumnRef("2"))
    c0, c1, c2 = (ColumnRef(str(number)) for number in range(3))
    top = Call("top", (Call("-", (ColumnRef("live"), c0)),), (0.5, 0.0), "sequence")
    assert split.live == Call("*", (Call("*", (top, c1)), c2))


def test_a_formula_of_stored_columns_alone_has_one_stage() -> None:
    node = parse_formula("top(loss_a, 0.5) + 1")
    assert StagedFormula.split(node) == StagedFormula((node,), (ColumnRef("0"),), None)
