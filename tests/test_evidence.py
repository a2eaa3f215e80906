"What is shown of a campaign that is not finished, and of one that has not begun"
import csv, shutil, sys
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import numpy as np
import pandas as pd
import pytest
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.nbio import read_nb
from scipy import stats

from fastkdtf.all import KnowledgeDistillation, MemoryReplay, compare, create_model, kd_dataloaders
from fastkdtf.callback.methods import find_method
from fastkdtf.lab.compare import learner_parts, planned_arms
from fastkdtf.lab.evidence import Evidence, sentences
from fastkdtf.lab.learners import learner_maker
from fastkdtf.lab.report import Comparison
from fastkdtf.lab.runs import Ledger
from fastkdtf.lab.training import Arm

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
N = 3   # seeds

def methods(n_classes=10):
    "The form of the large campaign: label smoothing, a teacher that is trained first, memory, the baseline as teacher"
    named = {name: Arm(find_method(name).maker(n_classes)) for name in ('LSR', 'LsrKD')}
    return {**named, 'KD': Arm(find_method('KD').maker(n_classes), teacher='teacher'), 'MrKD-1': Arm(partial(MemoryReplay, 1, .5, alpha=.25, tau=3.)),
            'TfKDSelf': Arm(KnowledgeDistillation, teacher='baseline')}

def train(out, seeds=N):
    set_seed(0)
    dls = kd_dataloaders('digits', bs=32, train_subset=128, device='cpu')
    parts = lambda arch: learner_parts(dls, partial(create_model, arch, 10))
    return compare(methods(), parts('resnet8'), 1, seeds, out=out, lr=1e-2, teacher=parts('resnet8'), settings=dict(data='digits', arch='resnet8'))

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('campaign')
    train(out)
    records = Ledger(out/'results.jsonl').records()
    names = list(dict.fromkeys(r['method'] for r in records))
    role = {**{r['method']: 'method' if r['named'] else 'control' for r in records}, 'baseline': 'baseline', 'teacher': 'teacher'}
    with open(out/'planned.csv', 'w', encoding='utf-8', newline='') as f:
        csv.writer(f).writerows([('arm', 'role', 'what'), *[(name, role[name], f'what {name} is') for name in names]])
    return out

def begun(finished, n, tmp_path):
    "A folder in which `n` runs are finished"
    lines = (finished/'results.jsonl').read_bytes().splitlines(keepends=True) if n else []
    tmp_path.mkdir(exist_ok=True, parents=True)
    shutil.copy(finished/'planned.csv', tmp_path)
    if n: (tmp_path/'results.jsonl').write_bytes(b''.join(lines[:n]))
    return tmp_path

@pytest.fixture
def no_training(monkeypatch):
    def fit(self, *args, **kwargs): raise AssertionError('a page trains nothing')
    monkeypatch.setattr(Learner, 'fit', fit)

def test_every_beginning_of_a_campaign_is_shown(finished, tmp_path, no_training):
    "Also none of it, the teacher alone, the baseline alone, one seed"
    full = Ledger(finished/'results.jsonl').records()
    assert len(full) == 10*N
    arms = list(dict.fromkeys(r['method'] for r in full))
    states = set()
    for n in range(len(full)+1):
        e = Evidence(begun(finished, n, tmp_path/f'{n}'), N)
        done = [r['method'] for r in full[:n]]
        assert list(e.table.index) == arms and list(e.summary.index) == ['baseline', 'LSR', 'LsrKD', 'KD', 'MrKD-1', 'TfKDSelf']
        assert e.missing == {name: N-done.count(name) for name in arms if done.count(name) < N} and e.is_finished == (n == len(full))
        assert list(e.table.seeds) == [f'{done.count(name)}' if done.count(name) >= N else f'{done.count(name)} of {N}' for name in arms]
        waiting = [name for name in e.methods if name not in done]
        assert [name for (name,_),shown in e.judged.shown.items() if shown == 'not trained yet'] == waiting
        assert list(e.summary.index[e.summary.shown == 'not trained yet']) == waiting
        said = sentences(e)
        assert 1 <= len(said) <= 5 and all(o.endswith('.') for o in said)
        assert ('Not finished' in said[-1]) == (0 < n < len(full)) and ('No run is finished' in said[0]) == (n == 0)
        if n in (0, 1, 2, 5, 12, len(full)): assert (e.plot() is None) == (n < 3)
        states.add(e.is_finished)
    assert states == {False, True}

def test_judgements_are_paired_t_tests_with_holms_correction(finished):
    e = Evidence(finished, N)
    c = Comparison(Ledger(finished/'results.jsonl').records())
    acc = {(r['method'], r['seed']): r['last']['accuracy'] for r in c.records}
    pairs = [(m, o) for m in ('LSR', 'LsrKD', 'KD', 'MrKD-1', 'TfKDSelf') for o in c.rivals(m)]
    assert list(e.judgements.index) == pairs and len(pairs) >= 9
    for control,method in (('LSR', 'LsrKD'), ('twice as long', 'TfKDSelf'), ('CE ×1.5', 'MrKD-1')): assert (method, control) in pairs
    p = []
    for m,o in pairs:
        d = np.array([acc[m,s]-acc[o,s] for s in range(N)])
        row = e.judgements.loc[(m, o)]
        assert row.seeds == N and abs(row.difference-d.mean()) < 1e-9
        if d.std() > 1e-7:
            low,high = stats.t.interval(.95, N-1, d.mean(), stats.sem(d))
            assert abs(row.low-low) < 1e-9 and abs(row.high-high) < 1e-9
        p.append(stats.ttest_1samp(d, 0).pvalue if d.std() > 1e-7 else np.nan)
    known = np.isfinite(p)
    assert known.sum() > 5
    if known.all():   # else a p-value of equal differences has its own rule
        order,most = np.argsort(p),0
        for i,k in enumerate(order):
            most = max(most, min(1, p[k]*(len(p)-i)))
            assert abs(e.judgements.p.iloc[k]-most) < 1e-9
    said = e.judgements.verdict
    assert said.equals(pd.Series(np.where(~(e.judgements.p < .05), 'open', np.where(e.judgements.difference > 0, 'ahead', 'behind')), said.index, name='verdict'))
    assert c.verdicts() == said.to_dict()

def made_up(accuracies):
    "Records of one method, its control and the baseline"
    controls = {'control': ['M']}
    return [dict(key=f'{name}/{s}', method=name, rank=i, seed=s, control_for=controls.get(name, []), named=name != 'control', setting='s', evaluated_on='test',
                 seconds_per_epoch=1., last=dict(accuracy=a, nll=1., ece=0.), best=dict(accuracy=a, nll=1., ece=0.), history=dict(accuracy=[a]))
            for i,(name,values) in enumerate(accuracies.items()) for s,a in enumerate(values)]

base = [.50, .51, .52, .505]
@pytest.mark.parametrize('gain,over,place,word', [
    (.1, .1, 1, 'ahead of baseline and 1 of 1 controls'), (.1, 0., 2, 'ahead of baseline'), (-.1, 0., 3, 'behind baseline'), (0., 0., 3, 'nothing'),
    (.1, -.1, 2, 'ahead of baseline; behind 1 of 1 controls')])
def test_a_method_stands_in_the_sentence_of_its_verdicts(tmp_path, gain, over, place, word):
    noise = [.001, -.001, .0005, 0.]
    m = [b+gain+o for b,o in zip(base, noise)]
    runs = made_up({'baseline': base, 'M': m, 'control': [o-over-2*x for o,x in zip(m, noise)]})
    for r in runs: Ledger(tmp_path/'results.jsonl').append(r)
    e = Evidence(tmp_path, 4)
    said = sentences(e)
    assert len(said) == 5 and [i for i,o in enumerate(said) if 'M (' in o] == [place]
    assert e.summary.shown['M'] == word and e.summary['over its strictest control']['M'].startswith('control: ')
    assert ('Behind' in said[3]) == (gain < 0) and said[4].startswith('All 3 arms are finished')

def test_a_method_whose_control_is_not_trained_yet_is_not_called_ahead_of_every_control(tmp_path):
    runs = made_up({'baseline': base, 'M': [b+.1+x for b,x in zip(base, [.001, -.001, .0005, 0.])]})
    said = {}
    for name,control in (('known', 'control'), ('none', None)):
        folder = tmp_path/name
        for r in runs: Ledger(folder/'results.jsonl').append(r | (dict(description=[['controls', control]]) if control and r['method'] == 'M' else {}))
        (folder/'planned.csv').write_text('arm,role,what\nbaseline,baseline,a\nM,method,b\ncontrol,control,c\n')
        said[name] = [i for i,o in enumerate(sentences(Evidence(folder, 4))) if 'M (' in o]
    assert said == dict(known=[2], none=[1])

def test_the_strictest_control_is_the_one_that_the_method_gains_least_over(tmp_path):
    runs = made_up({'baseline': base, 'M': [b+.01 for b in base], 'control': [b-.02 for b in base], 'other': [b+.005 for b in base]})
    for r in runs: Ledger(tmp_path/'results.jsonl').append(r | dict(control_for=['M'] if r['method'] in ('control', 'other') else [], named=r['method'] in ('M', 'baseline')))
    assert Evidence(tmp_path).summary['over its strictest control']['M'].startswith('other: +0.50')

def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path):
    for r in made_up({'baseline': base}): Ledger(tmp_path/'results.jsonl').append(r)
    Ledger(tmp_path/'results.jsonl').append(made_up({'baseline': base})[1] | dict(key='baseline/other settings'))
    with pytest.raises(ValueError, match='several runs of baseline with seed 1, of different settings'): Evidence(tmp_path)

def test_runs_of_several_versions_stand_in_the_table_under_their_names_and_in_the_notes(finished, tmp_path):
    "A long campaign goes on after an update"
    for i,r in enumerate(Ledger(finished/'results.jsonl').records()): Ledger(tmp_path/'results.jsonl').append(r | dict(fastkdtf='0.1' if i < 7 else '0.2'))
    e,same = Evidence(tmp_path, N),Evidence(finished, N)
    assert e.notes and 'fastkdtf 0.1 against 0.2' in ' '.join(e.notes) and not same.notes and not Evidence(tmp_path/'none').notes
    columns = ['seeds', 'last acc %', 'Δ last', '95 % interval']
    assert e.table[columns].equals(same.table[columns]) and (e.table['last acc %'] != '–').all()

def test_a_changed_record_stops_the_page(finished, tmp_path):
    folder = begun(finished, 5, tmp_path/'x')
    text = (folder/'results.jsonl').read_text()
    (folder/'results.jsonl').write_text(text.replace('"seed": 0', '"seed": 7', 1))
    with pytest.raises(ValueError, match="the record of 'teacher/seed0/.*was changed after it was written"): Evidence(folder)

@pytest.mark.parametrize('share', [0, .1, .5, .9, 1])
@pytest.mark.parametrize('page', ['results', 'index', 'tutorials/which_method'])
def test_pages_are_made_from_any_part_of_the_records_without_training(page, share, finished, tmp_path, monkeypatch, no_training):
    monkeypatch.setattr('IPython.display.display', lambda *args: shown.extend(args))
    shown,n = [],round(share*10*N)
    for name in ('cifar100', 'cifar100_resnet20'): begun(finished, n, tmp_path/'results'/name)
    here = tmp_path/'nbs'/Path(page).parent
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    cells = [c.source for c in read_nb(root/'nbs'/f'{page}.ipynb').cells if c.cell_type == 'code' and '/content' not in c.source]
    evidence = ('vidence', 'sentences', 'methods.', 'guidance', 'paper')
    cells = [c for c in cells if page == 'results' or any(o in c for o in evidence) and 'compare(' not in c and 'chdir' not in c]
    assert len(cells) >= 2
    ns = dict(kept=tmp_path/'results')
    exec('from pathlib import Path\nfrom IPython.display import Markdown, display\nfrom fastkdtf.lab.evidence import Evidence, sentences', ns)
    for c in cells: exec('\n'.join(line for line in c.splitlines() if not line.startswith('#|')), ns)
    text = ' '.join(o.data for o in shown)
    if page == 'results': assert ns['methods'].is_finished == (share == 1) and len(ns['methods'].records) == n
    elif share == 0: assert 'No run is finished' in text
    else: assert 'digits, resnet8' in text and ('Not finished' in text) == (share < 1 and page != 'index')

def plan_of(part, images, monkeypatch):
    "The arms that tools/evidence.py would train"
    import evidence
    def planned(methods, learn, n_epoch, seeds, out, teacher=None, **kwargs):
        return out.name, planned_arms(methods, learner_maker(learn)(0), n_epoch, teacher=teacher)
    monkeypatch.setattr(evidence, 'compare', planned)
    return getattr(evidence, part)(images)

@pytest.mark.parametrize('part', ['methods', 'self_guidance'])
@pytest.mark.filterwarnings('ignore:.*training images too')
def test_the_kept_plan_is_that_of_the_tool(part, tmp_path, monkeypatch):
    rng,n = np.random.default_rng(0),{'train': 1000, 'test': 100}
    images = {f'{o}_images': rng.integers(0, 256, (k, 32, 32, 3), dtype=np.uint8) for o,k in n.items()}
    np.savez(tmp_path/'c.npz', **images, **{f'{o}_labels': np.arange(k)%100 for o,k in n.items()}, class_names=np.array([f'c{i}' for i in range(100)]))
    folder,arms = plan_of(part, tmp_path/'c.npz', monkeypatch)
    plan = Evidence(root/'results'/folder).plan
    role = {name: name if name in ('baseline', 'teacher') else 'method' if arm.named else 'control' for name,arm in arms.items()}
    assert plan.role.to_dict() == role and list(plan.index) == list(arms) and len(arms) >= 5 and all(plan.what)

def test_kept_records_are_sealed_and_hold_no_path():
    "Seal those that an earlier version wrote: `Ledger(file).seal()`"
    files = sorted((root/'results').rglob('results.jsonl'))
    assert len(files) >= 5
    for file in files:
        ledger = Ledger(file)
        assert ledger.unsealed == [], f'{file} has records without a seal: Ledger(file).seal() adds them'
        assert len(ledger.records()) == len(ledger) > 0
        assert str(root) not in file.read_text(encoding='utf-8') and '"/' not in file.read_text(encoding='utf-8'), file
