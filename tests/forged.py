"""Files that somebody made to do harm, or that were harmed: made by code, each with the reader that meets it

As a program it writes them all into a folder, reads them one after the other in this process and prints what each reader said."""
import gzip, io, json, os, pickle, resource, sqlite3, struct, sys, tarfile, warnings, zipfile, zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

forged = {}   # name → (reader, maker)

def forge(reader, name=None):
    "Add a maker of a forged file: it gets a path and writes it"
    def add(f):
        forged[name or f.__name__] = reader,f
        return f
    return add

# ---------------------------------------------------------------- pickles in CIFAR's batches

class Call:
    "Pickles as a call"
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f,self.args

def owned(): Path('owned').write_text('x')
def command(): return Call(os.system, 'touch owned')

def cifar(path, batch, meta=None):
    "CIFAR-100 with this training batch"
    path.mkdir()
    y = list(range(100))
    good = pickle.dumps(dict(data=np.zeros((100,3072), np.uint8), fine_labels=y), protocol=2)
    names = pickle.dumps(dict(fine_label_names=[f'n{i}' for i in y]), protocol=2)
    for name,data in (('train', batch), ('test', good), ('meta', meta or names)): (path/name).write_bytes(data)

def ops(*parts): return b'\x80\x02' + b''.join(parts) + b'.'
def text(s): return b'X' + struct.pack('<I', len(s)) + s.encode()

def address(path):
    "An array of objects whose bytes are an address"
    return ops(b'}', text('data'), b'cnumpy.core.multiarray\nscalar\n', b'cnumpy\ndtype\n', text('O8'), b'K\x00K\x01\x87R', text('A'*8), b'\x86R', b's')

pickles = {
    'a command':            lambda: pickle.dumps(dict(data=command(), fine_labels=[0])),
    'a command in a list':  lambda: pickle.dumps(dict(data=np.zeros((1,3072), np.uint8), fine_labels=[command()])),
    'a command, protocol 0': lambda: b"(dp0\nS'data'\ncposix\nsystem\n(S'touch owned'\ntRs.",
    'a command by INST':    lambda: b"(S'touch owned'\niposix\nsystem\n.",
    'a command by OBJ':     lambda: ops(b'(cposix\nsystem\n', text('touch owned'), b'o'),
    'eval':                 lambda: pickle.dumps(dict(data=Call(eval, "open('owned','w')"))),
    'an address':           lambda: address(None),
    'an array of objects':  lambda: pickle.dumps(dict(data=np.array([object]*3072).reshape(1,-1), fine_labels=[0]), protocol=2),
    'an array too short':   lambda: pickle.dumps(dict(data=np.zeros((4,3072), np.uint8), fine_labels=[0]*4), protocol=2).replace(b'M\x00\x0c', b'M\x00\xff', 1),
    'a memo of 64 GB':      lambda: ops(b'}', b'r' + struct.pack('<I', 2**32-1)),
    'a key of 300,000 tuples': lambda: ops(b'}', b')', b'\x85'*300_000, b'K\x00s'),
    'lists in lists':       lambda: ops(b']'*200_000, b'a'*199_999),
    'a text of 2**60 letters': lambda: b'\x80\x04\x8d' + struct.pack('<Q', 2**60) + b'x.',
    'an extension':         lambda: ops(b'\x82\x01'),
    'a persistent id':      lambda: ops(b'Px\n'),
    'changing a function':  lambda: ops(b'cposix\nsystem\n', b'}', text('__code__'), b'K\x00s', b'b'),
    'a number of a million digits': lambda: ops(b'}', text('data'), b'I' + b'9'*10**6 + b'\n', b's'),
    'an empty stack':       lambda: ops(b'0000'),
    'a memory of itself':   lambda: ops(b']', b'q\x00', b'h\x00', b'a'),
    'nothing':              lambda: b'',
    'noise':                lambda: np.random.default_rng(0).bytes(5000)}
for name,make in pickles.items(): forge('images', f'pickle, {name}')(lambda path, make=make: cifar(path, make()))

@forge('images', 'pickle, a class of a million letters')
def _(path):
    names = pickle.dumps(dict(fine_label_names=['x'*10**6, *map(str, range(99))]))
    cifar(path, pickle.dumps(dict(data=np.zeros((100,3072), np.uint8), fine_labels=list(range(100)))), names)

# ---------------------------------------------------------------- PyTorch's archives

def archive(path, change=lambda data: data, weights=None, extra=()):
    "A file of `torch.save` whose pickle was changed"
    torch.save({'weight': torch.arange(6.).reshape(2, 3), 'bias': torch.zeros(2)} if weights is None else weights, path)
    with zipfile.ZipFile(path) as z: held = {info.filename: z.read(info) for info in z.infolist()}
    with zipfile.ZipFile(path, 'w') as z:
        for name,data in held.items(): z.writestr(name, change(data) if name.endswith('data.pkl') else data)
        for name,data in extra: z.writestr(name, data)

@forge('weights', 'torch, a command')
def _(path): torch.save({'w': torch.zeros(2), 'x': command()}, path)

@forge('weights', 'torch, a command instead')
def _(path): archive(path, lambda data: pickle.dumps(command()))

@forge('weights', 'torch, a storage longer than its file')
def _(path): archive(path, lambda data: data.replace(b'K\x06t', b'J\xff\xff\xff\x3ft'))

@forge('weights', 'torch, a view beyond its storage')
def _(path): archive(path, lambda data: data.replace(b'K\x02K\x03\x86', b'K\x02K\xff\x86', 1))

@forge('weights', 'torch, a view that starts before its storage')
def _(path): archive(path, lambda data: data.replace(b'QK\x00', b'QJ\x00\xff\xff\xff', 1))

@forge('weights', 'torch, strides into nowhere')
def _(path): archive(path, lambda data: data.replace(b'K\x03K\x01\x86', b'J\x00\x00\x00\x40K\x01\x86', 1))

@forge('weights', 'torch, a view of 10^18 numbers')
def _(path): archive(path, lambda data: data.replace(b'K\x02K\x03\x86', b'J\x00\xca\x9a\x3bJ\x00\xca\x9a\x3b\x86', 1).replace(b'K\x03K\x01\x86', b'K\x00K\x00\x86', 1))

@forge('weights', 'torch, an address in the optimizer')
def _(path): archive(path, lambda data: address(None))

@forge('weights', 'torch, a flipped bit')
def _(path):
    torch.save({'w': torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(4).numpy().tobytes())+9] ^= 4
    path.write_bytes(data)

@forge('weights', 'torch, cut')
def _(path):
    torch.save({'w': torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])

@forge('weights', 'torch, TorchScript')
def _(path): archive(path, extra=[('archive/code/evil.py', 'import os'), (f'{path.stem}/code/evil.py', 'import os')])

@forge('weights', 'torch, two pickles')
def _(path): archive(path, extra=[('other/data.pkl', b'N.')])

@forge('weights', 'torch, before 1.6')
def _(path): torch.save({'w': torch.zeros(2), 'x': command()}, path, _use_new_zipfile_serialization=False)

@forge('weights', 'torch, a bare pickle')
def _(path): path.write_bytes(pickle.dumps(command()))

@forge('weights', 'torch, a storage of 4 GB in its table')
def _(path):
    archive(path)
    said_size(path, f'{path.stem}/data/0')

@forge('learner', 'learner, a command')
def _(path): torch.save(command(), path)

@forge('learner', 'learner, a pickle')
def _(path): path.write_bytes(pickle.dumps(command()))

def said_size(path, name, size=2**32-2):
    "A zip archive whose table says another size of a file"
    data = bytearray(path.read_bytes())
    struct.pack_into('<I', data, data.rindex(name.encode())-46+24, size)
    path.write_bytes(data)

# ---------------------------------------------------------------- arrays

def arrays(**changes):
    rng = np.random.default_rng(0)
    return {**dict(train_images=rng.integers(0, 256, (8,4,4,3), dtype=np.uint8), train_labels=np.arange(8)%2,
                   test_images=rng.integers(0, 256, (4,4,4,3), dtype=np.uint8), test_labels=np.arange(4)%2, class_names=np.array(['a','b'])), **changes}

def npz(path, header=None, **changes):
    np.savez(path, **arrays(**changes))
    if header is None: return
    with zipfile.ZipFile(path) as z: held = {name: z.read(name) for name in z.namelist()}
    head = header.encode().ljust(117)+b'\n'
    held['train_images.npy'] = b'\x93NUMPY\x01\x00' + struct.pack('<H', len(head)) + head + b'\0'*384
    with zipfile.ZipFile(path, 'w') as z:
        for name,data in held.items(): z.writestr(name, data)

headers = {'of 10^18 numbers': "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000000000), }",
           'that is code': "__import__('os').system('touch owned')", 'of brackets': '('*100, 'of negative size': "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4), }",
           'of objects': "{'descr': '|O', 'fortran_order': False, 'shape': (48,), }", 'of nothing': "{'descr': 'V0', 'fortran_order': False, 'shape': (9999999999,), }",
           'of structures': "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (384,), }"}
for name,header in headers.items(): forge('npz', f'npz, a header {name}')(lambda path, header=header: npz(path, header))

@forge('npz', 'npz, a pickle')
def _(path): npz(path, class_names=np.array([command(), 'b'], object))

@forge('npz', 'npz, another size in its table')
def _(path):
    npz(path)
    said_size(path, 'train_images.npy', 2**31)

# ---------------------------------------------------------------- archives of images

def png(w=4, h=4, seed=0):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)).save(f, 'PNG')
    return f.getvalue()

def names(): return [(f'train/{c}/{i}.png', png(seed=i+10*(c=='b'))) for c in 'ab' for i in range(2)]

def of_zip(path, more=(), flags=0, method=None):
    with zipfile.ZipFile(path, 'w') as z:
        for name,data in (*names(), *more): z.writestr(name, data)
    if not flags and method is None: return
    data = bytearray(path.read_bytes())
    for mark,at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        start = -1
        while (start := data.find(mark, start+1)) >= 0:
            if flags: struct.pack_into('<H', data, start+at, flags)
            if method is not None: struct.pack_into('<H', data, start+at+2, method)
    path.write_bytes(data)

forge('images.zip', 'zip, encrypted')(lambda path: of_zip(path, flags=1))
forge('images.zip', 'zip, Deflate64')(lambda path: of_zip(path, method=9))
forge('images.zip', 'zip, a method that nobody knows')(lambda path: of_zip(path, method=77))
forge('images.zip', 'zip, a name that leads away')(lambda path: of_zip(path, [('../../../owned', b'x'), ('/owned.png', png())]))

@forge('images.zip', 'zip, a link')
def _(path):
    link = zipfile.ZipInfo('train/a/x.png')
    link.external_attr = 0o120777 << 16
    of_zip(path, [(link, '/etc/passwd')])

@forge('images.zip', 'zip, an image of 4 GB in its table')
def _(path):
    of_zip(path)
    said_size(path, 'train/b/1.png')

@forge('images.zip', 'zip, cut')
def _(path):
    of_zip(path)
    path.write_bytes(path.read_bytes()[:-30])

@forge('images.zip', 'zip, a damaged image')
def _(path):
    of_zip(path)
    data = bytearray(path.read_bytes())
    data[data.index(b'IDAT')+8] ^= 1
    path.write_bytes(data)

def of_tar(path, more, mode='w'):
    with tarfile.open(path, mode) as t:
        for name,data in names():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        for info in more: t.addfile(info)

def entry(name, kind, linkname=''):
    info = tarfile.TarInfo(name)
    info.type,info.linkname = kind,linkname
    return info

for name,info in {'a device': entry('train/a/x.png', tarfile.CHRTYPE), 'a pipe': entry('train/a/x.png', tarfile.FIFOTYPE),
                  'a link out': entry('train/a/x.png', tarfile.SYMTYPE, linkname='/etc/passwd'), 'a link to itself': entry('train/a/x.png', tarfile.SYMTYPE, linkname='x.png'),
                  'a hard link to nothing': entry('train/a/x.png', tarfile.LNKTYPE, linkname='nowhere')}.items():
    forge('images.tar', f'tar, {name}')(lambda path, info=info: of_tar(path, [info]))

@forge('images.tar', 'tar, an image of 1 TB')
def _(path):
    of_tar(path, [])
    info = entry('train/a/x.png', tarfile.REGTYPE)
    info.size = 2**40
    data = path.read_bytes().rstrip(b'\0')
    path.write_bytes(data + b'\0'*(-len(data)%512) + info.tobuf(tarfile.GNU_FORMAT))

@forge('images.tar', 'tar, a header of 1 TB')
def _(path):
    info = entry('pax', tarfile.XHDTYPE)
    info.size = 2**40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b'\0'*1024)

@forge('images.tar', 'tar, cut at a header')
def _(path):
    of_tar(path, [])
    with tarfile.open(path) as t: at = t.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:at])

# ---------------------------------------------------------------- images

def folder(path, data):
    for name,good in names():
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        (path/name).write_bytes(good)
    (path/'train'/'b'/'x.png').write_bytes(data)

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
def head(w, h): return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0))

images = {'of 169 million pixels': lambda: head(13_000, 13_000) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''),
          'of 10^18 pixels': lambda: head(10**9, 10**9) + chunk(b'IDAT', b'') + chunk(b'IEND', b''),
          'with a text of 100 MB': lambda: head(4, 4) + chunk(b'zTXt', b'k\0\0'+zlib.compress(bytes(10**8), 1)) + chunk(b'IDAT', zlib.compress(b'\0'*20)) + chunk(b'IEND', b''),
          'that is a drawing': lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(owned) (w) file closefile\nshowpage\n%%EOF\n',
          'that is SVG': lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><script>1</script></svg>',
          'cut': lambda: png(40, 40)[:900], 'empty': lambda: b'', 'of noise': lambda: np.random.default_rng(0).bytes(999),
          'without lines': lambda: head(4, 4) + chunk(b'IEND', b''),
          'that is TIFF in a circle': lambda: b'II*\0\x08\0\0\0' + b'\x01\0\x00\x01\x04\0\x01\0\0\0\x04\0\0\0\x08\0\0\0'}
for name,data in images.items(): forge('sized images', f'image {name}')(lambda path, data=data: folder(path, data()))

# ---------------------------------------------------------------- idx files, lists, a csv

def idx(path, **changes):
    path.mkdir()
    good = {'train-images-idx3-ubyte': bytes([0,0,8,3])+struct.pack('>3I', 4,2,2)+bytes(16), 'train-labels-idx1-ubyte': bytes([0,0,8,1])+struct.pack('>I', 4)+bytes([0,1,0,1]),
            't10k-images-idx3-ubyte': bytes([0,0,8,3])+struct.pack('>3I', 4,2,2)+bytes(16), 't10k-labels-idx1-ubyte': bytes([0,0,8,1])+struct.pack('>I', 4)+bytes([0,1,0,1])}
    for name,data in {**good, **changes}.items(): (path/name).write_bytes(data)

zeros = lambda n: gzip.compress(bytes([0,0,8,3])+struct.pack('>3I', 4,2,2)+bytes(n), 1)
forge('images', 'idx, unpacks to 300 MB')(lambda path: idx(path, **{'train-images-idx3-ubyte': zeros(3*10**8)}))
forge('images', 'idx, of 10^28 pixels')(lambda path: idx(path, **{'train-images-idx3-ubyte': bytes([0,0,8,3])+b'\xff'*12+bytes(9)}))
forge('images', 'idx, of 255 axes')(lambda path: idx(path, **{'train-images-idx3-ubyte': bytes([0,0,8,255])+b'\0\0\0\1'*99}))
forge('images', 'idx, cut in its head')(lambda path: idx(path, **{'train-images-idx3-ubyte': bytes([0,0,8,3,0])}))

@forge('images', 'csv, a field without end')
def _(path):
    path.mkdir()
    (path/'fer2013.csv').write_text('emotion,pixels,Usage\n0,"'+'1 '*10**6)

@forge('images', 'list, names that lead away')
def _(path):
    (path/'val').mkdir(parents=True)
    (path/'wnids.txt').write_text('n1\nn2\n')
    (path/'val'/'val_annotations.txt').write_text('../../../../etc/passwd\tn1\n')

# ---------------------------------------------------------------- ledgers

lines = {'brackets': '['*200_000, 'a list': '[]', 'a number': '7', 'no key': '{}', 'half a run': '{"key": "a", "method": "x", "rank": 0}', 'not JSON': '{"key": "a", x}',
         'a key of a list': '{"key": []}', 'an endless number': '{"key": "a", "seed": 1e999}', 'a large number': json.dumps(dict(key='a', seed=10**4000)),
         'other bytes': '{"key": "\udcff"}', 'a text for scores': json.dumps(dict(key='a', method='m', rank=0, control_for=[], seed=0, setting='s', evaluated_on='test', last='<b>', best={}, history={}, seconds_per_epoch=1)),
         'a column of texts': json.dumps(dict(key='a', method='m', rank=0, control_for=[], seed=0, setting='s', evaluated_on='test', last=dict(accuracy=.5, nll=1, ece=0),
                                              best=dict(accuracy=.5), history=dict(accuracy=['a']), seconds_per_epoch=1))}
for name,line in lines.items():
    forge('ledger', f'ledger, {name}')(lambda path, line=line: path.write_bytes(line.encode(errors='surrogateescape')+b'\n'))

# ---------------------------------------------------------------- caches and databases

manifests = {'brackets': '['*200_000, 'a list': '[]', 'other counts': json.dumps(dict(about={}, n_classes='x', rows=1, crc32=0)),
             'classes without end': dict(n_classes=10**15, rows=5), 'rows without end': dict(n_classes=10, rows=10**15), 'no class': dict(n_classes=0, rows=5),
             'rows that are not there': dict(n_classes=10, rows=3)}
for name,manifest in manifests.items():
    def _(path, manifest=manifest):
        path.mkdir()
        about = dict(format=1, teacher='t', data='d', top_k=None, dtype='float16')
        (path/'manifest.json').write_text(manifest if isinstance(manifest, str) else json.dumps(dict(about=about, crc32=0, **manifest)))
        (path/'rows.bin').write_bytes(bytes(50))
    forge('cache', f'cache, {name}')(_)

def database(path, make):
    path.mkdir()
    make(path/'sweep.db')

def other_tables(file):
    with sqlite3.connect(file) as db: db.execute('create table studies (x)')

def a_view_for_a_table(file):
    with sqlite3.connect(file) as db: db.execute("create view studies as select 1 as study_id, 'x' as study_name")

def cut_database(file):
    other_tables(file)
    file.write_bytes(file.read_bytes()[:700])

databases = {'text': lambda file: file.write_text('no database'), 'other tables': other_tables, 'cut': cut_database, 'a view': a_view_for_a_table, 'a folder': lambda file: file.mkdir()}
for name,make in databases.items(): forge('database', f'database, {name}')(lambda path, make=make: database(path, make))

@forge('teachers', 'teachers, of another shape')
def _(path):
    path.mkdir()
    (path/'teachers.json').write_text('{"setting": 1, "teachers": [{}]}')

@forge('teachers', 'teachers, a pickle for weights')
def _(path):
    path.mkdir()
    told = dict(epoch=1, valid_accuracy=.5, accuracy=.5, asked=.5, vocab=None, stats=None)
    (path/'teachers.json').write_text(json.dumps(dict(setting={}, missing=[], key='k', teachers=[told])))
    torch.save(command(), path/'epoch1.pt')

# ---------------------------------------------------------------- what reads them

def read(kind, path):
    from fastkdtf.lab.defective import PoorTeachers
    from fastkdtf.lab.report import read_runs
    from fastkdtf.teachers.cache import LogitStore
    from fastkdtf.teachers.network import NetworkTeacher
    from fastkdtf.vision.readers import read_files, read_npz
    if kind in ('images', 'images.zip', 'images.tar'): return read_files(path)
    if kind == 'sized images': return read_files(path, size=4)
    if kind == 'npz':      return read_npz(path)
    if kind == 'weights':  return NetworkTeacher(path, arch=torch.nn.Linear(3, 2))
    if kind == 'learner':  return NetworkTeacher(path)
    if kind == 'ledger':   return read_runs(path)
    if kind == 'cache':    return LogitStore(path, 't', 'd')
    if kind == 'teachers': return PoorTeachers.load(path, lambda: torch.nn.Linear(3, 2))
    if kind == 'database': return open_database(path)

def open_database(path):
    import optuna
    from fastkdtf.lab.study import GivenTrials, Trials, quiet_optuna
    with quiet_optuna(path/'sweep.db'): return Trials(path, 'a b', GivenTrials([{}]), optuna.pruners.NopPruner())

suffixes = {'npz': '.npz', 'weights': '.pth', 'learner': '.pkl', 'ledger': '.jsonl', 'images.zip': '.zip', 'images.tar': '.tar'}

def main(root):
    "Make and read every file; print a line of JSON for each"
    warnings.simplefilter('ignore')
    os.chdir(root)
    resource.setrlimit(resource.RLIMIT_AS, (12*10**9, 12*10**9))
    for i,(name,(kind,make)) in enumerate(forged.items()):
        path = Path(f'{i:03}{suffixes.get(kind, "")}')
        make(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try: read(kind, path)
        except Exception as e: error,said = type(e).__name__,str(e)
        else: error,said = None,''
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1000
        print(json.dumps(dict(name=name, path=str(path), error=error, said=said, megabytes=grown, owned=Path('owned').exists())), flush=True)

if __name__ == '__main__': main(sys.argv[1])
