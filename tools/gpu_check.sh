#!/bin/sh
# Check fastkdtf on a GPU, in at most 8 minutes, from a checkout on a machine with PyTorch and torchvision from which nothing else can be reached:
#     tools/gpu_check.sh OUT [--wheels wheels] [--data cifar100.npz or the folder of its pieces] [--seconds 480] [--row FOLDER] [--tiny]
# OUT gets check.json and check.md. --wheels is the folder of gpu_wheels.sh, --data the images of the 200-epoch row: an .npz, or pieces made by
# gpu_data.py. The row stops when the time is over; with the same --row FOLDER a second call goes on from there.
# NVIDIA's MPS, where it is there (`nvidia-cuda-mps-control -d` before, `echo quit | nvidia-cuda-mps-control` after), lets the row's processes compute at once.
# --tiny is a rehearsal: tiny sizes, noise for images, on a processor too.
# Where scipy or scikit-learn are missing, empty modules take their places: fastai imports them for metrics that are not used here. Anything that
# needs one of their functions says so and fails; the intervals of reports do, and are left out of check.md.
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
tmp=$(mktemp -d)
site=$tmp/site-packages   # a folder of that name holds libraries, for whoever looks at the path
mkdir "$site"
trap 'rm -rf "$tmp"' EXIT
wheels="" previous=""
for argument; do [ "$previous" = --wheels ] && wheels=$argument; previous=$argument; done
python3 - "$site" "$wheels" <<'PY'
import sys, zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
site,wheels = Path(sys.argv[1]),sys.argv[2]
compiled = {'pandas', 'matplotlib', 'fonttools', 'kiwisolver', 'contourpy', 'pyyaml', 'charset_normalizer', 'safetensors'}   # the machine's own are fine
def installed(name):
    try: return version(name)
    except PackageNotFoundError: return None
for wheel in sorted(Path(wheels).glob('*.whl')) if wheels else []:
    name = wheel.name.split('-')[0].lower()
    if name not in compiled or not installed(name): zipfile.ZipFile(wheel).extractall(site)
stand_in = """import sys
def __getattr__(name):
    if name.startswith('__'): raise AttributeError(name)
    raise AttributeError(f'{__name__} is a stand-in here: {name} needs the real one')
"""
for package,modules in dict(scipy=('ndimage', 'stats', 'optimize'), sklearn=('metrics', 'model_selection')).items():
    if find_spec(package): continue
    (site/package).mkdir()
    (site/package/'__init__.py').write_text(stand_in)
    for module in modules:
        also = 'def train_test_split(*args, **kwargs): raise NotImplementedError("sklearn is a stand-in here")\n' if module == 'model_selection' else ''
        (site/package/f'{module}.py').write_text(stand_in + also)
PY
export PYTHONPATH="$here:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 "$here/tools/gpu_check.py" "$@"
