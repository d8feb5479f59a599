#!/usr/bin/env python3
"""How far training in bf16 strays from fp32: Anneal's losses beside PyTorch's, on the digits.

What: trains the model of `recipes/digits.yaml` in fp32 and in bf16 from the same seed, with `anneal train` and with
`peers/torch_dit.py` (autocast), for several seeds. Within an engine both runs of a seed have the same weights to begin with and
the same batches, timesteps, noise and dropped labels, so what differs between their losses is precision alone.
Contract: the difference of a step is |bf16 - fp32| / fp32 of its losses. What counts is the median and the 95 %
quantile over all steps of all seeds, as ratios of Anneal's to PyTorch's. Seeds differ by more than engines do, so each ratio has a 95 %
interval, by drawing seeds anew with replacement (bootstrap): Anneal is "within the spread" unless an interval lies above 1. Beside
them stand the largest difference, the mean with its sign (a bias that does not go away), and the same for losses averaged over
windows of steps. `--out` gets `raw.jsonl`
(each run with its losses), `environment.json`, `spread.json`, `table.md`, and `spread.svg` where matplotlib is installed.
Not done: timing; runs share the device.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from compare import CASES
from machine import ROOT, commit_of, cpu_name, doctor, query_gpu, torch_versions, without_paths

PEER = ROOT / "benchmarks" / "peers" / "torch_dit.py"
# The peer's words for `recipes/digits.yaml`; the recipe has the same figures.
RECIPE = ROOT / "recipes" / "digits.yaml"
PEER_RECIPE = [*CASES["digits"], "--objective", "v", "--betas", "squaredcos", "--lr", "3e-3", "--lr-warmup", "50",
               "--lr-schedule", "cosine", "--beta2", "0.99", "--ema", "0.99"]
ENGINES = ("anneal", "torch")
# Of seeds, for an interval.
DRAWS = 2000


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Runs begin in a folder of their own, where a relative path would lead elsewhere.
    parser.add_argument("--anneal", type=os.path.abspath, default=str(ROOT / "target" / "release" / "anneal"), help="the binary")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=200, help="of each run, at least 51")
    parser.add_argument("--seeds", type=int, default=16, help="few leave the intervals wide")
    parser.add_argument("--window", type=int, default=20, help="steps over which losses are averaged")
    parser.add_argument("--low", choices=["bf16", "fp32"], default="bf16", help="what is compared with fp32; fp32: do runs repeat themselves?")
    parser.add_argument("--parallel", type=int, help="runs at the same time; on a GPU half as many as there are cores, else 1")
    return parser.parse_args()


def command_of(arguments, engine, precision, seed, folder, threads):
    """-> command, and the file that holds its losses."""
    if engine == "anneal":
        device = "cuda" if arguments.device == "cuda" else f"cpu:{threads}"
        settings = {"output": folder.name, "device": device, "seed": seed, "train.precision": precision, "train.steps": arguments.steps,
                    "train.log_every": 1, "sample.every": 0, "train.checkpoint.every": arguments.steps}
        words = [f"{key}={value}" for key, value in settings.items()]
        return [arguments.anneal, "train", str(RECIPE), *words, "--quiet"], folder / "metrics.jsonl"
    losses = folder / "losses.json"
    command = [sys.executable, str(PEER), "--train-digits", str(ROOT / "anneal-data" / "digits.npz"), *PEER_RECIPE,
               "--device", arguments.device, "--dtype", precision, "--steps", str(arguments.steps), "--seed", str(seed),
               "--threads", str(threads), "--samplers", "--losses", str(losses)]
    return command, losses


def losses_in(path):
    """Of a run's metrics or the peer's list, in the order of the steps; NaN where a loss was not finite."""
    text = path.read_text()
    values = [json.loads(line)["loss"] for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [float("nan") if value is None else value for value in values]


def train(arguments, job, scratch, threads):
    """One run, in the folder of all -> its record with all losses; a run that fails ends everything."""
    engine, precision, seed, turn = job
    folder = Path(scratch) / f"{engine}-{precision}-{seed}-{turn}"
    folder.mkdir()
    command, path = command_of(arguments, engine, precision, seed, folder, threads)
    ended = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if ended.returncode != 0:
        raise SystemExit(f"{engine}, {precision}, seed {seed} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    losses = losses_in(path)
    if len(losses) != arguments.steps:
        raise SystemExit(f"{engine}, {precision}, seed {seed}: {len(losses)} losses of {arguments.steps} steps")
    print(f"{engine}, {precision}, seed {seed}: last loss {losses[-1]:.4f}", flush=True)
    return {"engine": engine, "precision": precision, "seed": seed, "turn": turn, "command": without_paths(command), "losses": losses}


def run_all(arguments):
    """Every engine, precision and seed -> records in the order of the jobs."""
    # A turn tells the two runs of a seed apart, which `--low fp32` gives the same precision.
    jobs = [(engine, precision, seed, turn) for seed in range(arguments.seeds) for engine in ENGINES
            for turn, precision in enumerate(("fp32", arguments.low))]
    cores = len(os.sched_getaffinity(0))
    parallel = arguments.parallel or (max(1, cores // 2) if arguments.device == "cuda" else 1)
    threads = max(1, cores // parallel)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda job: train(arguments, job, scratch, threads), jobs))


def relative(records, engine, window):
    """(low - fp32) / fp32 of an engine's losses, averaged over windows of steps first -> [seeds, windows]."""
    def losses(turn):
        rows = np.array([record["losses"] for record in records if record["engine"] == engine and record["turn"] == turn])
        whole = rows.shape[1] // window * window
        return rows[:, :whole].reshape(len(rows), -1, window).mean(2)

    high, low = losses(0), losses(1)
    return (low - high) / high


def figures(signed):
    size = np.abs(signed)
    by_seed = np.median(size, 1)
    return {"median": float(np.median(size)), "p95": float(np.quantile(size, 0.95)), "max": float(size.max()),
            "mean_signed": float(signed.mean()), "medians_of_seeds": by_seed.tolist()}


def intervals(ours, theirs):
    """95 % intervals of the ratios of median and 95 % quantile, seeds drawn anew of both sides; [seeds, windows] each."""
    random, sizes = np.random.default_rng(0), [np.abs(ours), np.abs(theirs)]
    draws = {"median": [], "p95": []}
    for _ in range(DRAWS):
        drawn = [size[random.integers(0, len(size), len(size))] for size in sizes]
        for key, share in (("median", 0.5), ("p95", 0.95)):
            above, below = (np.quantile(size, share) for size in drawn)
            # fp32 beside itself may not differ at all.
            draws[key].append(above / below if below else (np.inf if above else 1.0))
    return {key: [float(edge) for edge in np.quantile(ratios, [0.025, 0.975], method="nearest")] for key, ratios in draws.items()}


def judge(records, arguments):
    """-> what `spread.json` holds."""
    result = {"device": arguments.device, "low": arguments.low, "steps": arguments.steps, "seeds": arguments.seeds, "window": arguments.window}
    for name, window in (("steps_alone", 1), ("windows", arguments.window)):
        signed = {engine: relative(records, engine, window) for engine in ENGINES}
        ratios = intervals(*signed.values())
        within = all(low <= 1 for low, _ in ratios.values())
        result[name] = {**{engine: figures(rows) for engine, rows in signed.items()}, "intervals": ratios, "within_the_spread": within}
    return result


def table(result):
    lines = [f"## {result['low']} beside fp32 on the digits, {result['steps']} steps, {result['seeds']} seeds, {result['device']}", "",
             "| losses of | engine | median | 95 % quantile | largest | mean, signed | medians of single seeds |", "|---|---|---|---|---|---|---|"]
    titles = {"steps_alone": "single steps", "windows": f"windows of {result['window']} steps"}
    for name, title in titles.items():
        for engine in ENGINES:
            row = result[name][engine]
            seeds = row["medians_of_seeds"]
            lines.append(f"| {title} | {engine} | {row['median']:.2e} | {row['p95']:.2e} | {row['max']:.2e} | {row['mean_signed']:+.1e} | "
                         f"{min(seeds):.1e} to {max(seeds):.1e} |")
    lines.append("")
    for name, title in titles.items():
        ours, theirs = result[name]["anneal"], result[name]["torch"]
        ratios = "; ".join("{} {:.2f}x, {:.2f} to {:.2f}".format(words, ours[key] / theirs[key], *result[name]["intervals"][key])
                           for key, words in (("median", "median"), ("p95", "95 % quantile")) if theirs[key])
        lines.append(f"{title}: Anneal's {result['low']} is {'within' if result[name]['within_the_spread'] else 'NOT within'} the spread of PyTorch's"
                     + (f" (Anneal / PyTorch, with 95 % intervals: {ratios})" if ratios else ""))
    return "\n".join(lines) + "\n"


def draw(records, arguments, path):
    """Losses of the first seed, and the median difference of each step over all seeds."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    for engine, colour in zip(ENGINES, ("tab:blue", "tab:orange")):
        runs = [record for record in records if record["engine"] == engine and record["seed"] == 0]
        for record, line in zip(runs, ("-", ":")):
            above.plot(record["losses"], line, color=colour, label=f"{engine}, {record['precision']}")
        size = np.abs(relative(records, engine, 1))
        below.plot(np.median(size, 0), color=colour, label=f"{engine}, median of {len(size)} seeds")
        below.plot(size.max(0), ":", color=colour, label=f"{engine}, largest")
    above.set(ylabel="loss, seed 0", yscale="log")
    below.set(xlabel="step", ylabel=f"|{arguments.low} - fp32| / fp32", yscale="log")
    for panel in (above, below):
        panel.legend(fontsize="small")
    picture.tight_layout()
    picture.savefig(path)


def main():
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"time": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit_of(arguments.anneal), "cpu": cpu_name(),
             "torch": torch_versions(), "gpu": query_gpu("name", "driver_version"),
             "doctor": doctor(arguments.anneal)}
    (arguments.out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    records = run_all(arguments)
    (arguments.out / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = judge(records, arguments)
    (arguments.out / "spread.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(result))
    draw(records, arguments, arguments.out / "spread.svg")
    print("\n" + table(result))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
