#!/bin/bash
# Everything that only a GPU can show, in one run of at most ten minutes on one GPU of the H200's class:
#
#     benchmarks/gpu.sh --out FOLDER [--minutes 10] [--parts numerics,memory,train,task,serve] [--tiny]
#
# Writes FOLDER/gpu.json and FOLDER/gpu.md after each part. A part that fails, that its limit ends, or that this
# machine cannot run is recorded with its reason and what it had measured by then, and the others go on; the exit
# code is then 1, or 0 if parts were skipped only. Without the modules that all parts need, both files give that
# as the reason. --tiny: tiny random models, also on a CPU; what CI runs.
#
# PYTHON trains, PYTHON_VLLM serves (default: .venv and .venv-gpu of this checkout, else python3). What is missing is
# installed into FOLDER/venv if an index can be reached, in at most INSTALL_S seconds (240) before the ten minutes;
# nothing is installed into an environment that is there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

out=
for argument in "$@"; do
  [ "${previous:-}" = --out ] && out=$argument
  previous=$argument
done
[ -n "$out" ] || { echo "gpu.sh: --out FOLDER is needed" >&2; exit 2; }
mkdir -p "$out"

give_up() { # writes both files for a run that cannot begin, and ends
  echo "gpu.sh: $1" >&2
  reason=$(printf '%s' "$1" | tr -d '"\\' | tr '\t\n|' '  /')
  printf '{"machine": null, "parts": {"all": {"status": "failed", "seconds": 0.0, "reason": "%s"}}, "goals": []}\n' \
    "$reason" > "$out/gpu.json"
  printf '| part | | seconds | |\n|---|---|---:|---|\n| all | failed | 0.0 | %s |\n' "$reason" > "$out/gpu.md"
  exit 1
}

first_that_runs() { # prints the first of the given pythons that runs
  for candidate in "$@"; do
    [ -n "$candidate" ] && command -v "$candidate" > /dev/null && "$candidate" -c '' 2> /dev/null && { echo "$candidate"; return; }
  done
  return 1
}

needed='import torch, transformers, peft, accelerate, pydantic, yaml, psutil, pyarrow'
python=$(first_that_runs "${PYTHON:-}" "$root/.venv/bin/python" python3) || give_up "no python found: set PYTHON"
if ! "$python" -c "$needed" 2> "$out/missing.log"; then
  missing="$python fails: $(tail -n 1 "$out/missing.log")"
  echo "gpu.sh: $missing; installing into $out/venv" >&2
  { "$python" -m venv --system-site-packages "$out/venv" &&
    timeout "${INSTALL_S:-240}" "$out/venv/bin/python" -m pip install --quiet --no-compile --constraint requirements.lock \
      '.[core]' trl datasets; } > "$out/install.log" 2>&1 ||
    give_up "$missing; the installation failed: $(tail -n 1 "$out/install.log")"
  python=$out/venv/bin/python
  "$python" -c "$needed" 2> "$out/missing.log" || give_up "$python fails: $(tail -n 1 "$out/missing.log")"
fi

vllm=${PYTHON_VLLM:-}
for folder in .venv-gpu .venv-vllm; do
  [ -z "$vllm" ] && [ -x "$root/$folder/bin/python" ] && vllm=$root/$folder/bin/python
done
exec "$python" -m benchmarks.gpu ${vllm:+--vllm-python "$vllm"} "$@"
