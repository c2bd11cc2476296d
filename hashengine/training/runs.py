"""Finished training runs, and a table of their results: mean and standard deviation over the seeds.

A run is a model folder that contains training.json. A sweep with queries adds evaluation.json, which contains the mean
average precision of the run for these queries.
"""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hashengine._files import check_output, make_parent, read_file, write_file
from hashengine._text import counted, printable
from hashengine._validation import check_path, is_path
from hashengine.errors import InputError, brief, invalid, shown, unusable
from hashengine.images import check_replaced_file
from hashengine.models.checkpoint import WEIGHTS_FILE, fingerprint

if TYPE_CHECKING:
    from hashengine.models import HashNet

RECORD_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"

# Options whose values may differ within a group of runs. The images must be the same, but may be in another folder.
_UNKNOWN = "unknown"  # the queries of an evaluation of an older version
_NOT_COMPARED = ("output", "seed", "device")


class Files(NamedTuple):
    """A folder of image files: its path, and the digest of the files, which is "" in records of older versions."""

    folder: str
    digest: str


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: the model folder.
        record: the content of its training.json.
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read the record in a model folder.

        Raises:
            InputError: `folder` holds no training.json, a damaged one, or one of another network.
        """
        path = check_path("Run.load", "run", folder) / RECORD_FILE
        try:
            record = json.loads(read_file(path).decode("utf-8-sig"))
            # These expressions raise if the record has another form.
            figures = [value for name, value in record["epochs"][-1].items() if name != "epoch"]
            if not math.isfinite(math.fsum([record["seconds"], *figures])):
                raise ValueError("a number that is not finite")
            operator.index(record["options"].get("seed", 0))
            _check_folder(record["options"].get("images"))
            found = str(record.get("fingerprint", ""))
        except PermissionError as error:
            raise unusable("Run.load", "run", repr(str(path)), error.strerror) from None
        except OSError as error:
            expected = f"a folder that 'hashengine train fit' wrote, with {RECORD_FILE}"
            raise invalid("Run.load", "run", expected, f"{str(folder)!r}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise invalid(str(path), "the file", "the record of a training run", _damage(error)) from None
        if found and Path(folder, WEIGHTS_FILE).exists() and fingerprint(folder, "Run.load") != found:
            expected = f"the record of the network in {str(folder)!r}"
            advice = "remove the folder and train again, or put the files of one run together"
            raise invalid(str(path), "the file", expected, "that of another network", advice)
        return cls(Path(folder), record)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the run, including those of the method."""
        return self.record["options"]

    def model(self) -> HashNet:
        """The trained network, on the CPU, in evaluation mode."""
        from hashengine.models import HashNet

        return HashNet.from_pretrained(self.folder)

    def summary(self) -> list[tuple[str, str]]:
        """The network, the images, the time and the last epoch: a pair of a name and a text for each."""
        record, network, last = self.record, self.record["network"], self.record["epochs"][-1]
        rate = f"{record['images_per_second']:,.0f} images per second on {record['device']}"
        return [
            (
                "network",
                f"{network['bits']} bits, method {record['options']['method']}, attention {network['attention']}, "
                f"{record['parameters']:,} parameters",
            ),
            (
                "images",
                f"{record['images']:,} of {len(network['classes'])} classes, {network['image_size']} pixels per side",
            ),
            ("training", f"{counted(len(record['epochs']), 'epoch')} in {record['seconds']:.1f} s, {rate}"),
            ("last epoch", ", ".join(f"{name} {value:.4f}" for name, value in last.items() if name != "epoch")),
        ]

    @property
    def images(self) -> Files:
        """The images of the training."""
        return Files(str(self.options.get("images")), str(self.record.get("files_sha256") or ""))

    def evaluation(self) -> bytes:
        """The content of evaluation.json; b"" without one."""
        try:
            return read_file(self.folder / EVALUATION_FILE)
        except OSError:
            return b""

    @property
    def queries(self) -> Files | None:
        """The queries of evaluation.json; None without an evaluation."""
        try:
            found = json.loads(self.evaluation().decode("utf-8-sig"))
            _check_folder(found.get("source"))
            return Files(str(found.get("source", _UNKNOWN)), str(found.get("files_sha256", [""])[0]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def figures(self) -> dict[str, float]:
        """The results by name: the mAP if there is evaluation.json, the values of the last epoch, and the duration."""
        figures: dict[str, float] = {}
        evaluation = self.folder / EVALUATION_FILE
        if evaluation.is_file():
            try:
                found = json.loads(read_file(evaluation).decode("utf-8-sig"))
                check_evaluation_is_own("train report", found, self.folder)
                figures["mAP"] = float(found["mean_average_precision"]["expected"])
                own = self.record.get("fingerprint")
                if found.get("fingerprint", own) != own:  # older files have none
                    expected, actual = "the evaluation of the network beside it", "that of an earlier network"
                    advice = "remove it; 'hashengine train sweep --queries' makes a new one"
                    raise invalid(str(evaluation), "the file", expected, actual, advice)
                if not -1e-6 <= figures["mAP"] <= 1 + 1e-6:
                    raise ValueError("an mAP that is not from 0 to 1")
                _check_folder(found.get("source"))
            except InputError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                expected = "the evaluation of a run"
                raise invalid(str(evaluation), "the file", expected, _damage(error), "remove it") from None
        last = self.record["epochs"][-1]
        figures |= {name: value for name, value in last.items() if name != "epoch"}
        return figures | {"seconds": self.record["seconds"]}


def _damage(error: Exception) -> str:
    """The description of a damaged record in an error message. `error` was raised when the record was read."""
    if isinstance(error, KeyError):
        return f"a damaged one without the field {error}"
    return f"a damaged one: {type(error).__name__}: {error}"


def _check_folder(path: Any) -> None:
    """Require the path of a folder as a record stores it; older versions store none.

    Raises:
        ValueError: it is no path.
    """
    if path is not None and not (isinstance(path, str) and is_path(path)):
        raise ValueError(f"a folder {brief(shown(path))}, which no file system can have")


def check_evaluation_is_own(where: str, evaluation: Any, folder: Path, found: str = "another file") -> None:
    """Require that `evaluation`, the content of the evaluation.json in `folder`, is one that a sweep wrote.

    `hashengine evaluate` writes other fields into files that may have the same name. `found` describes the file.

    Raises:
        InputError: it is another one; the error names `where`.
    """
    if not isinstance(evaluation, dict) or not evaluation.keys() >= {"version", "mean_average_precision"}:
        expected = f"one that 'hashengine train sweep' wrote, or missing, in {str(folder)!r}"
        raise invalid(where, EVALUATION_FILE, expected, found, "move it to another folder")


def has_record(folder: Path) -> bool:
    """Whether training.json in `folder` is the record of a training run."""
    try:
        found = json.loads(read_file(folder / RECORD_FILE).decode("utf-8-sig"))
        return {"options", "network", "epochs"} <= dict(found).keys()
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def check_evaluation_file(where: str, folder: Path) -> None:
    """Require that the folder of a run has no evaluation.json that no sweep wrote, because it would be replaced.

    A file that is not JSON counts as such: a sweep replaces its file atomically, so that no sweep leaves a part of one.

    Raises:
        InputError: it has one; the error names `where`.
        PermissionError: the file cannot be read.
    """
    path = folder / EVALUATION_FILE
    if not path.exists():
        return
    evaluation, found = None, "another file"
    try:
        evaluation = json.loads(read_file(path).decode("utf-8-sig"))
    except PermissionError:
        raise
    except (ValueError, RecursionError) as error:
        found = f"{str(path)!r}, which is not JSON ({error})"
    except OSError:  # a folder or a pipe
        pass
    check_evaluation_is_own(where, evaluation, folder, found)


@dataclass(frozen=True)
class Group:
    """Runs with the same options except for the seed, the folders and the device.

    Attributes:
        options: this group's values of the options in which the groups of the table differ.
        seeds: the seeds of the runs, sorted.
        mean: the mean over the runs of each figure that all of them have.
        deviation: the sample standard deviation of each figure; None for a single run.
        runs: the folders of the runs.
    """

    options: dict[str, Any]
    seeds: list[int]
    mean: dict[str, float]
    deviation: dict[str, float | None]
    runs: list[str]


@dataclass(frozen=True)
class RunTable:
    """Groups of runs, in the order of the first run of each group.

    Attributes:
        common: the options that all runs share.
        groups: the groups, one per row of the table.
    """

    common: dict[str, Any]
    groups: list[Group]

    def to_json(self) -> str:
        """The table as JSON."""
        groups = [vars(group) for group in self.groups]
        return json.dumps({"version": 1, "common": self.common, "groups": groups}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The table as Markdown: each figure as its mean, with the standard deviation over the seeds."""
        header, rows = self.cells()
        lines = [header, ["---"] * len(header), *rows]
        return (
            "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
            + "\n"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table's header and rows as text."""
        options = list(dict.fromkeys(name for group in self.groups for name in group.options))
        figures = list(dict.fromkeys(name for group in self.groups for name in group.mean))
        rows = []
        for group in self.groups:
            row = [_plain(group.options.get(name)) for name in options]
            row += [", ".join(map(str, group.seeds))]
            row += [_with_deviation(group.mean.get(name), group.deviation.get(name)) for name in figures]
            rows.append(row)
        return [*options, "seeds", *figures], rows


def report(folders: Iterable[str | Path], *, output: str | Path | None = None) -> RunTable:
    """The table of the runs in `folders`. A folder that is not a run stands for all runs directly in it.

    Args:
        folders: model folders, or folders of them. A folder that is given twice, and a copy of a run, counts once.
        output: a file to write the table to, .md or .json.

    Raises:
        InputError: `folders` is no list, a folder neither is a run nor contains one, the record of a run is damaged, or
            `output` has another suffix.
        PermissionError: a folder cannot be read, or a folder in it, which may be a run.
    """
    output = None if output is None else check_path("train report", "output", output)
    if output is not None and output.suffix not in (".md", ".json"):
        raise invalid("train report", "output", "a name that ends in .md or .json", repr(str(output)))
    if isinstance(folders, (str, bytes, os.PathLike)) or not isinstance(folders, Iterable):
        raise invalid("train report", "folders", "a list of folders", type(folders).__name__)
    found = [folder for given in folders for folder in _run_folders(check_path("train report", "run", given))]
    loaded = [Run.load(folder) for folder in {folder.resolve(): folder for folder in found}.values()]
    runs = _without_copies(loaded)
    if output is not None:
        check_output("train report", output, outside=[run.folder for run in loaded])
        check_replaced_file("train report", output)
    if not runs:
        raise invalid("train report", "folders", "at least one folder", "none")
    results = table(runs)
    if output is not None:
        make_parent(output)
        write_file(output, results.to_markdown() if output.suffix == ".md" else results.to_json())
    return results


def _without_source(evaluation: bytes) -> bytes:
    """The content of an evaluation.json without the path of the queries, in one form."""
    try:
        fields = dict(json.loads(evaluation.decode("utf-8-sig")))
        return _key({name: value for name, value in fields.items() if name != "source"}).encode()
    except (ValueError, TypeError, RecursionError):  # damaged, or none
        return evaluation


def _without_copies(runs: Sequence[Run]) -> list[Run]:
    """The runs without copies, which have the same record and the same evaluation, or no evaluation beside one."""
    first: dict[tuple[str, bytes], Run] = {}
    for run in runs:
        first.setdefault((_key(run.record), _without_source(run.evaluation())), run)
    evaluated = {record for record, evaluation in first if evaluation}
    return [run for (record, evaluation), run in first.items() if evaluation or record not in evaluated]


def table(runs: Sequence[Run]) -> RunTable:
    """Group `runs` by all options except the seed, the folders and the device.

    The images of a group are the same, and so are the queries of its evaluations.
    """
    compared = []
    asked = _names([run.queries for run in runs])
    for run, images, queries in zip(runs, _names([run.images for run in runs]), asked, strict=True):
        options = {name: value for name, value in run.options.items() if name not in _NOT_COMPARED}
        compared.append(options | {"images": images} | ({} if queries is None else {"queries": queries}))
    if len(set(asked) - {None}) == 1:  # a run that is not evaluated is of the same group
        for options in compared:
            options.pop("queries", None)
    names = list(dict.fromkeys(name for options in compared for name in options))
    keys = [tuple(_key(options[name]) if name in options else None for name in names) for options in compared]
    differing = [name for name, values in zip(names, zip(*keys, strict=True), strict=True) if len(set(values)) > 1]
    members: dict[tuple[str | None, ...], list[int]] = {}
    for number, key in enumerate(keys):
        members.setdefault(key, []).append(number)
    shared = [name for name in names if name not in (*differing, "images")]
    common = {name: compared[0][name] for name in shared}
    groups = []
    for numbers in members.values():
        options = {name: value for name, value in compared[numbers[0]].items() if name in differing}
        groups.append(_group([runs[number] for number in numbers], options))
    return RunTable(common, groups)


def _names(found: Sequence[Files | None]) -> list[str | None]:
    """A name for each folder of files, which is that of another one exactly if the names and sizes of its files are.

    Files without a digest are those of the same folder if that had the same files in all other records.
    """
    digests: dict[str, set[str]] = {}
    for files in found:
        if files is not None and files.digest:
            digests.setdefault(os.path.realpath(files.folder), set()).add(files.digest)
    identities = []
    for files in found:
        known = set() if files is None else digests.get(os.path.realpath(files.folder), set())
        only = next(iter(known)) if len(known) == 1 else ""
        identities.append(None if files is None else files.digest or only or os.path.realpath(files.folder))
    first: dict[str, str] = {}
    for files, identity in zip(found, identities, strict=True):
        if files is not None and identity is not None:
            first.setdefault(identity, files.folder)
    folders = list(first.values())
    return [
        None if i is None else first[i] if folders.count(first[i]) == 1 else f"{first[i]} ({i[:8]})" for i in identities
    ]


def _group(runs: list[Run], options: dict[str, Any]) -> Group:
    runs = sorted(runs, key=lambda run: run.options.get("seed", 0))
    figures = [run.figures() for run in runs]
    names = [name for name in figures[0] if all(name in values for values in figures)]
    columns = {name: [values[name] for values in figures] for name in names}
    return Group(
        options=options,
        seeds=[run.options.get("seed", 0) for run in runs],
        mean={name: statistics.fmean(values) for name, values in columns.items()},
        deviation={name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
        runs=[str(run.folder) for run in runs],
    )


def _run_folders(folder: Path) -> list[Path]:
    if (folder / RECORD_FILE).is_file():
        return [folder]
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in inner if (path / RECORD_FILE).exists()]
    if not found:
        expected = f"a model folder with {RECORD_FILE}, or a folder of them"
        raise invalid("train report", "run", expected, repr(str(folder)))
    return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    """The mean and the deviation as text, with four decimals, or with one decimal if the mean is 100 or more."""
    if mean is None:
        return ""
    decimals = 1 if math.fabs(mean) >= 100 else 4
    spread = "" if deviation is None else f" ± {deviation:.{decimals}f}"
    return f"{mean:.{decimals}f}{spread}"
