"""The report: tables and plots of rows. The same rows give the same files."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.kernels import report as kernels_report
from tests.helpers.benchmarks import assert_refused, invoke

MACHINE = {"cpu": "A CPU", "simd_level": "avx2", "threads": 2, "torch": "2.11", "commit": "abc", "cuda_graphs": False}


def row(models, shape=(32, 64, 56, 56), cache="warm", op="simam", layout="contiguous", **speedup) -> dict:
    measured = {"op": op, "pass": "forward", "shape": list(shape), "dtype": "float32", "layout": layout, "cache": cache}
    seconds = {name: {"p50": 1e-3} for name in ("copy", "fused", *speedup)}
    return MACHINE | measured | {
        "models": models, "speedup": speedup, "copies": {"fused": 2.5}, "percent_of_floor": {"fused": 80.0},
        "floor_bytes": 2 * 4 * math.prod(shape), "seconds": seconds,
    }  # fmt: skip


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_geometric_means_use_one_row_per_shape_and_prefer_a_warm_cache():
    rows = [
        row(["a x 1", "b x 1"], (1, 2, 3, 4), eager=2.0, compile=1.0),
        row(["a x 1"], (1, 2, 3, 5), eager=8.0, compile=4.0),
        row(["a x 1"], (1, 2, 3, 5), cache="cold", eager=100.0, compile=100.0),  # not used: there is a warm row
        row(["a x 1"], (1, 2, 3, 6), cache="cold", eager=4.0, compile=2.0),  # used: there is no warm row
        row(["a x 1"], (1, 2, 3, 4), layout="channels_last", eager=3.0, compile=3.0),
    ]
    assert kernels_report.geometric_means(rows) == {
        ("simam", "forward", "float32", "a x 1"): {"eager": pytest.approx(4), "compile": pytest.approx(2)},
        ("simam", "forward", "float32", "b x 1"): {"eager": pytest.approx(2), "compile": pytest.approx(1)},
        ("simam", "forward", "float32 channels_last", "a x 1"): {
            "eager": pytest.approx(3), "compile": pytest.approx(3),
        },
    }  # fmt: skip


def test_the_tables_show_the_newest_rows(tmp_path):
    file = tmp_path / "kernels-here.jsonl"
    write(
        file,
        [
            row(["a x 32"], eager=1.0, compile=1.0),
            row(["a x 32"], eager=12.34, compile=1.5),
            row(["h x 1"], (1, 16), op="pack_bits", eager=3.0, compile=0.5),
        ],
    )
    text = kernels_report.tables(kernels_report.read(file))
    assert text.startswith("2 threads of A CPU, SIMD avx2, torch 2.11, commit abc.")
    assert [line for line in text.splitlines() if line.startswith("| ") and "---" not in line] == [
        "|  | a x 32 | copies (floor) |",
        "| `simam` forward, float32 | 12.3 / 1.5 | 2.5 (2.0) |",
        "|  | h x 1 | copies (floor) |",
        "| `pack_bits` forward, float32 | 3.0 / 0.5 | - |",
    ]
    assert text.endswith("Slower than `torch.compile`: `pack_bits` forward 1 x 16 float32 (0.50).")


def test_the_report_writes_the_same_files_for_the_same_rows(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "kernels-here.jsonl", [row(["a x 1"], (1, 2, 3, size), eager=3.0, compile=2.0) for size in (4, 9)])
    folders = [tmp_path / "docs" / name for name in ("one", "two")]
    for folder in folders:
        printed = invoke("report", "--results", tmp_path, "--output", folder)
        assert printed.split() == [str(folder / name) for name in ("kernels.md", "kernels.svg")]
        assert "| `simam` forward, float32 |" in (folder / "kernels.md").read_text()
    assert "GB/s of the floor" in (folders[0] / "kernels.svg").read_text()
    for name in ("kernels.md", "kernels.svg"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_committed_rows_are_rendered(tmp_path):
    pytest.importorskip("matplotlib")
    files = {file.name: file.read_text() for file in report.render(report.RESULTS, tmp_path)}
    assert {"search-cpu.md", "search-mapped.md", "kernels.md", "kernels.svg", "networks.md"} <= files.keys()
    assert "| 64 | 31.7 (13.8) |" in files["search-cpu.md"]
    assert "| `simam` forward, float32 | 5.1 / 3.9 |" in files["kernels.md"]
    assert "| resnet18 | triplet | training |" in files["networks.md"]
    assert "| 86% |" in files["search-mapped.md"]
    assert len(files["kernels.svg"]) < 60_000


def test_compacting_an_svg_keeps_its_visible_content():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><metadata>x</metadata>'
        '<defs><style type="text/css">*{a: b}</style></defs><!-- c --><g id="axes_1"><g id="used">'
        '<path d="M 1.26 2.04 \nL 3.0 4" style="fill: none"/></g></g><use xlink:href="#used" style="fill: none"/></svg>'
    )
    assert plots.compact(svg).splitlines() == [
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        "<defs>",
        '<style type="text/css">*{a: b}',
        ".s0{fill: none}</style>",
        "</defs>",
        '<g id="used">',
        '<path d="M 1.3 2 L 3 4" class="s0" />',
        "</g>",
        '<use xlink:href="#used" class="s0" />',
        "</svg>",
    ]


def test_a_folder_without_results_is_refused():
    assert_refused("report: results must be a folder with results such as kernels-*.jsonl, got 'nowhere'", "report",
                   "--results", "nowhere")  # fmt: skip
