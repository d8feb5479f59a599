#!/usr/bin/env python3
"""Judges generated digits against the real ones: agreement with the asked class, Frechet distance, nearest neighbours.

What: `SAMPLES.npz` holds `arr_0` u8 [n, 8, 8, 1] and `arr_1` the asked classes [n]; `--data` the real digits (`images` u8,
`labels`). Pixels are divided by 255. Three judgements, each beside the figure that real digits reach:
1. agreement: scikit-learn's default SVC, fitted on all real digits, predicts the asked class;
2. Frechet distance between normals fitted to samples and real digits in the real digits' first 32 principal components;
3. distance of each sample to its nearest training digit beside that of held-out real digits, so that copies would show.
Not done: Inception features; these digits are far from that network's images.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.svm import SVC

COMPONENTS = 32


def load_real(path):
    data = np.load(path)
    return data["images"].reshape(len(data["images"]), -1) / 255.0, data["labels"].astype(np.int64)


def load_samples(path, pixels):
    data = np.load(path)
    for key in ("arr_0", "arr_1"):
        if key not in data:
            raise SystemExit(f"{path}: no array {key!r}; write it with `anneal sample ... --out samples.npz`")
    images, labels = data["arr_0"], data["arr_1"].astype(np.int64)
    if images.dtype != np.uint8 or images[0].size != pixels or len(images) != len(labels):
        raise SystemExit(f"{path}: arr_0 is {images.dtype} {images.shape} and arr_1 {labels.shape}; expected u8 [n, 8, 8, 1] and [n]")
    return images.reshape(len(images), -1) / 255.0, labels


def frechet(a, b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 sqrt(A B)) of the normals fitted to the rows of `a` and `b`."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def nearest(points, training):
    squared = (points**2).sum(1)[:, None] + (training**2).sum(1)[None] - 2 * points @ training.T
    return np.sqrt(np.maximum(squared, 0).min(1))


def summary(distances):
    low, five, middle, high = np.percentile(distances, [0, 5, 50, 95])
    return {"min": float(low), "p5": float(five), "median": float(middle), "p95": float(high)}


def real_floor(features, labels, per_class, rounds, rng):
    """What real digits score: the file's first half against its second (other writers), random halves, and `per_class` digits
    of each class against all the others."""
    half = len(features) // 2
    file_halves = frechet(features[:half], features[half:])
    halves, subsets = [], []
    for _ in range(rounds):
        order = rng.permutation(len(features))
        halves.append(frechet(features[order[:half]], features[order[half:]]))
        picked = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)])
        rest = np.setdiff1d(np.arange(len(features)), picked)
        subsets.append(frechet(features[picked], features[rest]))
    return {"frechet_two_halves_in_file_order": file_halves, "frechet_two_random_halves": float(np.mean(halves)),
            "frechet_as_many_real_to_the_rest": float(np.mean(subsets))}


def judge(samples, asked, real, labels, seed=0):
    classifier = SVC().fit(real, labels)
    predicted = classifier.predict(samples)
    projection = PCA(COMPONENTS, svd_solver="full").fit(real)
    features = projection.transform(real)
    per_class = max(len(samples) // len(np.unique(labels)), 1)
    floor = real_floor(features, labels, min(per_class, 100), 10, np.random.default_rng(seed))
    split = StratifiedShuffleSplit(1, test_size=500, random_state=seed)
    kept, held_out = next(split.split(real, labels))
    return {
        "samples": len(samples),
        "agreement": float((predicted == asked).mean()),
        "agreement_by_class": {int(c): float((predicted[asked == c] == c).mean()) for c in np.unique(asked)},
        "agreement_of_real_held_out": float(cross_val_score(SVC(), real, labels, cv=5).mean()),
        "frechet": frechet(projection.transform(samples), features),
        **floor,
        "nearest_sample_to_all_real": summary(nearest(samples, real)),
        "nearest_sample_to_kept_real": summary(nearest(samples, real[kept])),
        "nearest_held_out_to_kept_real": summary(nearest(real[held_out], real[kept])),
        "identical_to_a_real_digit": int((nearest(samples, real) < 1e-6).sum()),
        "distinct_samples": int(len(np.unique(np.round(samples * 255), axis=0))),
    }


def print_table(path, result):
    print(f"{path}: {result['samples']} samples, {result['distinct_samples']} distinct, "
          f"{result['identical_to_a_real_digit']} identical to a real digit")
    rows = [
        ("agreement with the asked class", f"{result['agreement']:.1%}", f"{result['agreement_of_real_held_out']:.1%} (held out, 5 folds)"),
        (f"Frechet distance, {COMPONENTS} components", f"{result['frechet']:.3f}",
         f"{result['frechet_two_halves_in_file_order']:.3f} (two halves in file order), "
         f"{result['frechet_two_random_halves']:.3f} (random halves), "
         f"{result['frechet_as_many_real_to_the_rest']:.3f} (as many, to the rest)"),
    ]
    for key in ("min", "p5", "median", "p95"):
        rows.append((f"nearest training digit, {key}",
                     f"{result['nearest_sample_to_kept_real'][key]:.2f} ({result['nearest_sample_to_all_real'][key]:.2f} to all)",
                     f"{result['nearest_held_out_to_kept_real'][key]:.2f} (500 held out)"))
    print(f"{'':36}{'samples':22}real digits")
    for name, ours, real in rows:
        print(f"{name:36}{ours:22}{real}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("samples", nargs="+", help="npz with arr_0 and arr_1")
    parser.add_argument("--data", default=Path(__file__).parent.parent / "anneal-data" / "digits.npz", help="npz with images and labels")
    parser.add_argument("--json", action="store_true", help="one JSON object a file instead of the table")
    arguments = parser.parse_args()
    if not Path(arguments.data).exists():
        raise SystemExit(f"{arguments.data}: no such file; name the real digits with --data")
    real, labels = load_real(arguments.data)
    for path in arguments.samples:
        samples, asked = load_samples(path, real.shape[1])
        result = judge(samples, asked, real, labels)
        print(json.dumps({"file": path, **result})) if arguments.json else print_table(path, result)


if __name__ == "__main__":
    main()
