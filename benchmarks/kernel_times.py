#!/usr/bin/env python3
"""Where the time of a step goes on an NVIDIA GPU, kernel by kernel, as the captured step is replayed.

    python benchmarks/kernel_times.py target/release/anneal bench step --model DiT-S/2 --batch 256 --precision bf16 --device cuda

`anneal bench --profile` needs no tools, but sends every kernel by itself, so that gaps count to short ones. This runs the command
with a library (kernel_times.cpp, built with g++ against CUPTI of the CUDA toolkit in CUDA_HOME or /usr/local/cuda) that the driver
loads, and prints the mean of the steps in the last half of the run: microseconds and launches of each kernel, the time of all
together, and from one step to the next. Libraries' kernels are put together by what they are for.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
# A kernel that runs once in each step: in training, and in a model's evaluation.
ONCE = ("adamw_update", "pick")
# Kernels of cuBLASLt by a part of their name.
LIBRARY = {"nvjet": "products by cuBLASLt", "cutlass": "products by cuBLASLt", "splitKreduce": "cuBLASLt: sums of split depths",
           "globalKernelBgrad": "cuBLASLt: sums of bias gradients"}
# Kernels below this share of a step are put together.
LEAST_SHARE = 0.001


def build(folder):
    """-> the library that the driver loads."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    libraries = sorted(library for place in ("lib64", "extras/CUPTI/lib64") for library in (home / place).glob("libcupti.so*"))
    if not libraries:
        sys.exit(f"error: no CUPTI in {home}: set CUDA_HOME to a CUDA toolkit")
    target, library = folder / "kernel_times.so", libraries[0]
    includes = [f"-I{home / place}" for place in ("include", "extras/CUPTI/include")]
    command = ["g++", "-O1", "-shared", "-fPIC", *includes, SOURCE, "-o", target, library, f"-Wl,-rpath,{library.parent}"]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"error: {SOURCE.name} was not built")
    return target


def recorded(command):
    """-> (begin, end, name) of each kernel of the command, in ns, in the order in which they began."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        variables = {"CUDA_INJECTION64_PATH": str(build(folder)), "KERNEL_TIMES": str(folder / "times")}
        code = subprocess.run(command, env={**os.environ, **variables}).returncode
        if code != 0:
            sys.exit(f"error: the command ended with {code}")
        lines = (folder / "times").read_text().splitlines() if (folder / "times").exists() else []
    fields = (line.split(" ", 3) for line in lines)
    return sorted((int(begin), int(end), name) for begin, end, _, name in fields)


def steps_of_last_half(kernels):
    """-> the kernels of whole steps, and how many steps these are."""
    names = {name for _, _, name in kernels}
    mark = next((name for name in ONCE if name in names), None)
    places = [place for place, kernel in enumerate(kernels) if kernel[2] == mark]
    places = places[len(places) // 2:]
    if len(places) < 2:
        sys.exit(f"error: fewer than two whole steps among {len(kernels)} kernels; ask for more steps")
    return kernels[places[0]:places[-1] + 1], len(places) - 1


def table(kernels, steps):
    """`kernels` end with the first of the next step."""
    begin, last = kernels[0][0], kernels[-1][0]
    step = (last - begin) / steps
    sums = defaultdict(lambda: [0, 0])
    for start, end, name in kernels[:-1]:
        label = next((label for part, label in LIBRARY.items() if part in name), name)
        sums[label][0] += end - start
        sums[label][1] += 1
    rest = [label for label, (time, _) in sums.items() if time / steps < LEAST_SHARE * step]
    small = [sum(sums[label][part] for label in rest) for part in (0, 1)]
    rows = sorted(((label, *sums[label]) for label in sums if label not in rest), key=lambda row: -row[1])
    rows += [(f"{len(rest)} others", *small)] if rest else []
    total = sum(time for _, time, _ in rows)
    lines = [f"| kernel, mean of {steps} steps | us | launches |", "|---|---|---|"]
    lines += [f"| {label} | {time / steps / 1e3:.0f} | {count / steps:.0f} |" for label, time, count in rows]
    return [*lines, f"| all kernels | {total / steps / 1e3:.0f} | |", f"| from one step to the next | {step / 1e3:.0f} | |"]


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print("\n".join(table(*steps_of_last_half(recorded(sys.argv[1:])))))


if __name__ == "__main__":
    main()
