#!/usr/bin/env bash
# Shows that the library built against one torch loads in another: python_tests/load_in_torch.sh VERSION
# Installs that torch (gigabytes) into build/torch-VERSION, loads the compiled pop_ext there, and compares every operation with the reference.
set -euo pipefail
version=${1:?usage: load_in_torch.sh VERSION, such as 2.14.0}
cd "$(dirname "$0")/.."
environment=build/torch-$version
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "torch==$version" numpy
"$environment/bin/python" python_tests/load_in_torch.py
