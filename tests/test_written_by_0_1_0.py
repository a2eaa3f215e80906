"What version 0.1.0 wrote is read, or refused with a sentence"
import shutil
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Learner, accuracy, load_learner, set_seed
from fastkdtf.all import Checkpoint, KnowledgeDistillation, LossTerm, LsrKD, MemoryReplay, SelfGuidance, comparisons, kd_dataloaders, read_runs, seed_run
from fastkdtf.vision.cifar_nets import BasicBlock, CifarResNet

files = Path(__file__).parent/'written_by_0_1_0'
def net(): return CifarResNet(BasicBlock, 1, 10, widths=(4,4,4), stem=4)

@pytest.fixture(scope='module')
def dls():
    set_seed(0, True)
    return kd_dataloaders('digits', bs=64, train_subset=128)

def test_an_exported_learner_predicts_describes_its_methods_and_wants_its_teacher_back(dls):
    learn = load_learner(files/'learner.pkl')
    with learn.no_bar(): preds,targs = learn.get_preds(dl=dls.valid)
    assert preds.shape == (360, 10) and torch.allclose(preds.sum(1), torch.ones(360), atol=1e-5)
    assert [cb.name for cb in learn.cbs if isinstance(cb, LossTerm)] == ['lsr_kd', 'knowledge_distillation', 'memory_replay', 'guide']
    assert LsrKD(alpha=.1).describe(10).rows() == learn.lsr_kd.describe(10).rows()
    learn.dls = dls
    with pytest.raises(ValueError, match="network was left out of the exported file"): learn.fit(1)

def test_a_checkpoint_goes_on_where_it_stopped_or_says_that_it_belongs_to_another_training(dls, tmp_path):
    path = Path(shutil.copy(files/'checkpoint.pth', tmp_path))
    set_seed(0, True)
    dls = kd_dataloaders('digits', bs=64, train_subset=128)
    teacher = net()
    set_seed(1, True)
    methods = [LsrKD(alpha=.1), KnowledgeDistillation(teacher, alpha=.3), MemoryReplay(2, .5, alpha=.2, gamma=.2), SelfGuidance(name='guide')]
    learn = Learner(dls, net(), metrics=accuracy, cbs=methods)
    seed_run(0, dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=Checkpoint(path))
    want = torch.load(files/'after_two_epochs.pth')
    assert len(want) > 20
    for k,v in learn.model.state_dict().items(): assert torch.allclose(v, want[k], atol=1e-4), k

def test_records_are_shown():
    c, = comparisons(read_runs(files/'results.jsonl'))
    assert list(c.table.index) == ['baseline', 'LsrKD', 'LS 0.1']
