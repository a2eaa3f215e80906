"What travels to a machine with a GPU, and what it says there"
import sys
from pathlib import Path

import numpy as np
import pytest

root = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (root/'tools'/'gpu_data.py').exists(), reason='the tools are in the repository only')

def tools(name):
    sys.path.insert(0, str(root/'tools'))
    try: return __import__(name)
    finally: sys.path.pop(0)

def test_images_come_back_as_they_were_packed(tmp_path):
    rng,data = np.random.default_rng(0),tools('gpu_data')
    ramp = (np.arange(4*6*5*3).reshape(4, 6, 5, 3)%256).astype(np.uint8)
    arrays = dict(train_images=rng.integers(0, 256, (9, 6, 5, 3), dtype=np.uint8), test_images=ramp, grey=rng.integers(0, 256, (3, 4, 7, 1), dtype=np.uint8),
                  extremes=np.tile(np.array([0, 255], np.uint8), (2, 3, 4, 3))[..., :3], train_labels=np.arange(9), class_names=np.array(['é', 'b']))
    np.savez(tmp_path/'a.npz', **arrays)
    data.pack(tmp_path/'a.npz', tmp_path/'pieces', per_piece=4)
    data.unpack(tmp_path/'pieces', tmp_path/'b.npz')
    back = dict(np.load(tmp_path/'b.npz'))
    assert back.keys() == arrays.keys() and all(back[k].dtype == v.dtype and np.array_equal(back[k], v) for k,v in arrays.items())
    assert len(list((tmp_path/'pieces').glob('train_images.*'))) == 3

def test_a_piece_that_is_too_large_is_refused(tmp_path, monkeypatch):
    data = tools('gpu_data')
    monkeypatch.setattr(data, 'limit', 1000)
    np.savez(tmp_path/'a.npz', images=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match='make smaller pieces'): data.pack(tmp_path/'a.npz', tmp_path/'pieces')

def test_a_check_is_written_as_tables_and_what_went_wrong_in_words():
    check = tools('gpu_check')
    environment = dict(device='cuda', processor='p', cores=1, python='3.12', torch='2.11', fastai='2.8', timm='1.0', date='2026-01-01T', commit='a'*40, stand_ins=['scipy'])
    found = {'environment': environment, 'tests': dict(left_out='no pytest', took=0.), 'half precision': dict(ok=False, wrong={'KD, fp16': dict(ok=False, error='boom')}, took=1.),
             'bench': dict(ok=True, took=2., figures=[dict(figure='KD', measured=1.5, **{'at most': None})], rows=None), 'race': dict(ok=False, errors=['no images'], took=1.),
             'row': dict(ok=True, took=3., ended='when its time was over', unfinished=1, arms={'baseline': dict(seeds=2, mean=30., sd=.5, errors=[29.5, 30.5])})}
    text = check.markdown(found)
    for part in ('scipy', 'left out: no pytest', '## half precision: what went wrong', 'boom', '| KD | 1.5 |  |', 'no images', '| baseline | 2 | 30 | 0.5 | 29.50, 30.50 |', 'when its time was over'): assert part in text, part
