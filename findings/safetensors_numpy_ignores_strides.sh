#!/usr/bin/env bash
# Guess: safetensors.numpy.save_file writes the array that it is given: a transposed matrix comes back as it was, as
# from np.save, or is refused, as safetensors.torch refuses it. (Embeddings or gradients of rows that were reduced by
# scikit-learn's PCA are such arrays.)
#
# What happens: The bytes are written in the order in which they lie in memory, under the array's shape. A matrix in
# Fortran order, contiguous and dense, comes back with its values in other places, without a warning. Rows that are
# neighbours then are neighbours by accident. A copy by np.ascontiguousarray comes back whole.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, scikit-learn 1.9.1, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     given: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#     read:  [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#     rows whose nearest row is of their topic: np.save 1.00, as given 0.37, copied 1.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile safetensors==0.8.0 numpy==2.4.6 scikit-learn==1.9.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

small = np.arange(6.0).reshape(2, 3).T
save_file({"small": small}, "small.safetensors")
read = load_file("small.safetensors")["small"]
print("given:", small.tolist())
print("read: ", read.tolist())
assert read.tolist() == [[0, 1], [2, 3], [4, 5]] != small.tolist()

rng = np.random.default_rng(0)
topics = np.repeat(np.arange(10), 20)
rows = rng.normal(size=(10, 64))[topics] + 0.1 * rng.normal(size=(200, 64))  # 200 rows of ten topics


def neighbours_of_one_topic(embedded):
    distance = ((embedded[:, None] - embedded[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    return (topics[distance.argmin(1)] == topics).mean()


embedded = PCA(8, svd_solver="full").fit_transform(rows)
assert embedded.flags.f_contiguous and not embedded.flags.c_contiguous
np.save("rows.npy", embedded)
save_file({"as given": embedded, "copied": np.ascontiguousarray(embedded)}, "rows.safetensors")
back = {"np.save": np.load("rows.npy"), **load_file("rows.safetensors")}
shares = {name: float(neighbours_of_one_topic(back[name])) for name in ("np.save", "as given", "copied")}
print("rows whose nearest row is of their topic:", ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))

assert shares["np.save"] == shares["copied"] == 1 and shares["as given"] < 0.6
EOF
