"""Keep what the stages of a run found, as one JSON file and as text."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kit.unpack import Kit, installed_versions

SCHEMA = 1
GOOD = ("passed", "no GPU", "no tool")
MOST_FILE_BYTES = 1 << 20
MOST_FILES_BYTES = 8 << 20
TEXTS = (".json", ".txt", ".csv", ".md")


@dataclass
class Outcome:
    """Say how a stage ended.

    Attributes:
        name: of the stage.
        status: passed, failed, crashed, timed out, skipped, no GPU or no tool.
        detail: what is to be said of it.
        seconds: that it took.
        tail: the last lines of its output.
        rows: to paste, which it printed.
    """

    name: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    tail: str = ""
    rows: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the outcome in one line."""
        more = f" ({self.detail})" if self.detail else ""
        return f"{self.status}{more}, {self.seconds:.1f} s"


@dataclass
class Results:
    """Hold the facts of a run and the outcomes of its stages."""

    facts: dict[str, Any]
    stages: list[Outcome] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, plan: str, kit: Kit, gpu: str) -> Results:
        """Return the results of a run that begins: what it runs on and with."""
        name, driver = [*(part.strip() for part in gpu.split(",")), "", ""][:2]
        facts = {
            "schema": SCHEMA,
            "plan": plan,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": kit.manifest.get("commit", ""),
            **{"device": name, "driver": driver, "gpu": gpu, "host": platform.platform()},
            "versions": installed_versions(kit),
            "parts": [part["name"] for part in kit.manifest.get("parts", [])],
        }
        return cls(facts, trouble=list(kit.trouble))

    @property
    def passed(self) -> bool:
        """Return whether no stage went wrong and none was skipped for lack of time."""
        return not self.trouble and all(stage.status in GOOD for stage in self.stages)

    def add(self, outcome: Outcome, work: Path) -> None:
        """Add an outcome, and the text files that its stage has written into a folder."""
        self.stages.append(outcome)
        for path in sorted(work.rglob("*")) if work.is_dir() else ():
            if not path.is_file():
                continue
            name, size = f"{outcome.name}/{path.relative_to(work)}", path.stat().st_size
            taken = sum(map(len, self.files.values()))
            fits = size <= MOST_FILE_BYTES and taken + size <= MOST_FILES_BYTES
            if path.suffix in TEXTS and fits:
                self.files[name] = path.read_text(encoding="utf-8", errors="replace")
            else:
                self.left_out.append(f"{name} ({size} bytes)")

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        rows = [row for stage in self.stages for row in stage.rows]
        stages = [asdict(stage) for stage in self.stages]
        more = {"files": self.files, "files_left_out": self.left_out, "trouble": self.trouble}
        return {**self.facts, "passed": self.passed, "stages": stages, "rows": rows, **more}

    def write(self, out: Path) -> None:
        """Write results.json, whole or not at all; a full disk does not end the run."""
        path = out / "results.json"
        new = path.with_suffix(".new")
        try:
            new.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
            new.replace(path)
        except OSError as error:
            print(f"results.json could not be written: {error}", flush=True)

    def summary(self) -> str:
        """Return a line per stage, then the rows to paste."""
        lines = ["", *(f"{stage.name:<16} {stage.line()}" for stage in self.stages), *self.trouble]
        rows = [row for stage in self.stages for row in stage.rows]
        lines += ["", "rows to paste:", *rows] if rows else ["", "no rows to paste"]
        return "\n".join(lines)
