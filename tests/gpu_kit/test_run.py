"""The script of the GPU kit survives whatever its stages do, and keeps what they found."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_kit_runs import SCRIPTS, Ran, Runs
from kit.plans import PLANS, UnknownPlanError, choose
from kit.schedule import filled
from kit.table import entry
from paths import ROOT
from run import SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")

GPU = "NVIDIA H200, 580.1, 143771 MiB, 1980 MHz, 1980 MHz"


def code(name: str, source: str, **fields: Any) -> dict[str, Any]:
    """Return a stage that runs Python code."""
    return {"name": name, "command": ["{python}", "-c", source], **fields}


def passing(name: str = "last") -> dict[str, Any]:
    return code(name, "print('well')")


def test_each_stage_has_a_status_a_file_and_its_last_lines(run: Runs) -> None:
    ran = run(
        passing("fine"),
        code("bad", "print('so far'); raise SystemExit(3)"),
        code("crash", "import os; print('before', flush=True); os.kill(os.getpid(), 11)"),
        {"name": "nothing", "command": ["no-such-program"]},
        passing(),
    )
    assert ran.code == 1 and not ran.results["passed"]
    assert ran.statuses == ["passed", "failed", "crashed", "failed", "passed"]
    assert ran.stage("bad")["detail"] == "exit code 3"
    assert ran.stage("crash")["detail"] == "SIGSEGV"
    assert "no-such-program" in ran.stage("nothing")["detail"]
    assert [ran.stage(name)["tail"] for name in ("bad", "crash", "last")] == [
        *("so far", "before", "well"),
    ]
    assert (ran.out / "2-bad.log").read_text() == "so far\n"
    assert "  last| well" in ran.text
    assert ran.results["commit"] == "0123abc"
    assert ran.results["versions"]["python"].startswith("3.")


def test_only_what_passed_is_a_success(run: Runs) -> None:
    ran = run(passing("one"), passing("two"))
    assert (ran.code, ran.results["passed"]) == (0, True)


def test_a_stage_that_hangs_is_ended_and_its_lines_are_kept(run: Runs) -> None:
    source = "import time; print('half', end='', flush=True); time.sleep(600)"
    ran = run(code("hang", source, seconds=2), passing())
    assert ran.statuses == ["timed out", "passed"]
    assert ran.stage("hang")["tail"] == "half"
    assert (ran.out / "1-hang.log").read_text() == "half"
    assert ran.stage("hang")["seconds"] < 10


@pytest.mark.parametrize("how", ["start_new_session=True", "start_new_session=False"])
def test_children_end_with_their_stage(run: Runs, tmp_path: Path, how: str) -> None:
    alive = tmp_path / "alive"
    # The child holds the output open, ignores SIGTERM, and may lead a session of its own.
    child = (
        "import signal, time, pathlib, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while True: pathlib.Path(sys.argv[1]).write_text(str(time.time())); time.sleep(0.05)"
    )
    source = (
        "import subprocess, sys, time, pathlib\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(alive)!r}], {how})\n"
        f"while not pathlib.Path({str(alive)!r}).exists(): time.sleep(0.01)\n"
    )
    start = time.monotonic()
    ran = run(code("parent", source), passing())
    assert ran.statuses == ["passed", "passed"]
    assert time.monotonic() - start < 18, "the output that the child holds open was waited for"
    before = alive.read_text()
    time.sleep(0.4)
    assert alive.read_text() == before, "the child is still at work"


def test_an_endless_output_leaves_a_file_of_some_size(run: Runs) -> None:
    source = (
        "import sys\n"
        "for i in range(200_000): print(f'{i:0100}')\n"
        "sys.stdout.write('x' * 3_000_000)\nprint()\nprint('the end')"
    )
    ran = run(code("flood", source), passing())
    assert ran.statuses == ["passed", "passed"]
    text = (ran.out / "1-flood.log").read_text()
    # The head and the tail, less a part of a line, which is dropped whole.
    assert (5 << 20) - (1 << 17) < len(text) < (5 << 20) + 200
    assert text.startswith("0" * 100) and text.endswith("the end\n")
    assert "bytes are left out here" in text
    assert ran.stage("flood")["tail"].endswith("the end")
    assert ran.text.count("flood|") < 70
    assert (ran.out / "results.json").stat().st_size < 1 << 20


def test_a_full_disk_is_said_and_the_stages_go_on(run: Runs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1-one.log").symlink_to("/dev/full")
    ran = run(passing("one"), passing())
    assert ran.statuses == ["passed", "passed"]
    assert "could not be written: No space left" in ran.stage("one")["detail"]
    assert ran.stage("one")["tail"] == "well"


def test_late_stages_are_shortened_then_skipped_and_it_is_said(run: Runs) -> None:
    wait = "import time; print('at work', flush=True); time.sleep(600)"
    ran = run(code("long", wait, least=1), passing("none"), seconds=7)
    assert ran.statuses == ["timed out", "skipped"]
    assert "shortened to" in ran.stage("long")["detail"] and " s of 20 s" in ran.text
    assert ran.stage("none")["detail"].endswith("s are left")
    assert ran.code == 1


def test_stages_that_need_a_gpu_end_at_once_without_one(run: Runs) -> None:
    ran = run(code("kernel", "raise SystemExit(1)", needs_gpu=True), passing())
    assert ran.statuses == ["no GPU", "passed"]
    assert ran.code == 0 and ran.results["device"] == ""
    assert "no GPU" in ran.text.splitlines()[0]


def programs(folder: Path, **sources: str) -> str:
    """Write shell scripts; return a PATH that has them."""
    folder.mkdir()
    for name, source in sources.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{source}\n")
        path.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_with_a_gpu_its_facts_are_kept_and_its_stages_run(run: Runs, tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", nvidia_smi=f"echo '{GPU}'", a_tool="echo used")
    tool = {"name": "with", "command": ["sh", "-c", '"$KIT_TOOL"'], "tool": "a-tool"}
    ran = run(
        code("kernel", "print('ran')", needs_gpu=True),
        tool,
        {**tool, "name": "without", "tool": "another-tool"},
        PATH=path,
    )
    assert ran.statuses == ["passed", "passed", "no tool"]
    assert (ran.results["device"], ran.results["driver"]) == ("NVIDIA H200", "580.1")
    assert ran.stage("with")["tail"] == "used"
    assert "another-tool is not there" in ran.stage("without")["detail"]


def test_a_broken_driver_is_no_gpu(run: Runs, tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", nvidia_smi="echo 'no devices were found'; exit 9")
    assert run(code("kernel", "", needs_gpu=True), PATH=path).statuses == ["no GPU"]


def test_rows_are_printed_at_the_end_and_used_by_the_stages_that_follow(run: Runs) -> None:
    row = "(128, 'low'): 5,"
    sweep = code("sweep", f"print('slow'); print({'fastest forward: ' + row!r})")
    table = "gdn_ops/backends/triton/host/table.py"
    look = "from gdn_ops.backends.triton.host.table import SEQUENCE; print(SEQUENCE)"
    ran = run({**sweep, "rows": "^fastest [^:]+: (.+)$", "table": table}, code("bench", look))
    assert ran.statuses == ["passed", "passed"], ran.text
    assert ran.results["rows"] == [row]
    assert ran.text.rstrip().endswith(f"rows to paste:\n{row}")
    assert ran.stage("bench")["tail"] == "{(128, 'low'): 5}"


@pytest.mark.parametrize("row", ["(1, 'low'): Unknown(3),", "1 +", "3", "1: 2, 3: 4,"])
def test_a_row_that_cannot_be_used_changes_nothing(run: Runs, row: str) -> None:
    table = "gdn_ops/backends/triton/host/table.py"
    look = "from gdn_ops.backends.triton.host.table import SEQUENCE; print(SEQUENCE)"
    sweep = code("sweep", f"print({'fastest: ' + row!r})", rows="^fastest: (.+)$", table=table)
    ran = run(sweep, code("bench", look))
    assert ran.stage("bench")["tail"] == "{}"
    assert "rows are not used" in ran.text


def test_text_that_a_stage_writes_is_in_the_results(run: Runs) -> None:
    source = (
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'gpu.json').write_text('{}'); (folder / 'gpu.png').write_bytes(bytes(9))\n"
        "(folder / 'large.json').write_text(' ' * (2 << 20))"
    )
    stage = {"name": "bench", "command": ["{python}", "-c", source, "{work}"]}
    ran = run(stage)
    assert ran.results["files"] == {"bench/gpu.json": "{}"}
    assert ran.results["files_left_out"] == [
        *("bench/gpu.png (9 bytes)", f"bench/large.json ({2 << 20} bytes)"),
    ]


def test_stages_find_the_packages_of_the_kit_and_their_time(run: Runs) -> None:
    source = "import stand_in_package, sys; print(stand_in_package.here, sys.argv[1])"
    stage = {"name": "a", "command": ["{python}", "-c", source, "{seconds}"], "seconds": 20}
    assert run(stage).stage("a")["tail"] == "7 12"


def test_a_part_that_is_broken_costs_only_itself(run: Runs, kit: Path) -> None:
    (kit / "parts" / "package.tar.xz").write_bytes(b"no archive")
    ran = run(passing())
    assert ran.statuses == ["passed"] and ran.code == 1
    assert ran.results["trouble"][0].startswith("part package is left out: its checksum")


def test_without_its_tree_nothing_runs(run: Runs, kit: Path) -> None:
    (kit / "parts" / "tree.tar.xz").unlink()
    ran = run(passing())
    assert (ran.code, ran.results) == (2, {})
    assert "part tree is left out" in ran.error


def test_an_interrupted_run_ends_its_stage_and_writes_its_results(
    kit: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "started"
    wait = f"import time, pathlib; pathlib.Path({str(mark)!r}).touch(); time.sleep(600)"
    plan = tmp_path / "plan.json"
    stages = [passing("one"), code("two", wait)]
    plan.write_text(json.dumps([{"seconds": 60, "needs_gpu": False, **s} for s in stages]))
    out = tmp_path / "out"
    command = [sys.executable, str(kit / "run.py"), str(plan), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=30)
    ran = Ran(subprocess.CompletedProcess(command, process.returncode, text, ""), out)
    assert ran.code == 1 and ran.statuses == ["passed"]
    assert ran.results["trouble"] == ["interrupted in two: Interrupted SIGTERM"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}]", "command"),
        ("no json", "Expecting value"),
        ('[{"name": "a", "command": ["b"], "seconds": 1, "colour": "red"}]', "has no colour"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(
    kit: Path, tmp_path: Path, text: str, message: str
) -> None:
    plan = tmp_path / "wrong.json"
    plan.write_text(text)
    for name, said in ((str(plan), message), ("fourth", "known: first, second, third")):
        command = [sys.executable, str(kit / "run.py"), name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr


def test_out_is_the_folder_that_the_environment_names(kit: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{**passing(), "seconds": 9, "needs_gpu": False}]))
    command = [sys.executable, str(kit / "run.py"), str(plan)]
    environment = {**os.environ, "OUT": str(tmp_path / "named")}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == [
        *("1-last.log", "results.json"),
    ]


def test_some_stages_of_a_plan_are_chosen_by_name() -> None:
    chosen = choose(PLANS["first"], "bench,check")
    assert [stage.name for stage in chosen] == ["check", "bench"]
    assert choose(PLANS["first"], None) == PLANS["first"]
    with pytest.raises(UnknownPlanError, match="no stage is called 'nothing', known: ceilings"):
        choose(PLANS["first"], "check,nothing")


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_fits_its_time_and_the_files_that_come_back(plan: str) -> None:
    stages = PLANS[plan]
    assert sum(stage.seconds for stage in stages) <= SECONDS - 20
    # A file per stage and results.json: where only eight files come back, these do.
    assert len(stages) + 1 <= 8
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        for text in (stage.shows, stage.rows):
            re.compile(text)
        if stage.table:
            assert (ROOT / stage.table).is_file()
        for word in stage.command:
            path = filled(word, {"{kit}": str(SCRIPTS / "kit"), "{tree}": str(ROOT)})
            assert not path.startswith("/") or Path(path).exists()


def test_what_tuning_prints_is_read_as_rows() -> None:
    (stage,) = (stage for stage in PLANS["first"] if stage.rows)
    row = "('sm_90', 128, 'low'): Config(C=64, solve=Tiles(0, 4, 1)),"
    for what in ("forward", "forward+backward", "step"):
        found = re.search(stage.rows, f"fastest {what}: {row}")
        assert found and found[1] == row
    assert not re.search(stage.rows, f"forward      0.2500 ms  {row}")
    assert entry(row) == row.rstrip(",")
