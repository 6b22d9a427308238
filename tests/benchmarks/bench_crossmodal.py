"""Cross-modal weights and sample scores: ours against the plain definition, from sparse token features.

    python tests/benchmarks/bench_crossmodal.py

64 samples x 640 tokens (576 of an image), d_model 256, d_sae 4,096, about 55 active features a token: what leaves
`features.encode`. The plain definition of the weights collects every token's features in lists, sorts, takes and
averages cosines; for samples it is paper C's Algorithms 2 and 3, one after the other, where ours gives both and the
cosine score in one pass. Both get the same csr; ours gets it in batches of 16 samples, as a stream would give it, and
is checked to give the same. Everything is also given as a multiple of the time of the encoder's matrix product (one
thread). Then peak memory at 1x and 10x the samples. Exit status 1 if a target fails.
"""

import argparse
import os
import subprocess
import sys
import time
import tracemalloc

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import scipy.sparse as sp

from mmsae_helpers.meters.crossmodal import CrossModal, sample_scores

SAMPLES, TOKENS, IMAGE_TOKENS, D_MODEL, D_SAE, ACTIVE, BATCH = 64, 640, 576, 256, 4_096, 55, 16


def made_tokens(samples, seed=0):
    """Features csr [tokens, D_SAE] in steps of 1/64 (so that there are ties), is_image, sample ids, residuals."""
    rng = np.random.default_rng(seed)
    n = samples * TOKENS
    count = rng.binomial(D_SAE, ACTIVE / D_SAE, n)
    indptr = np.concatenate([[0], np.cumsum(count)])
    columns = [np.sort(rng.choice(D_SAE, c, replace=False)) for c in count]
    values = (1 + rng.integers(1, 256, indptr[-1]) / 64).astype(np.float32)
    features = sp.csr_matrix((values, np.concatenate(columns).astype(np.int32), indptr), shape=(n, D_SAE))
    is_image = np.arange(n) % TOKENS < IMAGE_TOKENS
    return features, is_image, np.arange(n) // TOKENS, rng.standard_normal((n, D_MODEL), dtype=np.float32)


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def plain_weights(features, is_image, residual, reading, k=5, delta=1.0):
    """The definition of METHODS C.2, token by token."""
    text, image, tokens = ([[] for _ in range(D_SAE)] for _ in range(3))
    for token in range(features.shape[0]):
        entries = slice(features.indptr[token], features.indptr[token + 1])
        pairs = list(zip(features.indices[entries], features.data[entries], strict=True))
        if reading == "as_published":
            for feature, value in sorted(pairs, key=lambda pair: -pair[1])[:50]:
                tokens[feature].append((-value, token))
            continue
        for feature, value in pairs:
            if value > delta:
                (image if is_image[token] else text)[feature].append((-value, token))
    weights = np.full(D_SAE, np.nan)
    for feature in range(D_SAE):
        if reading == "paper":
            pairs = list(zip(sorted(text[feature])[:k], sorted(image[feature])[:k], strict=False))
        else:
            top = sorted(tokens[feature])[:30]
            a, b = ([t for t in top if is_image[t[1]] == kind][:k] for kind in (False, True))
            pairs = [(t, i) for t in a for i in b] if len(a) == len(b) == k else []
        if pairs:
            weights[feature] = np.mean([cosine(residual[t], residual[i]) for (_, t), (_, i) in pairs])
    return weights


def plain_cooccurrence(features, is_image, samples, delta=1.0):
    """Algorithm 3: per sample, the features in the set of its text tokens and in that of its image tokens."""
    scores = []
    for sample in range(samples):
        on_text, on_image = set(), set()
        for token in range(sample * TOKENS, (sample + 1) * TOKENS):
            entries = slice(features.indptr[token], features.indptr[token + 1])
            for feature, value in zip(features.indices[entries], features.data[entries], strict=True):
                if value > delta:
                    (on_image if is_image[token] else on_text).add(feature)
        scores.append(len(on_text & on_image))
    return scores


def plain_l0(features, samples, delta=1.0):
    """Algorithm 2: per sample, the mean over tokens of the number of active features."""
    scores = []
    for sample in range(samples):
        counts = []
        for token in range(sample * TOKENS, (sample + 1) * TOKENS):
            values = features.data[features.indptr[token] : features.indptr[token + 1]]
            counts.append(sum(value > delta for value in values))
        scores.append(sum(counts) / TOKENS)
    return scores


def batches(features, samples):
    """(rows of the tokens, their csr) per batch, cut beforehand: what a stream hands over."""
    cut = [slice(i * TOKENS, min(i + BATCH, samples) * TOKENS) for i in range(0, samples, BATCH)]
    return [(rows, features[rows]) for rows in cut]


def streamed(parts, is_image, residual, reading):
    weights = CrossModal(D_SAE, D_MODEL, reading=reading)
    for rows, features in parts:
        weights.add(features, is_image[rows], residual[rows])
    return weights.weights()


def scored(parts, is_image, sample):
    none = np.zeros(D_SAE)
    tables = [sample_scores(features, sample[rows], is_image[rows], none) for rows, features in parts]
    return np.concatenate([np.stack([table.cooccurrence, table.l0], axis=1) for table in tables])


def seconds(call, rounds):
    """Result, and least seconds of processor time of a call (one thread each, so a busy neighbour counts less)."""
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        result = call()
        times.append(time.process_time() - begun)
    return result, min(times)


def speed(rounds):
    """Prints times and multiples; returns {name: ratio}."""
    features, is_image, sample, residual = made_tokens(SAMPLES)
    parts, encoder = batches(features, SAMPLES), np.zeros((D_MODEL, D_SAE), np.float32)
    print(f"{SAMPLES} samples x {TOKENS} tokens, {features.nnz / len(sample):.1f} active a token; least ms")
    _, product = seconds(lambda: [residual[rows] @ encoder for rows, _ in parts], rounds)
    print(f"encoder's matrix product: {product * 1e3:.0f} ms")
    cases = {
        f"omega, {reading}": (
            lambda reading=reading: plain_weights(features, is_image, residual, reading),
            lambda reading=reading: streamed(parts, is_image, residual, reading),
        )
        for reading in ("paper", "as_published")
    }
    cases["co-occurrence and L0"] = (
        lambda: np.stack([plain_cooccurrence(features, is_image, SAMPLES), plain_l0(features, SAMPLES)], axis=1),
        lambda: scored(parts, is_image, sample),
    )
    ratios = {}
    for name, (plain, ours) in cases.items():
        found, quick = seconds(ours, rounds)
        expected, slow = seconds(plain, max(1, rounds // 3))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        ratios[name] = slow / quick
        print(f"{name:22s} plain {slow * 1e3:7.0f}  ours {quick * 1e3:6.1f} | {ratios[name]:5.0f}x", end="")
        print(f" | {slow / product:6.1f} and {quick / product:5.2f} times the encoder's product")
    return ratios


def memory(samples, reading):
    """Prints the peak MiB, traced and resident, that streaming adds; the stream repeats no tokens."""
    made = [made_tokens(BATCH, seed)[:2] for seed in range(2)]
    tracemalloc.start()
    rng, weights = np.random.default_rng(0), CrossModal(D_SAE, D_MODEL, reading=reading)
    for batch in range(samples // BATCH):
        features, is_image = made[batch % 2]
        shuffled = features[:, rng.permutation(D_SAE)].sorted_indices()
        weights.add(shuffled, is_image, rng.standard_normal((features.shape[0], D_MODEL), dtype=np.float32))
    weights.weights()
    resident = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(tracemalloc.get_traced_memory()[1] / 2**20, int(resident) / 2**10)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timings of each of ours; a third for the plain ones")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # samples and reading, in a process of its own
    arguments = parser.parse_args()
    if arguments.memory:
        return memory(int(arguments.memory[0]), arguments.memory[1])
    ratios = speed(arguments.rounds)
    targets = {
        name: (f"{ratio:.0f}x", ratio >= (50 if name.startswith("co") else 30)) for name, ratio in ratios.items()
    }
    for reading, n_lists in (("paper", 10), ("as_published", 30)):
        runs = [(sys.executable, __file__, "--memory", str(n * SAMPLES), reading) for n in (1, 10)]
        (once, rss), (ten, rss_ten) = (map(float, subprocess.check_output(run, text=True).split()) for run in runs)
        bound = D_SAE * n_lists * D_MODEL * 4 / 2**20
        print(
            f"memory, {reading}: traced peak {once:.0f} MiB at {SAMPLES} samples, {ten:.0f} at {10 * SAMPLES};", end=""
        )
        print(f" resident {rss:.0f} and {rss_ten:.0f}; features x K x d_model is {bound:.0f}")
        targets[f"memory at 10x the samples, {reading}"] = (f"{ten / once:.2f}x", ten < 1.1 * once)
    print("targets: " + "; ".join(f"{n}: {what} {'holds' if held else 'FAILS'}" for n, (what, held) in targets.items()))
    raise SystemExit(not all(held for _, held in targets.values()))


if __name__ == "__main__":
    main()
