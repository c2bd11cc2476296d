"""Counting the instructions that a kernel executes, and the numbers in the kernels' banners."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.kernels.disassembly import Code, Instruction
from benchmarks.kernels.executed import count_instructions, describe_branches
from benchmarks.kernels.instructions import COUNTS, TOLERANCE, CountedPath, compile_paths, missing_tool, read_paths


@pytest.fixture
def kernel(tmp_path):
    """Makes a kernel from lines such as "loop: @P0 BRA end  # text", with `text` as the line of source code."""

    def make(*lines):
        source = tmp_path / "kernel.cu"
        labels, instructions, texts = {}, [], []
        for index, line in enumerate(lines):
            text, _, comment = line.partition("#")
            label, has_label, rest = text.strip().rpartition(": ")
            if has_label:
                labels[label] = index
            predicate, rest = rest.split(maxsplit=1) if rest.startswith("@") else ("", rest)
            opcode, _, operands = rest.strip().partition(" ")
            operands = re.sub(r"(\w+)$", r"`(\1)", operands) if opcode.startswith("BRA") else operands
            texts.append(comment.strip())
            place = (source, index + 1)
            instructions.append(Instruction(16 * index, opcode, operands, predicate.removeprefix("@"), place))
        source.write_text("\n".join(texts))
        return Code("kernel", "90a", tuple(instructions), labels)

    return make


def test_straight_code_is_counted_up_to_its_end(kernel):
    assert count_instructions(kernel("S2R R0", "FADD R0", "EXIT", "end: BRA end", "NOP"), {}) == 3


def test_loops_multiply(kernel):
    code = kernel(
        "S2R R0",
        "outer: IADD R1",
        "inner: FADD R2",
        "@P0 BRA inner  # for (inner) {",
        "@!P1 BRA outer  # for (outer) {",
        "EXIT",
    )
    branches = {"kernel.cu: for (outer": {"trips": 3}, "kernel.cu: for (inner": {"trips": 2.5}}
    assert count_instructions(code, branches) == pytest.approx(1 + 3 * (1 + 2.5 * 2 + 1) + 1)


def test_branches_divide(kernel):
    code = kernel(
        "@P0 BRA other  # if (a) {",
        "FADD R0",
        "FADD R0",
        "BRA end",
        "other: FMUL R0",
        "end: @P1 EXIT  # return;",
        "STG R0",
        "EXIT",
    )
    assert count_instructions(code, {}) == 1 + 3 + 1 + 2
    branches = {"kernel.cu: if (a)": {"taken": 0.25}, "kernel.cu: return": {"taken": 0.5}}
    assert count_instructions(code, branches) == pytest.approx(1 + 0.75 * 3 + 0.25 + 1 + 0.5 * 2)


def test_conditions_are_predicates_or_operands(kernel):
    code = kernel("BRA P2, rest  # if (a)", "BRA.DIV UR4, rest  # b", "BRA.U !UP0, rest  # c", "EXIT", "rest: EXIT")
    assert count_instructions(code, {}) == 4
    assert count_instructions(code, {"kernel.cu: b": {"taken": 1}}) == 3
    assert [line.split()[1] for line in describe_branches(code, {})] == ["forward"] * 3


def test_a_list_has_the_branches_in_order(kernel):
    code = kernel(
        "@P0 BRA skip  # for (x) {",
        "a: FADD R0",
        "@P0 BRA a  # for (x) {",
        "skip: b: FADD R0",
        "@P0 BRA b  # for (x) {",
        "EXIT",
    )
    code = dataclasses.replace(code, labels={**code.labels, "skip": 3, "b": 3})
    assert count_instructions(code, {"kernel.cu: for (x": {"trips": [4, 2], "taken": [0]}}) == pytest.approx(
        1 + 8 + 4 + 1
    )


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({}, "no trip counts for the loops at 0020, 'kernel.cu: for (x) {'"),
        ({"kernel.cu: for (x": {"taken": 1}}, "0 of 'taken' for the branches none"),
        ({"kernel.cu: for (x": {"trips": [1, 2]}}, "2 of 'trips' for the branches 0020"),
        ({"kernel.cu: for (x": {"trips": 1}, "kernel.cu: while": {"trips": 1}}, "'kernel.cu: while': 0 of 'trips'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kernel, branches, message):
    code = kernel("S2R R0", "loop: FADD R0", "@P0 BRA loop  # for (x) {", "EXIT")
    with pytest.raises(ValueError, match=re.escape(message)):
        count_instructions(code, branches)


def test_a_loop_that_is_never_entered_needs_no_number(kernel):
    code = kernel("@P0 BRA end  # if (rare)", "loop: FADD R0", "@P0 BRA loop  # for (x) {", "end: EXIT")
    assert count_instructions(code, {"kernel.cu: if (rare)": {"taken": 1}}) == 2


def test_all_other_loops_have_the_trips_of_the_star(kernel):
    code = kernel("a: FADD R0", "@P0 BRA a  # for (x) {", "b: FADD R0", "@P0 BRA b  # for (y) {", "EXIT")
    assert count_instructions(code, {"*": {"trips": 1}, "kernel.cu: for (y": {"trips": 3}}) == pytest.approx(2 + 6 + 1)


def test_a_loop_that_never_ends_is_refused(kernel):
    code = kernel("a: FADD R0", "@P0 EXIT  # if (done) return;", "BRA a")
    with pytest.raises(ValueError, match="branches that leave a loop are never taken"):
        count_instructions(code, {})
    assert count_instructions(code, {"kernel.cu: if (done)": {"taken": 0.25}}) == pytest.approx(4 * 3 - 1)


def test_a_jump_to_a_computed_address_is_refused(kernel):
    with pytest.raises(ValueError, match="cannot follow BRX"):
        count_instructions(kernel("BRX R2", "EXIT"), {})


def test_a_baseline_is_subtracted(kernel):
    code = kernel("@P0 BRA end  # if (miss)", "FADD R0", "FADD R0", "end: EXIT")
    row = json.loads(COUNTS.read_text())[0]
    path = CountedPath(
        **{
            **row,
            "units": 2,
            "counts_threads": False,
            "branches": {"kernel.cu: if (miss)": {"taken": 0}},
            "baseline": {"kernel.cu: if (miss)": {"taken": 1}},
        }
    )
    assert path.count(code) == 1
    assert dataclasses.replace(path, counts_threads=True, baseline={}).count(code) == 4 * 32 / 2


def test_a_claim_that_the_banner_lacks_is_refused():
    path = dataclasses.replace(read_paths()[0], claim="{} instructions per unicorn")
    with pytest.raises(ValueError, match="has no text '{} instructions per unicorn'"):
        path.claimed()


def test_names_of_paths_differ():
    names = [path.name for path in read_paths()]
    assert len(set(names)) == len(names) > 1


@pytest.mark.parametrize("source", dict.fromkeys(path.source for path in read_paths()))
def test_banners_say_what_the_machine_code_executes(source):
    if missing := missing_tool():
        pytest.skip(missing)
    for path, code in compile_paths([path for path in read_paths() if path.source == source]):
        assert path.count(code) == pytest.approx(path.claimed(), rel=TOLERANCE), path.name


def test_the_command_prints_the_counts():
    if missing := missing_tool():
        pytest.skip(missing)
    name = read_paths()[0].name
    done = CliRunner().invoke(app, ["instructions", "--only", name, "--branches"])
    assert done.exit_code == 0, done.output
    assert f"{name}, " in done.output and "the banner says" in done.output and " back " in done.output


def test_the_command_refuses_an_unknown_path(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.instructions.missing_tool", lambda: "")
    done = CliRunner().invoke(app, ["instructions", "--only", "unicorn"])
    assert done.exit_code != 0 and "unicorn" in f"{done.output}{done.exception}"


def test_the_command_says_why_it_cannot_count(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.instructions.missing_tool", lambda: "there is no nvcc")
    done = CliRunner().invoke(app, ["instructions"])
    assert done.exit_code != 0 and "there is no nvcc" in f"{done.output}{done.exception}"


def test_a_row_that_does_not_fit_the_code_is_one_line(monkeypatch):
    """A change of the kernel or another compiler may leave rows that name branches that are gone."""
    path = dataclasses.replace(read_paths()[0], branches={"kernel.cu: while (gone)": {"trips": 2}})
    code = Code("kernel", "90a", (Instruction(0, "EXIT", ""),))
    monkeypatch.setattr("benchmarks.kernels.instructions.missing_tool", lambda: "")
    monkeypatch.setattr("benchmarks.kernels.instructions.read_paths", lambda: [path])
    monkeypatch.setattr("benchmarks.kernels.instructions.compile_paths", lambda paths: [(path, code)])
    done = CliRunner().invoke(app, ["instructions"])
    assert done.exit_code == 2 and done.output.count("\n") == 1 and "kernel.cu: while (gone)" in done.output
