"""What a benchmark ran on: the facts that its `environment.json` holds, and its commands without this machine's paths."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def printed(*command):
    """What a short command prints, in one string; "unknown" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name():
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit_of(anneal):
    """The commit that a packed binary was built from (`gpu-pack` writes it beside), else the checkout's."""
    packed = Path(anneal).with_name("commit")
    return packed.read_text().strip() if packed.exists() else printed("git", "rev-parse", "HEAD")


def torch_versions():
    return printed(sys.executable, "-c", "import torch; print(torch.__version__, torch.backends.cudnn.version())")


def query_gpu(*keys):
    """What `nvidia-smi` knows of the first GPU as {key: text}, in MiB, W, MHz; None where there is none."""
    line = printed("nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits", "--id=0")
    return None if line == "unknown" else dict(zip(keys, map(str.strip, line.split(","))))


def doctor(anneal):
    """What `anneal doctor --json` says of the GPU, less the places of files."""
    try:
        facts = json.loads(printed(anneal, "doctor", "--json"))
    except ValueError:
        return None
    versions = {name: library["version"] for name, library in facts["libraries"].items()}
    return {"cpu": facts["cpu"]["name"], "devices": facts["gpu"]["devices"], "driver": facts["gpu"]["driver"], "libraries": versions}


def without_paths(command):
    return [Path(part).name if "/" in part and Path(part).exists() else part for part in command]
