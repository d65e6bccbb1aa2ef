from weighted_sets import NAN, MakeSet, assert_weights, scored, weights_of

from weighted_mtp.schemas.shard_set.zipped import ZippedSets


def test_a_token_needs_all_scores_that_its_weight_is_made_of(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 1, NAN, 3]], loss_b=[[NAN, 2, 3, NAN]])
    assert_weights(weights_of(shards, formula="loss_a + loss_b"), [[0, 3, 0, 0]])
    assert_weights(weights_of(shards, formula="normalise(loss_a + loss_b)"), [[0, 1, 0, 0]])


def test_several_columns_are_zipped(make_shard_set: MakeSet) -> None:
    one = scored(make_shard_set, name="one", loss_a=[[NAN, 1, 2], [NAN, 4]])
    other = scored(make_shard_set, name="other", loss_b=[[NAN, 2, 2], [NAN, 0]])
    shards = ZippedSets((*one.sets, *other.sets))
    assert_weights(weights_of(shards, formula="relu(loss_a - loss_b)"), [[0, 0, 0], [0, 4]])
