"""Which columns a run computes, subtracts and reuses."""

from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import (
    Condition,
    Contrast,
    Imported,
    ImportedFile,
    ScoreColumn,
    ShortContext,
)
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import (
    Measurement,
    ScoringPlan,
    measure_condition,
    parse_contrast,
    plan_columns,
    resolve_sides,
    reuse_columns,
)
from weighted_mtp.scoring.conditions.prompts import Prompt


@pytest.fixture
def models() -> tuple[ScoringModel, ScoringModel]:
    return ScoringModel("ref", Path("ref"), "1", 64), ScoringModel("base", Path("base"), "2", 64)


def held_column(origin: Condition | Contrast) -> ScoreColumn:
    return ScoreColumn(origin=origin, statistics=ValueCounts().statistics())


def test_models_with_the_same_weights_are_loaded_once(models):
    reference, base = models
    copy = ScoringModel("copy of ref", Path("elsewhere"), reference.fingerprint, 64)
    assert plan_columns(reference, copy, None).models == [reference]
    assert plan_columns(reference, base, ShortContext(size=8, stride=6)).models == [reference, base]


def test_columns_follow_from_the_flags(models):
    reference, base = models
    window = ShortContext(size=8, stride=6)
    assert plan_columns(reference, None, None).columns == ("loss_reference",)
    assert plan_columns(reference, base, None).columns == ("loss_reference", "loss_base", "excess_loss")
    assert plan_columns(reference, None, window).columns == ("loss_reference", "loss_short", "long_short")


def test_existing_columns_are_not_recomputed(models):
    reference, base = models
    plan = plan_columns(reference, base, ShortContext(size=8, stride=6))

    def condition(measurement: Measurement, model: str = "elsewhere") -> Condition:
        settings = {"dtype": "float32", "engine": "transformers", "engine_version": "5"}
        fingerprint, window = measurement.model.fingerprint, measurement.window
        return Condition(model=model, fingerprint=fingerprint, window=window, **settings)

    conditions = {name: condition(measurement) for name, measurement in plan.measurements.items()}
    held = {"mine": held_column(condition(Measurement(reference), "the same by another name"))}
    left = reuse_columns(plan, conditions, held, "")
    assert left.columns == ("loss_base", "loss_short", "excess_loss", "long_short")
    assert left.stored == {"mine": Measurement(reference)}
    assert left.contrasts["long_short"] == Contrast(minuend="loss_short", subtrahend="mine")

    held["loss_base"] = held_column(conditions["loss_short"])
    with pytest.raises(
        UserError, match=r"a column loss_base with another origin \(fingerprint, window differ\); .* --suffix"
    ):
        reuse_columns(plan, conditions, held, "")
    left = reuse_columns(plan, conditions, held, "_2")
    assert left.columns == ("loss_base_2", "excess_loss_2", "long_short_2")
    assert left.contrasts["long_short_2"] == Contrast(minuend="loss_base", subtrahend="mine")

    held |= {name: held_column(condition(measurement)) for name, measurement in left.measurements.items()}
    held |= {name: held_column(contrast) for name, contrast in left.contrasts.items()}
    with pytest.raises(
        UserError, match=r"already has all of these columns \(mine, loss_base_2, loss_base, excess_.*_2\)"
    ):
        reuse_columns(plan, conditions, held, "_3")


def test_a_model_with_several_prompts_is_one_model():
    model = ScoringModel("m", Path("m"), "1", 64)
    prompts = [Prompt("a", (1, 2)), Prompt("b", (3,)), None]
    plan = ScoringPlan({}, {})
    for name, prompt in zip("abc", prompts, strict=True):
        plan.measurements.update(measure_condition(name, model, prompt, ["entropy"]))
    assert plan.models == [model]
    assert plan.longest_prompt(model) == 2
    assert plan.computed_tokens(tokens=100, sequences=10) == 100 + (100 + 20) + (100 + 10)


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("loss_reference - loss_base", "loss_reference_new - loss_base_new"),
        ("loss_reference - loss_reference_new", "loss_reference - loss_reference_new"),
        ("loss_base_new - loss_base", "loss_base_new - loss_base_new"),
        ("loss_reference_new - other", "loss_reference_new - other"),
        ("loss_reference - other", "loss_reference_new - other"),
        ("excess_loss - mine_new", "excess_loss - mine_new"),
        ("loss_again_new - loss_reference", "theirs - loss_reference"),
        ("loss_again - loss_reference", "theirs - loss_reference_new"),
    ],
)
def test_sides_of_a_contrast_with_a_suffix(written: str, resolved: str) -> None:
    """`loss_base` is new; `loss_reference` and `excess_loss` are, too, but the input has columns of these names."""
    names = {name: f"{name}_new" for name in ("loss_reference", "loss_base", "excess_loss", "mine")}
    names["loss_again"] = "theirs"
    held = ["loss_reference", "excess_loss", "other", "theirs"]
    assert resolve_sides(parse_contrast(written), names, held, "_new").describe() == resolved


def test_sides_of_a_contrast_without_a_suffix() -> None:
    names = {"loss_reference": "stored", "loss_base": "loss_base"}
    written = Contrast(minuend="loss_reference", subtrahend="loss_base")
    assert resolve_sides(written, names, ["stored"], "").describe() == "stored - loss_base"


def test_a_new_column_minus_the_stored_one_of_the_same_role(models):
    """Also when both are stored already, under the names that they would get."""
    old, new = models
    settings = {"dtype": "float32", "engine": "transformers", "engine_version": "5"}
    of = {model.name: Condition(model=model.name, fingerprint=model.fingerprint, **settings) for model in models}
    plan = plan_columns(new, None, None)
    plan.contrasts["gain"] = parse_contrast("loss_reference - loss_reference_new")
    held = {"loss_reference": held_column(of[old.name])}
    for computed in (("loss_reference_new", "gain_new"), ("gain_new",)):
        left = reuse_columns(plan, {"loss_reference": of[new.name]}, held, "_new")
        assert left.columns == computed
        gain = left.contrasts["gain_new"]
        assert gain == Contrast(minuend="loss_reference", subtrahend="loss_reference_new")
        held["loss_reference_new"] = held_column(of[new.name])
    held["gain_new"] = held_column(gain)
    with pytest.raises(UserError, match=r"already has all of these columns \(loss_reference_new, gain_new\)"):
        reuse_columns(plan, {"loss_reference": of[new.name]}, held, "_new")
    other = held | {"loss_reference": held_column(of[old.name].model_copy(update={"dtype": "bfloat16"}))}
    del other["gain_new"]
    with pytest.raises(UserError, match=r"--contrasts.gain: loss_reference - loss_reference_new would mix engines"):
        reuse_columns(plan, {"loss_reference": of[new.name]}, other, "_new")


def test_contrasts_with_imported_columns_mix_no_engines(models):
    """An imported column has no engine, so it goes with any, also inside another contrast."""
    imported = Imported(files=(ImportedFile(name="a", sha256="0" * 64),), column="mine")
    condition = Condition(model="m", fingerprint="f", dtype="float32", engine="transformers", engine_version="5")
    other = condition.model_copy(update={"dtype": "bfloat16"})
    held = {"mine": held_column(imported), "loss_a": held_column(condition), "loss_b": held_column(other)}
    held["gap"] = held_column(Contrast(minuend="mine", subtrahend="loss_a"))
    held["none"] = held_column(Contrast(minuend="mine", subtrahend="mine"))
    wanted = ("mine - loss_a", "loss_b - mine", "gap - loss_a", "none - loss_b", "mine - none")
    for written in wanted:
        plan = ScoringPlan({}, {"new": parse_contrast(written), "more": parse_contrast("new - mine")})
        assert reuse_columns(plan, {}, held, "").columns[-1] == "more"
    with pytest.raises(UserError, match="would mix engines"):
        reuse_columns(ScoringPlan({}, {"new": parse_contrast("gap - loss_b")}), {}, held, "")
