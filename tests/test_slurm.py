"""The Slurm scripts start what they say, with programs that only note how they were called."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
SEVERAL, ONE = "several_nodes.sbatch", "one_node.sbatch"

NOTE = """#!/usr/bin/env python3
import json, os, sys
names = ("MALLOWSPO_CACHE", "HF_HOME", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK", "SLURM_NODEID")
call = {"program": os.path.basename(sys.argv[0]), "words": sys.argv[1:]}
call["environment"] = {name: os.environ.get(name) for name in names}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
"""
SRUN = (
    NOTE
    + """
import subprocess
nodes = range(int(os.environ["SLURM_NNODES"]))
tasks = [subprocess.Popen(sys.argv[3:], env={**os.environ, "SLURM_NODEID": str(n)}) for n in nodes]
with open(os.environ["CALLS"] + ".tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
)
SCONTROL = (
    NOTE
    + """
if sys.argv[1:2] == ["show"]:
    print("gpu007\\ngpu008")
"""
)
ACCELERATE = (
    NOTE
    + """
import subprocess
trainer = [sys.executable, os.environ["TRAINER"]]
code = subprocess.run(trainer, check=False).returncode
if code:
    # As torch's launcher, which ends with 1 whatever its processes ended with.
    print(f"  exitcode  : {code} (pid: 1234)", file=sys.stderr)
    sys.exit(1)
"""
)
"""Fake programs."""

ENDS = "import os, sys; sys.exit(int(os.environ['TRAINER_CODE']))"
WAITS = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
open(os.environ["CALLS"] + f".ready{os.environ['SLURM_NODEID']}", "w").close()
while not asked:
    time.sleep(0.02)
# Saving takes a while, in which nobody may be killed.
time.sleep(0.3)
sys.exit(75)
"""
"""Fake trainers."""


class Job:
    """A script with fake programs, as sbatch would start it."""

    def __init__(self, place: Path, script: str, **environment: str):
        self.script, self.calls = ROOT / "scripts" / "slurm" / script, place / "calls.jsonl"
        programs = place / "bin"
        programs.mkdir()
        fakes = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}
        for name, text in fakes.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (place / "trainer.py").write_text(environment.pop("trainer", ENDS))
        (place / "recipes").symlink_to(ROOT / "recipes")
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(place),
            "CALLS": str(self.calls),
            "TRAINER": str(place / "trainer.py"),
            "TRAINER_CODE": "0",
            "SLURM_SUBMIT_DIR": str(place),
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "gpu[007-008]",
            "SLURM_NNODES": "2" if script == SEVERAL else "1",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            **environment,
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script), *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> int:
        process = self.start(*words)
        process.communicate(timeout=60)
        return process.returncode

    def of(self, program: str) -> list[dict]:
        lines = self.calls.read_text().splitlines() if self.calls.is_file() else []
        return [call for call in map(json.loads, lines) if call["program"] == program]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_them_and_they_name_files_that_are_there(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    files = set(re.findall(r"(?:recipes|scripts)/[\w/.]*\w", text))
    assert {path for path in files if not (ROOT / path).is_file()} == set()
    for name in re.findall(r"recipe=(\w+)", text):
        assert (ROOT / "recipes" / f"{name}.yaml").is_file()
    options = re.findall(r"^#SBATCH (--[\w-]+)", text, re.MULTILINE)
    assert {"--signal", "--requeue", "--nodes", "--gpus-per-node"} <= set(options)
    # What a site calls its queues is given to sbatch.
    assert not {"--partition", "--account", "--qos", "--constraint"} & set(options)
    assert "#SBATCH --signal=TERM@300" in text


def test_both_are_there() -> None:
    assert [path.name for path in SCRIPTS] == [ONE, SEVERAL]


def test_every_node_launches_its_share(tmp_path: Path) -> None:
    job = Job(tmp_path, SEVERAL)
    assert job.run("recipe=llama3_phi", "name=a name") == 0
    (srun,) = job.of("srun")
    # Where one node fails the others are not waited for.
    assert srun["words"][:4] == ["--kill-on-bad-exit=1", "--wait=0", "bash", "-c"]
    launches = sorted(job.of("accelerate"), key=lambda call: call["environment"]["SLURM_NODEID"])
    assert len(launches) == 2
    for node, launch in enumerate(launches):
        assert launch["words"] == [
            *("launch", "--config_file", "recipes/accelerate/multinode_zero3.yaml"),
            *("--num_machines", "2", "--machine_rank", str(node)),
            *("--main_process_ip", "gpu007", "--main_process_port", str(20000 + 4321)),
            *("--num_processes", "16"),
            *("-m", "mallowspo_cli", "train", "recipe=llama3_phi", "name=a name", "--resume"),
        ]
    assert not [c for c in job.of("scontrol") if c["words"][0] == "requeue"]


def test_one_node_launches_its_gpus(tmp_path: Path) -> None:
    job = Job(tmp_path, ONE, SLURM_GPUS_ON_NODE="4")
    assert job.run("recipe=llama3_phi") == 0
    (launch,) = job.of("accelerate")
    assert launch["words"] == [
        *("launch", "--config_file", "recipes/accelerate/zero3.yaml"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", "24321"),
        *("--num_processes", "4", "-m", "mallowspo_cli", "train", "recipe=llama3_phi", "--resume"),
    ]


@pytest.mark.parametrize("script", [ONE, SEVERAL])
def test_the_environment_is_set_unless_it_is_given(script: str, tmp_path: Path) -> None:
    (first, second) = (tmp_path / name for name in ("first", "second"))
    for place in (first, second):
        place.mkdir()
    job = Job(first, script)
    job.run("recipe=llama3_phi")
    found = job.of("accelerate")[0]["environment"]
    assert found["MALLOWSPO_CACHE"] == f"{first}/.cache/mallowspo"
    assert found["HF_HOME"] == f"{first}/.cache/huggingface"
    # 64 cores over 8 processes.
    assert (found["OMP_NUM_THREADS"], found["SRUN_CPUS_PER_TASK"]) == ("8", "64")
    given = {"MALLOWSPO_CACHE": "/shared/a", "HF_HOME": "/shared/b", "OMP_NUM_THREADS": "3"}
    job = Job(second, script, **given, ACCELERATE_FILE="recipes/accelerate/ddp.yaml")
    job.run("recipe=llama3_phi")
    launch = job.of("accelerate")[0]
    assert given.items() <= launch["environment"].items()
    assert launch["words"][2] == "recipes/accelerate/ddp.yaml"


@pytest.mark.parametrize("script", [ONE, SEVERAL])
@pytest.mark.parametrize(
    ("code", "ends_with", "again"),
    # Stopped and saved; stopped before training; a mistake of the user's; a crash; a lost node.
    [("75", 75, True), ("-10", 75, True), ("2", 1, False), ("1", 1, False), ("-9", 1, False)],
)
def test_only_a_run_that_was_stopped_is_queued_again(
    script: str, code: str, ends_with: int, again: bool, tmp_path: Path
) -> None:
    dies = f"import os; os.kill(os.getpid(), {code[1:]})" if code.startswith("-") else ENDS
    job = Job(tmp_path, script, TRAINER_CODE=code, trainer=dies)
    assert job.run("recipe=llama3_phi") == ends_with
    requeued = [call["words"] for call in job.of("scontrol") if call["words"][0] == "requeue"]
    assert requeued == ([["requeue", "4321"]] if again else [])


def test_a_run_that_never_ends_is_not_queued_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, ONE, TRAINER_CODE="75", SLURM_RESTART_COUNT="50")
    assert job.run("recipe=llama3_phi") == 75
    assert not job.of("scontrol")


@pytest.mark.parametrize("script", [ONE, SEVERAL])
def test_slurms_early_signal_reaches_the_trainers_who_may_save(script: str, tmp_path: Path) -> None:
    job = Job(tmp_path, script, trainer=WAITS)
    process = job.start("recipe=llama3_phi")
    nodes = int(job.environment["SLURM_NNODES"])
    ready = [Path(f"{job.calls}.ready{node}") for node in range(nodes)]
    end = time.monotonic() + 30
    while not all(path.exists() for path in ready) and time.monotonic() < end:
        time.sleep(0.05)
    # Slurm signals the tasks of the step and nothing that they have started.
    for task in Path(f"{job.calls}.tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert output.count("exitcode  : 75") == nodes
    assert ["requeue", "4321"] in [call["words"] for call in job.of("scontrol")]
