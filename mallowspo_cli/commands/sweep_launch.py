"""A sweep's jobs for somebody else to start: lines for a shell, and an array of Slurm."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mallowspo_cli.commands.jobs import FOLLOWS
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.files import write_text

ONE_NODE = Path(__file__).parent.parent.parent / "scripts" / "slurm" / "one_node.sbatch"
"""In a checkout; a wheel has it not."""
REPLACED = ("#SBATCH --job-name", "#SBATCH --output")

SCRIPT = """\
#!/usr/bin/env bash
# Jobs of a sweep, each as scripts/slurm/one_node.sbatch runs it. From the directory in which
# `mallowspo sweep` was called:
#
#   sbatch --partition=PARTITION --account=ACCOUNT {script}
#
# In front of the file, --array=0-{last}%2 has two jobs run at a time, --gpus-per-node=1 with
# --cpus-per-task=8 gives each one GPU. Slurm keeps a copy, so this file may be written anew while
# jobs wait.
{options}
#SBATCH --job-name={job_name}
#SBATCH --array=0-{last}
#SBATCH --output={output}
set -uo pipefail
cd "${{SLURM_SUBMIT_DIR:?is set by sbatch}}" || exit 2
{export}
# A log, and the words of `mallowspo train`.
jobs=(
{jobs}
)
eval "set -- ${{jobs[SLURM_ARRAY_TASK_ID]}}"
log=$1
shift

begin=$(wc -c 2> /dev/null < "$log" || echo 0)
code=0
bash {one_node} "$@" >> "$log" 2>&1 || code=$?
# 75: it was asked to stop, and is in the queue again.
if ((code != 0 && code != 75)); then
    own='^mallowspo( \\(process [0-9]+\\))?: '
    # The process that failed says so first; the others follow.
    lines=$(tail -c "+$((begin + 1))" "$log" | grep -E "$own")
    reason=$(grep -v -m 1 '{follows}' <<< "$lines") || reason=${{lines%%$'\n'*}}
    reason=${{reason#*: }}
    echo "failed: ${{reason:-ended with exit code $code}}" >> "$log"
fi
exit "$code"
"""


def command_line(words: Sequence[str], accelerate: str | None) -> str:
    """One line for a shell that trains a job, or goes on with it."""
    if accelerate is None:
        program = ["mallowspo", "train"]
    else:
        program = ["accelerate", "launch", "--config_file", accelerate, "-m", "mallowspo_cli"]
        program.append("train")
    return shlex.join([*program, *words, "--resume"])


def write_array(
    directory: Path,
    name: str,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    accelerate: str | None,
) -> Path:
    """Write sweep.sbatch, a job array; returns its path.

    Args:
        jobs: a log file and the words of `mallowspo train` each.
        accelerate: the launcher's file; None leaves it to one_node.sbatch.

    Raises:
        RecipeError: this is no checkout, so there is no script to build on.
    """
    if not ONE_NODE.is_file():
        raise RecipeError(
            "--launch slurm builds on scripts/slurm/one_node.sbatch, which a checkout has and an "
            "installed package has not. --launch print gives the commands."
        )
    script = directory / "sweep.sbatch"
    lines = ONE_NODE.read_text(encoding="utf-8").splitlines()
    options = [
        line for line in lines if line.startswith("#SBATCH") and not line.startswith(REPLACED)
    ]
    text = SCRIPT.format(
        last=len(jobs) - 1,
        job_name=name.replace("/", "-"),
        script=shlex.quote(str(script)),
        # sbatch reads quotes in its own lines, too.
        output=shlex.quote(f"{directory}/slurm-%A_%a.log"),
        options="\n".join(options),
        # Whatever the shell that submits has exported.
        export=f"export ACCELERATE_FILE={shlex.quote(accelerate)}\n" if accelerate else "",
        follows=FOLLOWS,
        jobs="\n".join(f"  {shlex.quote(shlex.join([str(log), *words]))}" for log, words in jobs),
        one_node=shlex.quote(str(ONE_NODE)),
    )
    write_text(script, text)
    return script
