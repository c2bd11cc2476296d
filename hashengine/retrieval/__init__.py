"""Image search: a folder of images becomes a folder of codes, an index, answers, figures and a page to look at.

Every step is one function here and one command of ``hashengine``; every file in between is described in ``records``.
"""

from hashengine.retrieval.codes import CodesFolder, encode_folder, is_codes_folder
from hashengine.retrieval.demo import run_demo
from hashengine.retrieval.evaluation import evaluate
from hashengine.retrieval.image_index import ImageIndex
from hashengine.retrieval.report import write_report

__all__ = ["CodesFolder", "ImageIndex", "encode_folder", "evaluate", "is_codes_folder", "run_demo", "write_report"]
