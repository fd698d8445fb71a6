"""bench/hf_decode.py runs and reports; on a context this short its figures mean nothing, but it cannot rot unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "bench" / "hf_decode.py"


def test_the_decode_bench_prints_a_table_and_json(tmp_path):
    target = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--only", "mha", "--context", "64", "--steps", "2", "--json", target]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    assert report == json.loads(target.read_text())
    assert set(report["figures"]["mha"]) == {"dynamic", "static", "vattn"}
    assert [(row["arm"], row["base"]) for row in report["bounds"]] == [("vattn", "dynamic"), ("vattn", "static")]
    assert "vattn / dynamic" in output
