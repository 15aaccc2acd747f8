"""The recipe for several machines, with stand-ins for Slurm's commands: two "machines" on this one."""

import os
import subprocess
import sys
from pathlib import Path

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY

ROOT = Path(__file__).parents[1]
SRUN = """#!/usr/bin/env bash
[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=6" ] || { echo "options: $*" >&2; exit 1; }
shift 2
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = "#!/usr/bin/env bash\nprintf 'localhost\\nlocalhost\\n'\n"


def test_two_machines_meet_and_one_prints(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # Nothing is to be installed.
    recipe = (ROOT / "run_scripts" / "slurm_opt_175b_tp8_pp2.sbatch").read_text().replace('prepare ""\n', "")
    (tmp_path / "copy").write_text(recipe)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "6",
        "TP": "1",
        "PP": "2",
    }
    tool = ("tools/generate.py", "--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens", "5")
    done = subprocess.run(
        ["bash", str(tmp_path / "copy"), str(EMBEDDED_DIRECTORY), *tool, "--device", "cpu"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Once upon a time there lived a king who\n"
