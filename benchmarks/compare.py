#!/usr/bin/env python3
"""Anneal beside its PyTorch peer: the same step on the same cores, in turns within one run.

What: starts `anneal bench step` and the peers one after another, round after round (A B A B ...), each a process of its own
pinned to the same cores, and prints the ratios of the medians of images a second and of the peak memory.
Contract: both sides print one JSON object with `--json`; of it `median_ms` (number, one step) and `step_ms` (list, every timed
step) are read. Peak memory is not taken from either side but from the kernel (`ru_maxrss` of the process), so it includes each
one's run time. Everything goes to `benchmarks/<date>-<machine>-<topic>/`: `raw.jsonl` as it came, `environment.json`, `table.md`.
Not done: CUDA, where a resident size says nothing; run both sides' benches by hand there.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import cpu_name, printed, without_paths

HERE = Path(__file__).resolve().parent
CASES = {
    "dit-s2": ["--model", "DiT-S/2", "--batch", "8"],
    "digits": ["--hidden", "128", "--depth", "6", "--heads", "4", "--patch", "2", "--image-size", "8", "--channels", "1",
               "--classes", "10", "--no-learn-sigma", "--batch", "128"],
}
STEPS = {"dit-s2": 12, "digits": 60}
PEERS = {"torch": [], "torch-arena": ["--arena"], "torch-compile": ["--compile"], "torch-mkl": [], "torch-mkl-arena": ["--arena"]}
# Peers that run MKL's AVX-512 kernels on processors of any maker: see peers/mkl_as_on_intel.c.
AS_ON_INTEL = {"torch-mkl", "torch-mkl-arena"}


def commands(arguments, case):
    """-> {name: argument list}; every one takes the same model, batch, precision and number of steps."""
    length = ["--warmup", "3", "--steps", str(arguments.steps or STEPS[case])]
    threads = str(len(arguments.cores))
    made = {}
    if arguments.anneal:
        made["anneal"] = [arguments.anneal, "bench", "step", *CASES[case], "--precision", "fp32", "--device", f"cpu:{threads}",
                          *length, "--json"]
    for peer in arguments.peers:
        made[peer] = [sys.executable, str(HERE / "peers" / "torch_dit.py"), *CASES[case], "--dtype", "fp32", "--device", "cpu",
                      "--threads", threads, *length, *PEERS[peer], "--json"]
    return made


def surroundings(names, folder):
    """-> {name: environment}; builds what some peers preload in `folder`."""
    made = {name: dict(os.environ) for name in names}
    if AS_ON_INTEL & set(names):
        library = str(Path(folder) / "mkl_as_on_intel.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(HERE / "peers" / "mkl_as_on_intel.c")], check=True)
        for name in AS_ON_INTEL & set(names):
            made[name]["LD_PRELOAD"] = library
    return made


def run_once(name, command, cores, environment):
    """One process on `cores`: its JSON, with what the kernel says of it and how busy the machine was."""
    load = os.getloadavg()[0]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment,
                             preexec_fn=lambda: os.sched_setaffinity(0, cores))
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{name} ended with {child.returncode}: {' '.join(command)}")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{name} printed no JSON object: {' '.join(command)}")
    report = json.loads(lines[-1])
    for key in ("median_ms", "step_ms"):
        if key not in report:
            raise SystemExit(f"{name}: its JSON has no {key!r}: {sorted(report)}")
    return {"name": name, "load_before": load, "peak_rss_mib": usage.ru_maxrss / 1024,
            "cpu_seconds": usage.ru_utime + usage.ru_stime, "command": without_paths(command), "report": report}


def environment(arguments):
    import torch

    return {"time": datetime.datetime.now().isoformat(timespec="seconds"), "cpu": cpu_name(), "cores": sorted(arguments.cores),
            "kernel": platform.release(), "python": platform.python_version(), "torch": torch.__version__,
            "commit": printed("git", "rev-parse", "HEAD"), "uncommitted_files": len(printed("git", "status", "--porcelain").splitlines()),
            "rustc": printed("rustc", "--version")}


def table(case, batch, runs, names):
    """Median over all timed steps of all rounds; ratios above 1 favour Anneal for speed, below 1 for memory."""
    lines = [f"## {case}, batch {batch}", "", "| engine | img/s (median) | best round | ms a step | peak MiB | rounds' medians, ms |",
             "|---|---|---|---|---|---|"]
    speed, memory = {}, {}
    for name in names:
        mine = [run for run in runs if run["name"] == name]
        median = statistics.median(step for run in mine for step in run["report"]["step_ms"])
        rounds = [run["report"]["median_ms"] for run in mine]
        speed[name], memory[name] = 1e3 * batch / median, statistics.median(run["peak_rss_mib"] for run in mine)
        lines.append(f"| {name} | {speed[name]:.2f} | {1e3 * batch / min(rounds):.2f} | {median:.1f} | {memory[name]:.0f} | "
                     f"{', '.join(f'{r:.0f}' for r in rounds)} |")
    lines.append("")
    if "anneal" in speed:
        for name in names:
            if name != "anneal":
                lines.append(f"anneal / {name}: {speed['anneal'] / speed[name]:.2f}x img/s, {memory['anneal'] / memory[name]:.2f}x peak memory")
    loads = [run["load_before"] for run in runs]
    lines.append(f"Load average before the runs: {min(loads):.1f} to {max(loads):.1f}.")
    return "\n".join(lines) + "\n"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--anneal", help="the built binary, for example target/release/anneal; the peers alone when left out")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["torch", "torch-arena"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, help="timed steps a round; 12 for dit-s2 and 60 for digits when left out")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0))[:2])
    parser.add_argument("--machine", default=f"{platform.machine()}-cpu", help="name of the machine in the folder's name")
    parser.add_argument("--out", type=Path, help="folder to write; dated when left out")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    cases = list(CASES) if arguments.case == "all" else [arguments.case]
    topic = "step" if arguments.case == "all" else f"step-{arguments.case}"
    folder = arguments.out or HERE / f"{datetime.date.today()}-{arguments.machine}-{topic}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(environment(arguments), indent=1) + "\n")
    tables = []
    with (folder / "raw.jsonl").open("w") as raw, tempfile.TemporaryDirectory() as scratch:
        surrounding = surroundings(["anneal", *arguments.peers], scratch)
        for case in cases:
            runs, named = [], commands(arguments, case)
            for turn in range(arguments.rounds):
                for name, command in named.items():
                    run = {"case": case, "round": turn, **run_once(name, command, set(arguments.cores), surrounding[name])}
                    raw.write(json.dumps(run) + "\n")
                    raw.flush()
                    runs.append(run)
                    print(f"{case} round {turn + 1}: {name} {run['report']['median_ms']:.1f} ms, {run['peak_rss_mib']:.0f} MiB", flush=True)
            batch = int(CASES[case][CASES[case].index("--batch") + 1])
            tables.append(table(case, batch, runs, list(named)))
            print(tables[-1])
    (folder / "table.md").write_text("\n".join(tables))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
