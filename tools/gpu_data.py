"""Carry an image set to a machine in pieces of at most 30 MiB

    python tools/gpu_data.py pack cifar100.npz FOLDER
    python tools/gpu_data.py unpack FOLDER cifar100.npz

A pixel is written as what it differs by from a prediction of its neighbours, which LZMA packs better than pixels; unpacking gives the same bytes."""
import io, lzma, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

limit = 30*2**20

def _predicted(left, up, corner):
    "The median of `left`, `up` and `left+up-corner`, for uint8"
    left,up,corner = (o.astype(np.int16) for o in (left, up, corner))
    return np.clip(left+up-corner, np.minimum(left, up), np.maximum(left, up)).astype(np.uint8)

def _residuals(x): # `[N,H,W,C]`
    p = np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    r = x - _predicted(p[:, 1:, :-1], p[:, :-1, 1:], p[:, :-1, :-1])
    if x.shape[3] == 3: r = np.stack([r[..., 1], r[..., 0]-r[..., 1], r[..., 2]-r[..., 1]])   # colours differ alike
    else: r = r.transpose(3, 0, 1, 2)
    return r

def _images(r): # `[C,N,H,W]`
    r = np.stack([r[1]+r[0], r[0], r[2]+r[0]], 3) if len(r) == 3 else r.transpose(1, 2, 3, 0)
    p = np.zeros((r.shape[0], r.shape[1]+1, r.shape[2]+1, r.shape[3]), np.uint8)
    for i in range(r.shape[1]):
        for j in range(r.shape[2]): p[:, i+1, j+1] = r[:, i, j] + _predicted(p[:, i+1, j], p[:, i, j+1], p[:, i, j])
    return p[:, 1:, 1:]

def _packed(array):
    filters = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0)]
    with io.BytesIO() as f:
        np.save(f, array)
        return lzma.compress(f.getvalue(), format=lzma.FORMAT_XZ, filters=filters)

def pack(file, folder, per_piece=10_000):
    "Write the arrays of an .npz into pieces"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name,array in np.load(file).items():
        images = array.dtype == np.uint8 and array.ndim == 4
        parts = [array[i:i+per_piece] for i in range(0, len(array), per_piece)] if images else [array]
        jobs += [(f'{name}.{i}.{"images" if images else "array"}.xz', part) for i,part in enumerate(parts)]
    def write(job):
        name,part = job
        packed = _packed(_residuals(part) if '.images.' in name else part)
        if len(packed) > limit: raise ValueError(f'{name} takes {len(packed)/2**20:.1f} MiB: make smaller pieces')
        (folder/name).write_bytes(packed)
        return len(packed)
    with ThreadPoolExecutor(2) as pool: sizes = list(pool.map(write, jobs))
    print(f'{len(sizes)} pieces, {sum(sizes)/2**20:.0f} MiB, the largest {max(sizes)/2**20:.0f} MiB')

def _unpacked(piece):
    part = np.load(io.BytesIO(lzma.decompress(piece.read_bytes())), allow_pickle=False)
    return _images(part) if piece.suffixes[-2] == '.images' else part

def unpack(folder, file):
    "Write the .npz that the pieces were made of"
    pieces = sorted(Path(folder).glob('*.xz'), key=lambda p: (p.name.split('.')[0], int(p.name.split('.')[1])))
    arrays = {}
    with ThreadPoolExecutor() as pool:
        for piece,part in zip(pieces, pool.map(_unpacked, pieces)): arrays.setdefault(piece.name.split('.')[0], []).append(part)
    np.savez(file, **{name: np.concatenate(parts) for name,parts in arrays.items()})

if __name__ == '__main__':
    if len(sys.argv) != 4 or sys.argv[1] not in ('pack', 'unpack'): sys.exit(__doc__)
    dict(pack=pack, unpack=unpack)[sys.argv[1]](*sys.argv[2:])
