# SPDX-License-Identifier: Apache-2.0
"""`slora simulate`."""

import json
import subprocess
import sys

import pytest

from slora_jax.cli import main
from tests.simulator.test_workloads import BURST_GPT

QUICK = ["simulate", "--preset", "a10g-s2", "--seconds", "30", "--rate", "3"]


def test_json_and_picture(capsys, tmp_path):
    svg = tmp_path / "picture.svg"
    argv = [*QUICK, "--policy", "fcfs", "abort", "--json", "--svg", str(svg)]
    assert main(argv) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["workload"]["adapters"] == 200
    fcfs, abort = report["policies"]["fcfs"], report["policies"]["abort"]
    assert fcfs["requests"] == abort["requests"] == 90
    assert fcfs["rejected"] == 0
    assert fcfs["attainment"] <= abort["attainment"]
    assert abort["cost_model"]["step_s"] > 0
    assert "in SLO" in shown.err
    assert "abort" in svg.read_text()


def test_policies_constants_are_options(capsys):
    argv = [*QUICK, "--policy", "abort", "--json", "--slo-first-token-s"]
    strict, lax = (json.loads(run(capsys, [*argv, s])) for s in ("1", "20"))
    assert strict["policies"]["abort"]["rejected"] > lax["policies"]["abort"]["rejected"]
    assert strict["policies"]["abort"]["slo_s"] == 1


def test_a_recorded_trace(capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(BURST_GPT)
    report = json.loads(run(capsys, ["simulate", "--trace", str(path), "--json"]))
    assert report["policies"]["fcfs"]["requests"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "/nowhere"], "cannot open /nowhere"),
        (["--rate", "0"], "rate must be above 0"),
        (["--max-overtakes", "-1"], "max_overtakes must be at least 0"),
        (["--longest", "20000"], "the pool has"),
    ],
)
def test_what_cannot_start(capsys, options, message):
    assert main(["simulate", *options]) == 2
    assert message in capsys.readouterr().err


def test_it_needs_no_jax():
    code = (
        "import sys; from slora_jax.cli import main\n"
        "main(['simulate', '--seconds', '5'])\n"
        "assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fcfs" in done.stdout


def run(capsys, argv: list[str]) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out
