# Sourced by every script: go to the repository root and choose the Python of .venv where there is one.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
command -v "$PYTHON" >/dev/null || PYTHON=python3
