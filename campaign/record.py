"""What a campaign found: one JSON line per part in a results file, and a folder per finding."""

import dataclasses
import datetime
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from campaign.program import ROOT


@dataclasses.dataclass
class Record:
    """Counts and findings of one part of the campaign."""

    part: str
    settings: dict[str, Any]
    folder: Path  # findings are saved below it
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add_finding(self, name: str, problem: str, **details: Any) -> Path:
        """Record a finding and print it; return its folder, for the input and the output of the program."""
        folder = self.folder / self.part / name
        folder.mkdir(parents=True, exist_ok=True)
        self.findings.append({"name": name, "problem": problem, **details})
        (folder / "finding.json").write_text(json.dumps(self.findings[-1], indent=1, default=str) + "\n")
        print(f"FINDING {self.part} {name}: {problem}", flush=True)
        return folder

    def write(self, results: Path, seconds: float) -> None:
        """Append one line to `results`."""
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        line = {
            "date": datetime.date.today().isoformat(),
            "commit": described.stdout.strip(),
            "part": self.part,
            **self.settings,
            "seconds": round(seconds, 1),
            "counts": dict(sorted(self.counts.items())),
            "n_findings": len(self.findings),
            "findings": self.findings[:50],
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(f"{self.part}: {dict(sorted(self.counts.items()))}, {len(self.findings)} findings; {results}")
