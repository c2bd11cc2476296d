"""Image search in steps: a folder of images becomes codes, an index, search results, figures and a report.

Each step is a function here and a command of `hashengine`; `records` describes the files that pass between them.
"""

from hashengine.evaluation.demo import run_demo
from hashengine.evaluation.encode import CodesFolder, encode_folder, is_codes_folder
from hashengine.evaluation.evaluate import evaluate
from hashengine.evaluation.folders import evaluate_folders, index_codes, search_images
from hashengine.evaluation.image_index import ImageIndex
from hashengine.evaluation.report import write_report

__all__ = [
    "CodesFolder",
    "ImageIndex",
    "encode_folder",
    "evaluate",
    "evaluate_folders",
    "index_codes",
    "is_codes_folder",
    "run_demo",
    "search_images",
    "write_report",
]
