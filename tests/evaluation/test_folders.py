"""The functions that the commands index, search and evaluate call."""

import pytest

from hashengine import InputError
from hashengine.evaluation import evaluate, evaluate_folders, index_codes, search_images


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
