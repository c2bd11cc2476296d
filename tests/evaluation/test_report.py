"""The report: a page with queries, their nearest images, figures and timings."""

import json
import re
import shutil

import pytest

from hashengine import InputError
from hashengine.evaluation import CodesFolder, ImageIndex, encode_folder, evaluate, write_report
from hashengine.evaluation.records import QueryResult, items_digest
from hashengine.evaluation.report import draw, duration, worst
from hashengine.models.checkpoint import fingerprint
from tests.helpers.tiny_images import make_images, make_model


@pytest.fixture
def reported(index, queries, tmp_path):
    index.search(queries, 10).write(tmp_path / "results.json")
    evaluate(index, queries).write(tmp_path / "evaluation.json")
    report = write_report(
        tmp_path / "report.html",
        index.folder,
        tmp_path / "results.json",
        evaluation=tmp_path / "evaluation.json",
        rows=4,
    )
    return report, (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())


def test_the_page_contains_its_images_and_refers_to_no_other_file(reported):
    report, page, _ = reported
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 11 * (len(report.drawn) + len(report.worst))  # each query with its 10 hits
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|<script|<link|url\(", page)


def test_the_page_and_the_json_hold_the_same_figures(reported, tmp_path):
    _, page, figures = reported
    assert figures["evaluation"] == json.loads((tmp_path / "evaluation.json").read_text())
    assert f"{figures['evaluation']['mean_average_precision']['expected']:.4f}" in page
    for timing in figures["timings"]:
        assert duration(timing["seconds"]) in page
    assert figures["environment"]["torch"] in page


def test_the_frame_of_a_hit_says_whether_it_has_the_querys_label(reported):
    report, page, _ = reported
    hits = [(query.label, hit.label) for query in [*report.drawn, *report.worst] for hit in query.hits]
    assert page.count('class="hit right"') == sum(query == hit for query, hit in hits)
    assert page.count('class="hit wrong"') == sum(query != hit for query, hit in hits)


def test_hits_of_queries_without_labels_are_not_marked_and_a_missing_image_is_shown_as_missing(
    index, queries, codes, images, tmp_path
):
    unlabelled = CodesFolder(queries.codes, [item._replace(label="") for item in queries.items], queries.record)
    results = index.search(unlabelled, 3)
    results.queries[0].path = "/nowhere/lost.png"
    results.write(tmp_path / "results.json")
    write_report(tmp_path / "page.html", index.folder, tmp_path / "results.json")
    page = (tmp_path / "page.html").read_text()
    assert 'class="hit right"' not in page and 'class="hit wrong"' not in page and "the most errors" not in page
    assert page.count('<div class="missing" title="/nowhere/lost.png">') == 1


def test_the_results_of_a_search_in_another_index_are_refused(index, images, tmp_path):
    other = encode_folder(images, make_model(tmp_path / "other", seed=1))
    ImageIndex.build(other, tmp_path / "other-index").search(other, 1).write(tmp_path / "results.json")
    with pytest.raises(InputError, match="^report: results must be from a search in"):
        write_report(tmp_path / "report.html", index.folder, tmp_path / "results.json")


@pytest.fixture
def searched(index, queries, tmp_path):
    """Arguments of `write_report` for an index of 21 codes, with results and figures."""
    index.search(queries, 3).write(tmp_path / "results.json")
    evaluate(index, queries).write(tmp_path / "evaluation.json")
    return {"results": tmp_path / "results.json", "evaluation": tmp_path / "evaluation.json"}


@pytest.mark.parametrize("argument", ["results", "evaluation"])
@pytest.mark.parametrize("other", ["size", "codes", "grown"])
def test_results_and_figures_of_another_index_of_the_same_model_are_refused(
    index, queries, model, searched, tmp_path, argument, other
):
    if other == "grown":
        index.append(queries)
    else:
        others = make_images(tmp_path / "images", per_class=7, seed=5)  # as many as in the index
        encoded = queries if other == "size" else encode_folder(others, model)
        index = ImageIndex.build(encoded, tmp_path / "other")
    index.search(queries, 3).write(tmp_path / "now.json")
    evaluate(index, queries).write(tmp_path / "now-evaluation.json")
    arguments = {"results": tmp_path / "now.json", "evaluation": tmp_path / "now-evaluation.json"}
    write_report(tmp_path / "report.html", index.folder, **arguments)
    with pytest.raises(InputError, match=f"^report: {argument} must be .* got those of .*; run 'hashengine ") as caught:
        write_report(tmp_path / "report.html", index.folder, **arguments | {argument: searched[argument]})
    assert ("holds other codes" in str(caught.value)) == (other == "codes")


def test_an_index_that_is_made_again_or_moved_and_files_of_older_versions_make_a_report(
    index, images, model, searched, tmp_path
):
    ImageIndex.build(encode_folder(images, model), index.folder)
    index.folder.rename(tmp_path / "renamed")
    write_report(tmp_path / "report.html", tmp_path / "renamed", **searched)
    for path in searched.values():
        fields = json.loads(path.read_text())
        del fields["identity"]
        path.write_text(json.dumps(fields))
    write_report(tmp_path / "report.html", tmp_path / "renamed", **searched)


def test_a_report_ignores_a_source_that_an_interrupted_append_left(index, queries, searched, tmp_path):
    sources = [*index.record.sources, queries.record]
    index.record.model_copy(update={"sources": sources}).write(index.folder / "index.json")
    write_report(tmp_path / "report.html", index.folder, **searched)


def query_results(labels: str, right: list[int]) -> list[QueryResult]:
    """The result of one query per label, with 5 hits. The first `right[i]` hits of query i have its label."""
    hit = {"rank": 1, "id": 0, "distance": 0, "path": ""}
    return [
        QueryResult(
            path=str(i), label=label, hits=[hit | {"label": label if n < right[i] else "other"} for n in range(5)]
        )
        for i, label in enumerate(labels)
    ]


def test_queries_are_drawn_from_every_class_and_depend_on_the_seed():
    queries = query_results("aaaabbbbcccc", [5] * 12)
    drawn = draw(queries, 7, seed=3)
    assert drawn == draw(queries, 7, seed=3)
    labels = [query.label for query in drawn]
    assert labels == sorted(labels)
    assert sorted(labels.count(label) for label in "abc") == [2, 2, 3]
    assert len({query.path for query in drawn}) == 7
    assert any(draw(queries, 7, seed) != drawn for seed in range(10))
    assert len(draw(queries, 99, seed=0)) == 12


def test_the_worst_queries_are_those_with_the_most_wrong_hits():
    queries = query_results("abcde", [5, 0, 3, 5, 1])
    assert [query.label for query in worst(queries, 2)] == ["b", "e"]
    assert [query.label for query in worst(queries, 9)] == ["b", "e", "c"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (12.34, "12.3 s"), (0.0123, "12.3 ms"), (5e-5, "50.0 µs"), (0, "0.00 µs")]
)
def test_durations_have_three_digits_and_a_unit(seconds, text):
    assert duration(seconds) == text


def test_the_record_of_the_training_must_be_that_of_the_model(index, model, searched, tmp_path):
    record = {"images": 9, "images_per_second": 3.0, "parameters": 5, "epochs": [{"epoch": 1}], "seconds": 3.0}
    training = tmp_path / "training.json"
    for own in ({"fingerprint": fingerprint(model)}, {}):  # files of older versions have no fingerprint
        training.write_text(json.dumps(record | own))
        write_report(tmp_path / "report.html", index.folder, training=training, **searched)
    training.write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    with pytest.raises(InputError, match="^report: training must be the record of the model in .* got that of another"):
        write_report(tmp_path / "report.html", index.folder, training=training, **searched)


def test_the_page_names_the_queries_of_the_figures(reported, queries):
    _, page, _ = reported
    assert f"Measured with {len(queries.items)} queries from {queries.record.source}." in " ".join(page.split())


def test_figures_for_no_depth_or_for_large_ones_alone_make_a_page(index, searched, tmp_path):
    figures = json.loads(searched["evaluation"].read_text())
    for depths in ({}, {"50": figures["mean_average_precision"]}):
        searched["evaluation"].write_text(json.dumps(figures | {"precision_at": depths}))
        write_report(tmp_path / "report.html", index.folder, **searched)


def test_results_of_images_with_other_labels_are_refused(index, images, model, searched, tmp_path):
    moved = next(path for path in sorted(images.rglob("*.png")))
    target = images / "zz" / moved.name  # another class; the codes and their number stay
    relabelled = encode_folder(images, model)
    changed = {str(moved): {"label": "zz", "path": str(target)}}
    items = [item._replace(**changed.get(item.path, {})) for item in relabelled.items]
    record = relabelled.record.model_copy(update={"items_sha256": items_digest(items)})
    ImageIndex.build(CodesFolder(relabelled.codes, items, record), index.folder)
    with pytest.raises(InputError, match="^report: results must be from a search in .* which holds other codes"):
        write_report(tmp_path / "report.html", index.folder, **searched)


def test_the_head_of_the_page_says_that_the_figures_are_those_of_other_queries(index, queries, searched, tmp_path):
    figures = json.loads(searched["evaluation"].read_text())
    without = {"labels_sha256": "", "codes_sha256": ""}  # as in files of older versions
    for change, count in (
        ({}, 0),
        (without, 0),
        (without | {"source": "/elsewhere"}, 1),
        ({"source": "/elsewhere"}, 0),  # another name of the same folder
        ({"source": "/elsewhere", "labels_sha256": "0" * 64}, 1),
        ({"source": "/elsewhere", "codes_sha256": "0" * 64}, 1),
    ):
        searched["evaluation"].write_text(json.dumps(figures | change))
        write_report(tmp_path / "report.html", index.folder, **searched)
        assert (tmp_path / "report.html").read_text().count("other queries, from /elsewhere") == count


@pytest.mark.parametrize("name", ["page.html", "linked.html"])
def test_a_page_replaces_no_image(index, searched, images, tmp_path, name):
    photo = tmp_path / ("photo.png" if name == "linked.html" else name)
    shutil.copyfile(next(images.rglob("*.png")), photo)
    if name == "linked.html":
        (tmp_path / name).symlink_to(photo)
    before = photo.read_bytes()
    with pytest.raises(InputError, match="^report: output must be a file that is no image, got .*would be replaced"):
        write_report(tmp_path / name, index.folder, **searched)
    assert photo.read_bytes() == before


def test_pictures_that_cannot_be_read_are_counted(index, queries, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr("hashengine._progress.note", notes.append)
    results = index.search(queries, 1)
    results.queries[0].path = "/nowhere/lost.png"
    results.write(tmp_path / "results.json")
    write_report(tmp_path / "report.html", index.folder, tmp_path / "results.json")
    [note] = notes
    assert re.fullmatch(r"1 of \d+ pictures cannot be read, such as /nowhere/lost.png", note)


@pytest.mark.parametrize("argument", ["index", "results"])
def test_none_in_place_of_a_path_is_refused(index, searched, tmp_path, argument):
    arguments = {"index": index.folder, **searched} | {argument: None}
    with pytest.raises(InputError, match=f"^report: {argument} must be a path"):
        write_report(tmp_path / "report.html", **arguments)


def test_the_colours_are_explained_if_only_some_queries_have_a_class(index, queries, tmp_path):
    results = index.search(queries, 1)
    for name, labelled in (("some", 1), ("none", 0)):
        for number, query in enumerate(results.queries):
            query.label = "a" if number < labelled else ""
        results.write(tmp_path / "results.json")
        write_report(tmp_path / f"{name}.html", index.folder, tmp_path / "results.json", rows=len(results.queries))
        assert (tmp_path / f"{name}.html").read_text().count('class="key"') == labelled
