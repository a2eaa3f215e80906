#!/bin/sh
# Make a folder of wheels with which fastkdtf runs where only torch, torchvision, numpy and what these need are installed.
#     tools/gpu_wheels.sh [FOLDER] [PYTHON]        such as: tools/gpu_wheels.sh wheels 3.12
# FOLDER: wheels, unless said otherwise. PYTHON: the version of the machine that it is for; without it that of the running Python.
# Versions are those that are installed here, so that what was tested is what runs there.
# Left out are scipy and scikit-learn, which take 45 MiB: where they are missing, gpu_check.sh puts stand-ins in their place.
set -e
out=${1:-wheels} python=${2:-} limit=40
packages="fastai fastcore fasttransform fastdownload plum-dispatch beartype rich markdown-it-py mdurl pygments cloudpickle timm safetensors
pyyaml requests urllib3 idna certifi charset-normalizer matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six pandas packaging
filelock torchdistill fasterai"
mkdir -p "$out"
rm -f "$out"/*.whl
pinned=$(python3 - $packages <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try: print(f'{name}=={version(name)}')
    except PackageNotFoundError: print(name)
print('fastprogress==1.0.3')   # the last that needs no web server
PY
)
there=""
if [ -n "$python" ]; then
    there="--python-version $python --implementation cp --platform any"
    for glibc in 17 24 27 28 31 34; do there="$there --platform manylinux_2_${glibc}_x86_64"; done
    there="$there --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
fi
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: $there -d "$out" $pinned
size=$(du -sk "$out" | cut -f1)
echo "$(ls "$out"/*.whl | wc -l) wheels, $((size/1024)) MiB, in $out"
[ "$size" -le $((limit*1024)) ] || { echo "more than $limit MiB" >&2; exit 1; }
