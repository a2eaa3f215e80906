"Plain tensors and shifted logits of `fastkdtf.core`"
from typing import NamedTuple

import pytest, torch
from fastai.torch_core import TensorCategory, TensorImage
from torch import Tensor

from fastkdtf.core import plain_tensors, shifted, soften

class Pair(NamedTuple):
    a:object
    b:object

def test_plain_tensors_keeps_the_structure_and_all_that_is_no_tensor():
    image,label = TensorImage(torch.rand(2, 3)),TensorCategory(torch.tensor([0, 1]))
    plain = plain_tensors((image, [label, 'name', None, 3], {'x': Pair(image, (label,))}))
    assert type(plain) is tuple and type(plain[1]) is list and type(plain[2]['x']) is Pair
    assert plain[1][1:] == ['name', None, 3]
    tensors = [plain[0], plain[1][0], plain[2]['x'].a, plain[2]['x'].b[0]]
    assert len(tensors) == 4 and all(type(t) is Tensor for t in tensors)
    assert torch.equal(tensors[0], image.as_subclass(Tensor)) and tensors[0].data_ptr() == image.data_ptr()

def test_plain_tensors_returns_a_plain_tensor_as_it_is():
    x = torch.rand(3)
    assert plain_tensors(x) is x and plain_tensors([x])[0] is x
    assert plain_tensors(()) == () and plain_tensors(None) is None

def test_a_gradient_passes_through_plain_tensors():
    x = torch.rand(3, requires_grad=True)
    (plain_tensors([TensorImage(x)])[0]*2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]

@pytest.mark.parametrize('axis', [1, 2, -1])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shifted_logits_end_at_0_and_have_the_same_softmax(dtype, axis):
    z = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = shifted(z, 2., axis)
    assert out.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (out.amax(axis) == 0).all()
    torch.testing.assert_close(out.softmax(axis), (z.to(out.dtype)/2).softmax(axis))

def test_a_common_offset_is_gone_after_the_shift():
    z = torch.tensor([[3., 1, 0]])
    assert torch.equal(shifted(z + 8192, 4.), shifted(z, 4.)) and torch.equal(soften(z + 8192, 4., 3), soften(z, 4., 3))

def test_shifted_without_the_largest_logit_in_the_graph_has_the_softmaxs_gradient():
    grads = []
    for detach in (False, True):
        z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        shifted(z, 3., detach=detach).log_softmax(1)[:,0].sum().backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads)
