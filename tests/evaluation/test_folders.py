"""The functions that the commands index, search and evaluate call."""

import pytest

from hashengine import InputError
from hashengine.evaluation import encode_folder, evaluate, evaluate_folders, index_codes, search_images
from hashengine.training import prepare
from tests.helpers.tiny_images import make_model


def test_codes_are_indexed_and_appended(codes, queries, tmp_path):
    codes.save(tmp_path / "codes")
    queries.save(tmp_path / "queries")
    assert len(index_codes(tmp_path / "codes", tmp_path / "index").items) == len(codes.items)
    grown = index_codes(tmp_path / "queries", tmp_path / "index", append=True)
    assert len(grown.items) == len(codes.items) + len(queries.items)


def test_a_query_is_an_image_a_folder_of_images_or_their_codes(index, queries, tmp_path):
    queries.save(tmp_path / "queries")
    expected = index.search(queries, 3).queries
    assert search_images(index.folder, tmp_path / "queries", 3).queries == expected
    assert search_images(index.folder, queries.record.source, 3).queries == expected
    assert search_images(index.folder, queries.items[0].path, 3).queries[0].hits == expected[0].hits
    with pytest.raises(InputError, match="^search: query must be an image, .*, which does not exist"):
        search_images(index.folder, tmp_path / "nowhere")


def test_the_evaluation_of_folders_equals_that_of_their_contents(index, queries, tmp_path):
    queries.save(tmp_path / "queries")
    found, expected = evaluate_folders(index.folder, tmp_path / "queries", radius=1), evaluate(index, queries, radius=1)
    assert found.model_dump(exclude={"seconds"}) == expected.model_dump(exclude={"seconds"})
    assert [row[0] for row in found.cells()[1]][-1] == "precision within radius 1"


def test_mistakes_in_a_search_are_found_before_the_images_are_encoded(index, images, tmp_path, monkeypatch):
    monkeypatch.setattr("hashengine.evaluation.folders.encode_folder", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(InputError, match="^search: k must be 1 to 21 .*, got 22"):
        search_images(index.folder, images, 22)
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="^search: model must be that of the index, .*, got another one, '.*other'"):
        search_images(index.folder, images, model=other)


def test_the_sides_of_a_split_are_no_labels_without_a_word(images, model, tmp_path):
    prepare(str(images), tmp_path / "split")
    lines = []
    encode_folder(tmp_path / "split", model, warn=lines.append)
    assert lines[0].startswith(f"{tmp_path / 'split'} is a split: its sides, 'database' and 'query', become the labels")
