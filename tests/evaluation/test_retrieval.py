"""A folder of images becomes codes, an index, answers, figures and a page."""

import json
import re

import numpy as np
import pytest

from hashengine import InputError
from hashengine.images import read_image
from hashengine.models import HashNet
from hashengine.retrieval import CodesFolder, ImageIndex, encode_folder, evaluate, write_report
from hashengine.retrieval import codes as codes_module
from hashengine.retrieval.records import EncodeRecord, Item, QueryResult
from hashengine.retrieval.report import draw, duration, worst
from tests.helpers.tiny_images import CLASSES, make_images, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), per_class=7)


@pytest.fixture(scope="module")
def codes(images, model):
    return encode_folder(images, model)


@pytest.fixture(scope="module")
def queries(tmp_path_factory, model):
    return encode_folder(make_images(tmp_path_factory.mktemp("queries"), per_class=2, seed=1), model)


@pytest.fixture
def index(codes, tmp_path):
    return ImageIndex.build(codes, tmp_path / "index")


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.unpackbits(a[:, None] ^ b[None], axis=2).sum(axis=2)


def hand_made(bytes_by_item: list[int], labels: str) -> CodesFolder:
    """8-bit codes that need no network."""
    record = EncodeRecord(
        bits=8, count=len(labels), source="", model="", fingerprint="hand-made", device="cpu", seconds=1.0
    )
    items = [Item(i, f"/nowhere/{i}.png", label) for i, label in enumerate(labels)]
    return CodesFolder(np.array(bytes_by_item, dtype=np.uint8)[:, None], items, record)


@pytest.fixture
def hand_made_index(tmp_path, monkeypatch):
    """Builds an index of hand-made codes, which have no model to copy."""

    def build(codes: CodesFolder) -> ImageIndex:
        model = make_model(tmp_path / "model")
        record = codes.record.model_copy(update={"model": str(model), "fingerprint": codes_module.fingerprint(model)})
        return ImageIndex.build(CodesFolder(codes.codes, codes.items, record), tmp_path / "hand-made")

    return build


def test_codes_are_the_models_in_the_order_of_the_paths(images, model, codes):
    paths = sorted(images.rglob("*.png"))
    assert [item.path for item in codes.items] == [str(path) for path in paths]
    assert [item.label for item in codes.items] == [path.parent.name for path in paths]
    network = HashNet.from_pretrained(model)
    for path, code in zip(paths, codes.codes, strict=True):
        assert np.array_equal(network.encode(network.preprocess(read_image(path))[None]).numpy()[0], code)


def test_batches_do_not_change_the_codes(images, model, codes):
    assert np.array_equal(encode_folder(images, model, batch_size=2).codes, codes.codes)


def test_unreadable_images_are_skipped_told_and_recorded(tmp_path, model):
    images = make_images(tmp_path / "images", per_class=2)
    broken = images / "checks" / "0.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    told = []
    codes = encode_folder(images, model, batch_size=1, warn=told.append)
    assert [item.path for item in codes.items] == [
        str(path) for path in sorted(images.rglob("*.png")) if path != broken
    ]
    assert [item.id for item in codes.items] == list(range(5))
    assert [error.path for error in codes.record.errors] == [str(broken)]
    assert len(told) == 1 and str(broken) in told[0]


def test_a_folder_without_a_readable_image_is_refused(tmp_path, model):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="folder: expected a readable image"):
        encode_folder(tmp_path, model, warn=lambda line: None)


def test_codes_folder_round_trip(codes, tmp_path):
    codes.save(tmp_path / "codes")
    loaded = CodesFolder.load(tmp_path / "codes")
    assert np.array_equal(loaded.codes, codes.codes)
    assert (loaded.items, loaded.record) == (codes.items, codes.record)
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {"codes.npy", "items.csv", "encode.json"}


def test_names_with_commas_quotes_and_line_breaks_survive(tmp_path):
    codes = hand_made([1, 2], "ab")
    codes.items[1] = Item(1, '/photos/"Rome, \n2019".png', "a,b")
    codes.save(tmp_path / "codes")
    assert CodesFolder.load(tmp_path / "codes").items == codes.items


def test_a_failed_save_leaves_the_old_codes_whole(codes, tmp_path, monkeypatch):
    codes.save(tmp_path / "codes")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codes_module, "write_items", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hand_made([1], "a").save(tmp_path / "codes")
    assert np.array_equal(CodesFolder.load(tmp_path / "codes").codes, codes.codes)
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_only_an_earlier_output_is_replaced(codes, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "novel.txt").write_text("call me")
    with pytest.raises(InputError, match="output: expected a new folder or an earlier output"):
        codes.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "novel.txt").read_text() == "call me"


@pytest.mark.parametrize("damage", ["truncate", "shape", "csv", "json", "missing"])
def test_damaged_codes_are_refused_in_one_line(codes, tmp_path, damage):
    folder = tmp_path / "codes"
    codes.save(folder)
    array, items, record = (folder / name for name in ("codes.npy", "items.csv", "encode.json"))
    {
        "truncate": lambda: array.write_bytes(array.read_bytes()[:-1]),
        "shape": lambda: np.save(array, codes.codes[:-1]),
        "csv": lambda: items.write_text("id,path,label\n0,a.png,a\n2,b.png,b\n"),
        "json": lambda: record.write_text('{"bits": "many"}'),
        "missing": array.unlink,
    }[damage]()
    with pytest.raises(InputError, match="^codes: ") as error:
        CodesFolder.load(folder)
    assert "\n" not in str(error.value)


def test_search_agrees_with_counting_every_bit(index, codes, queries):
    results = index.search(queries, k=len(codes.items))
    distances = hamming(queries.codes, codes.codes)
    order = np.argsort(distances, axis=1, kind="stable")
    for row, query in enumerate(results.queries):
        assert [hit.id for hit in query.hits] == order[row].tolist()
        assert [hit.distance for hit in query.hits] == distances[row, order[row]].tolist()
        assert [hit.path for hit in query.hits] == [codes.items[i].path for i in order[row]]
        assert [hit.rank for hit in query.hits] == list(range(1, len(codes.items) + 1))


def test_an_appended_index_answers_like_one_built_at_once(images, model, queries, codes, index, tmp_path):
    parts = [encode_folder(images / name, model) for name in CLASSES]
    grown = ImageIndex.build(parts[0], tmp_path / "grown")
    for part in parts[1:]:
        ImageIndex.load(tmp_path / "grown").append(part)
    grown = ImageIndex.load(tmp_path / "grown")
    assert [item.path for item in grown.items] == [item.path for item in codes.items]
    for ours, theirs in zip(grown.search(queries, 5).queries, index.search(queries, 5).queries, strict=True):
        assert [(hit.id, hit.distance, hit.path) for hit in ours.hits] == [
            (hit.id, hit.distance, hit.path) for hit in theirs.hits
        ]


def test_an_append_that_was_cut_short_changes_nothing(index, queries, monkeypatch):
    before = index.search(queries, 3).queries

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(index.hamming), "save", killed)
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.load(index.folder).append(queries)
    assert ImageIndex.load(index.folder).search(queries, 3).queries == before


def test_an_index_carries_its_model(index, images, model):
    assert codes_module.fingerprint(index.folder / "model") == codes_module.fingerprint(model)
    path = next(images.rglob("*.png"))
    results = index.search(encode_folder(path, index.folder / "model"), 1)
    assert results.queries[0].hits[0].distance == 0


@pytest.mark.parametrize(("bits", "seed", "expected"), [(16, 0, "32 bits"), (32, 1, "another one")])
def test_codes_of_another_model_are_refused(index, images, tmp_path, bits, seed, expected):
    foreign = encode_folder(images, make_model(tmp_path / "other", bits, seed))
    with pytest.raises(InputError, match=f"^query: .*{expected}"):
        index.search(foreign, 1)
    with pytest.raises(InputError, match=f"^codes: .*{expected}"):
        index.append(foreign)


@pytest.mark.parametrize("k", [0, -1, 22])
def test_k_out_of_range_is_refused(index, queries, k):
    with pytest.raises(InputError, match=f"^k: expected 1 to 21, .* got {k}"):
        index.search(queries, k)


def test_evaluation_of_a_ranking_done_by_hand(hand_made_index):
    # Distances from the query 0: a at 0, b at 1, a at 2 and b at 2 (a tie), a at 8.
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


def test_evaluation_needs_labels(index, queries):
    unlabelled = CodesFolder(queries.codes, [item._replace(label="") for item in queries.items], queries.record)
    with pytest.raises(InputError, match="queries: expected images in class folders, got 6 of 6"):
        evaluate(index, unlabelled)


@pytest.mark.parametrize(("option", "value"), [("at", 0), ("at", 22), ("radius", -1), ("radius", 33)])
def test_evaluation_options_out_of_range_are_refused(index, queries, option, value):
    with pytest.raises(InputError, match=f"^{option}: .* got {value}"):
        evaluate(index, queries, **{option: value})


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


def test_the_page_is_whole_in_itself(reported):
    report, page, _ = reported
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 11 * (len(report.drawn) + len(report.worst))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|<script|<link|url\(", page)


def test_the_page_and_the_json_tell_the_same_figures(reported, tmp_path):
    _, page, figures = reported
    assert figures["evaluation"] == json.loads((tmp_path / "evaluation.json").read_text())
    assert f"{figures['evaluation']['mean_average_precision']['expected']:.4f}" in page
    for timing in figures["timings"]:
        assert duration(timing["seconds"]) in page
    assert figures["environment"]["torch"] in page


def test_frames_follow_the_labels(reported):
    report, page, _ = reported
    hits = [(query.label, hit.label) for query in [*report.drawn, *report.worst] for hit in query.hits]
    assert page.count('class="hit right"') == sum(query == hit for query, hit in hits)
    assert page.count('class="hit wrong"') == sum(query != hit for query, hit in hits)


def test_a_page_without_labels_and_with_a_lost_image(index, queries, codes, images, tmp_path):
    unlabelled = CodesFolder(queries.codes, [item._replace(label="") for item in queries.items], queries.record)
    results = index.search(unlabelled, 3)
    results.queries[0].path = "/nowhere/lost.png"
    results.write(tmp_path / "results.json")
    write_report(tmp_path / "page.html", index.folder, tmp_path / "results.json")
    page = (tmp_path / "page.html").read_text()
    assert 'class="hit right"' not in page and 'class="hit wrong"' not in page and "Where it errs" not in page
    assert page.count('<div class="missing" title="/nowhere/lost.png">') == 1


def test_a_report_of_other_results_is_refused(index, images, tmp_path):
    other = encode_folder(images, make_model(tmp_path / "other", seed=1))
    ImageIndex.build(other, tmp_path / "other-index").search(other, 1).write(tmp_path / "results.json")
    with pytest.raises(InputError, match="^results: expected those of a search in"):
        write_report(tmp_path / "report.html", index.folder, tmp_path / "results.json")


def query_results(labels: str, right: list[int]) -> list[QueryResult]:
    hit = {"rank": 1, "id": 0, "distance": 0, "path": ""}
    return [
        QueryResult(
            path=str(i), label=label, hits=[hit | {"label": label if n < right[i] else "other"} for n in range(5)]
        )
        for i, label in enumerate(labels)
    ]


def test_drawn_queries_come_from_every_class_and_from_the_seed():
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
