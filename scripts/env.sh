# Sourced by every script: go to the repository root and choose the Python of .venv where there is one.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
command -v "$PYTHON" >/dev/null || PYTHON=python3
# On a CPU, glibc gives every large tensor back to the kernel and gets it back zeroed, page by page: half of the time of
# a training step. These settings keep the memory.
command -v nvidia-smi >/dev/null ||
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
