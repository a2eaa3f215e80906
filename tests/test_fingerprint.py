"Settings in words: the same in every process, other words for other settings"
import os, subprocess, sys
from functools import partial

import pytest, torch
from torch import nn

from fastkdtf.all import Correct, LsrKD, NetworkTeacher, UniformTeacher
from fastkdtf.fingerprint import fingerprint, settings_digest

class Cut:
    def __init__(self, size): self.size = size
class Steps:
    def __init__(self, *steps): self.steps = steps
class Named:
    def __init__(self, identity): self.identity = identity

@pytest.mark.parametrize('x,words', [
    (None, None), (3, 3), (.5, .5), ('a', 'a'), (True, True),
    ({1: (2, [3])}, {'1': [2, [3]]}), ({'b', 'a'}, ["'a'", "'b'"]), (nn.Linear, 'Linear'),
    (partial(torch.optim.SGD, momentum=.9), ['SGD', [], {'momentum': .9}]),
    (Steps(Cut(4)), ['Steps', {'steps': [['Cut', {'size': 4}]]}]),
    (Named('resnet8'), 'resnet8'), (UniformTeacher(), 'UniformTeacher()')])
def test_words(x, words): assert fingerprint(x) == words

def test_an_address_is_no_identity():
    assert fingerprint(Named('<f at 0x7f3c>')) == ['Named', {'identity': '<f at 0x7f3c>'}]
    assert '0x' not in str(fingerprint(object()))

def test_classes_go_by_their_name_whatever_identity_they_have():
    class Teaches:
        identity = 'always the same'
    assert fingerprint(Teaches()) == 'always the same' and fingerprint(NetworkTeacher) == 'NetworkTeacher'

def test_tensors_go_by_value():
    x = torch.tensor([1., 2.])
    assert fingerprint(x) == fingerprint(x.long()) == fingerprint(x.half()) != fingerprint(x+1)

def test_networks_that_teach_go_by_their_weights():
    torch.manual_seed(0)
    a,b = nn.Linear(2, 3),nn.Linear(2, 3)
    words = [fingerprint(NetworkTeacher(net, teacher_norm=None)) for net in (a, b, a)]
    assert words[0] == words[2] != words[1]

def test_objects_within_objects_end_somewhere():
    ring = Named(None)
    ring.next = ring
    assert len(str(fingerprint(ring))) < 10_000

def test_the_digits_of_0_1_0():
    assert settings_digest(dict(alpha=.1, tau=3.)) == settings_digest(dict(tau=3., alpha=.1)) == 'aeda755dd0a2' != settings_digest(dict(alpha=.2, tau=3.))
    with pytest.raises(TypeError): settings_digest(dict(model=nn.Linear(2, 2)))

def test_another_process_says_the_same():
    code = '''
from functools import partial
from fastkdtf.all import Correct, LsrKD
from fastkdtf.fingerprint import fingerprint, settings_digest
print(settings_digest(dict(x=fingerprint([{'a', 'b', 'c', 'd'}, partial(LsrKD, alpha=.2), ~Correct(), print]))))'''
    here = settings_digest(dict(x=fingerprint([{'d', 'c', 'b', 'a'}, partial(LsrKD, alpha=.2), ~Correct(), print])))
    for seed in '12':
        there = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': seed}, capture_output=True, text=True)
        assert there.stdout.strip() == here
