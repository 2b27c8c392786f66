#!/usr/bin/env bash
# Makes the engines' environment (vLLM for the CPU) in the virtual environment $1. May be run again at any time.
#
#   PYTHON           interpreter to make it with, 3.11 or newer (python3)
#   TORCH_CPU_INDEX  package index for torch's CPU build, used if pip's own configuration does not find it
#                    (default: PyTorch's)
#
# Everything is installed with --no-deps from a complete list of pinned versions: the resolver would install CUDA builds
# of torch and its relatives (deploy/requirements/engine-cpu.txt says what is omitted and why).
set -euo pipefail

venv=${1:?usage: deploy/engine_env.sh VENV}
python=${PYTHON:-python3}
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
requirements=$(dirname "$0")/requirements/engine-cpu.txt
plugin=$(dirname "$0")/engine_plugin
torch=torch==2.13.0+cpu

say() { printf '[engine-env] %s\n' "$*"; }
begun=$SECONDS

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "Python 3.11 or newer is needed: set PYTHON"; exit 1; }
if [ ! -x "$venv/bin/python" ]; then
    say "virtual environment in $venv"
    "$python" -m venv "$venv" ||
        { say "Python's venv module is missing: apt-get install python3-venv"; rm -rf "$venv"; exit 1; }
fi
install() { "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps "$@"; }

say "1 of 3: torch 2.13.0 for the CPU (about 200 MB)"
has_torch='import importlib.metadata as m, sys; sys.exit(m.version("torch") != "2.13.0+cpu")'
if ! "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
    # First from the indexes that pip is configured with, for machines that cannot reach PyTorch's. Its error is ignored.
    install "$torch" 2>/dev/null || install --index-url "$index" "$torch"
fi

say "2 of 3: vLLM 0.32.0 and what it needs, $(grep -c '==' "$requirements") packages (about 700 MB)"
install -r "$requirements"
# They are there if pip resolved this environment by itself.
"$venv/bin/python" -m pip uninstall --quiet --quiet --yes \
    torchvision torchaudio torchcodec triton fastapi-cli fastapi-cloud-cli sentry-sdk

# Gemma 3's images without torchvision. Built from a copy, because setuptools writes beside its sources.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$plugin/pyproject.toml" "$plugin"/*.py "$work"
install --no-build-isolation "$work"

say "3 of 3: trying it"
"$venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

cuda = sorted(d.name for d in importlib.metadata.distributions() if d.name.lower().startswith(("nvidia-", "cuda-")))
if cuda:
    sys.exit(f"[engine-env] CUDA packages were installed: {', '.join(cuda)}")
import torch
import transformers
import vllm

assert torch.version.cuda is None, "torch is a CUDA build"
names = [found.name for found in importlib.metadata.entry_points(group="vllm.general_plugins")]
assert "adytum_pillow_images" in names, "vLLM would not find the plugin for images"
print(f"[engine-env] vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
PYTHON
say "done in $((SECONDS - begun)) s"
