"""Figures of an index for labelled queries."""

import pytest

from hashengine import InputError
from hashengine.evaluation import CodesFolder, ImageIndex, evaluate
from hashengine.evaluation import encode as encode_module
from tests.helpers.hand_made_codes import hand_made
from tests.helpers.tiny_images import make_model


@pytest.fixture
def hand_made_index(tmp_path, monkeypatch):
    """A function that builds an index of hand-made codes. An index contains a model, so the function adds one."""

    def build(codes: CodesFolder) -> ImageIndex:
        model = make_model(tmp_path / "model")
        record = codes.record.model_copy(update={"model": str(model), "fingerprint": encode_module.fingerprint(model)})
        return ImageIndex.build(CodesFolder(codes.codes, codes.items, record), tmp_path / "hand-made")

    return build


def test_evaluation_equals_a_calculation_by_hand(hand_made_index):
    # The labels at each distance from the query, whose code is 0: a at 0, b at 1, a and b (a tie) at 2, a at 8.
    index = hand_made_index(hand_made([0b0, 0b1, 0b11, 0b101, 0xFF], "ababa"))
    query = hand_made([0], "a")
    query = CodesFolder(
        query.codes, query.items, query.record.model_copy(update={"fingerprint": index.record.fingerprint})
    )
    found = evaluate(index, query, radius=1)
    best, worst_case = (1 + 2 / 3 + 3 / 5) / 3, (1 + 2 / 4 + 3 / 5) / 3
    mean = found.mean_average_precision
    assert (mean.minimum, mean.maximum) == pytest.approx((worst_case, best))
    assert mean.expected == pytest.approx((best + worst_case) / 2)
    assert found.precision_at[1].expected == 1
    assert found.precision_within_radius == pytest.approx(1 / 2)
    assert found.precision_recall_curve.recall == pytest.approx([1 / 3, 1 / 3, *[2 / 3] * 6, 1])
    assert found.precision_recall_curve.precision == pytest.approx([1, 1 / 2, *[1 / 2] * 6, 3 / 5])


@pytest.mark.parametrize(("labels", "without"), [("aab", 0), ("axy", 2), ("xyz", 3)])
def test_queries_whose_class_the_index_does_not_have_are_counted(hand_made_index, labels, without):
    index = hand_made_index(hand_made([0, 1, 3], "aab"))
    query = hand_made([0, 1, 3], labels)
    record = query.record.model_copy(update={"fingerprint": index.record.fingerprint})
    found = evaluate(index, CodesFolder(query.codes, query.items, record), radius=0)
    assert found.without_relevant == without
    assert (found.mean_average_precision.maximum == 0) == (without == 3)


def test_evaluation_needs_labels(index, queries):
    unlabelled = CodesFolder(queries.codes, [item._replace(label="") for item in queries.items], queries.record)
    with pytest.raises(InputError, match="^evaluate: queries must be images in class folders, got 6 of 6"):
        evaluate(index, unlabelled)


# The index has 21 codes of 32 bits.
@pytest.mark.parametrize(("option", "value"), [("at", 0), ("at", 22), ("radius", -1), ("radius", 33)])
def test_evaluation_options_out_of_range_are_refused(index, queries, option, value):
    with pytest.raises(InputError, match=f"^evaluate: {option} must be .* got {value}"):
        evaluate(index, queries, **{option: value})
