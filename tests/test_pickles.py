"Pickles and PyTorch's files, read without calling anything"
import io, os, pickle, zipfile

import numpy as np, pytest, torch
from fastai.basics import L, Learner, TensorBase
from hypothesis import given, settings, strategies as st
from torch import nn

from fastkdtf.pickles import Made, as_array, read_pickle, read_saved

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
                     lambda o: st.lists(o) | st.tuples(o, o) | st.dictionaries(st.text() | st.integers(), o), max_leaves=20)

@settings(max_examples=150, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_data_comes_back(x, protocol): assert read_pickle(pickle.dumps(x, protocol)) == x

@settings(max_examples=300, deadline=None)
@given(plain, st.integers(0, 5), st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_an_error_in_words_or_other_plain_data(x, protocol, at, byte):
    data = bytearray(pickle.dumps(x, protocol))
    data[at%len(data)] = byte
    try: read_pickle(bytes(data))
    except ValueError as e: assert 'no pickle of plain data' in str(e)

@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_error_in_words_or_plain_data(data):
    try: read_pickle(data)
    except ValueError as e: assert 'no pickle of plain data' in str(e)

@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('array', [np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.).reshape(2, 3)), np.zeros((0, 3), np.uint8), np.arange(4, dtype='>i4'), np.array(3.5), np.array([True, False])])
def test_arrays_of_numbers_come_back(array, protocol):
    found = as_array(read_pickle(pickle.dumps(array, protocol)))
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()

def test_a_number_of_numpy_becomes_one_of_python(): assert read_pickle(pickle.dumps({'lr': np.float64(.5), 'n': np.int32(3)})) == {'lr': .5, 'n': 3}

@pytest.mark.parametrize('array', [np.array(['a']), np.array([object()]), np.array([(1, 2.)], 'i4,f8'), np.array(['2020'], 'M8[Y]')])
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError): as_array(read_pickle(pickle.dumps(array, 2)))

class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('protocol', range(6))
def test_a_call_is_written_down_and_not_made(protocol, tmp_path):
    made = read_pickle(pickle.dumps([Touch(tmp_path/'owned')], protocol))[0]
    assert isinstance(made, Made) and made.name.endswith('.mkdir') and made.args == (str(tmp_path/'owned'),) and not (tmp_path/'owned').exists()

tensors = [torch.randn(3, 4), torch.randn(3, 4).t(), torch.randn(10)[2:5], torch.zeros(0, 3), torch.tensor(3.), torch.randn(4).half(), torch.randn(4).bfloat16(), torch.arange(3),
           torch.tensor([True, False]), torch.zeros(2, dtype=torch.complex64), nn.Parameter(torch.randn(2)), TensorBase(torch.randn(2, 2)), torch.zeros(1).expand(5), torch.zeros(3, dtype=torch.uint16),
           torch.ones(3).to(torch.float8_e4m3fn), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)]

@pytest.mark.parametrize('tensor', tensors, ids=lambda t: f'{t.dtype}{list(t.shape)}')
def test_tensors_come_back(tensor, tmp_path):
    torch.save({'t': tensor, 'again': tensor}, tmp_path/'t.pt')
    found = read_saved(tmp_path/'t.pt')
    t = found['t']
    assert type(t) is torch.Tensor and t.dtype == tensor.dtype and t.shape == tensor.shape and t.stride() == tensor.stride()
    assert torch.equal(t.view(torch.uint8) if t.dim() and t.is_contiguous() else t, tensor.detach().as_subclass(torch.Tensor).view(torch.uint8) if t.dim() and t.is_contiguous() else tensor.detach().as_subclass(torch.Tensor))
    assert found['again'].data_ptr() == t.data_ptr()

def test_it_reads_what_torch_reads(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))
    torch.save(model.state_dict(), tmp_path/'w.pth')
    ours,theirs = read_saved(tmp_path/'w.pth'),torch.load(tmp_path/'w.pth', weights_only=True)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model.load_state_dict(ours)

def test_a_flipped_bit_anywhere_is_noticed_or_changes_no_number(tmp_path):
    torch.save({'w': torch.arange(50.)}, tmp_path/'w.pth')
    whole,rng,noticed = (tmp_path/'w.pth').read_bytes(),np.random.default_rng(0),0
    for at in rng.permutation(len(whole))[:300]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        (tmp_path/'w.pth').write_bytes(data)
        try: found = read_saved(tmp_path/'w.pth')
        except ValueError: noticed += 1
        else: assert torch.equal(found['w'], torch.arange(50.))
    assert noticed > 50

def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pth: no such file'): read_saved(tmp_path/'none.pth')
    (tmp_path/'t.pth').write_text('no archive')
    with pytest.raises(ValueError, match='t.pth is cut short, or no file of torch.save'): read_saved(tmp_path/'t.pth')
