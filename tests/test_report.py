"""Calibration, and the table and plots of a comparison, against brute force and NumPy loops"""
import json, math, warnings

import numpy as np, pandas as pd, pytest, torch
import matplotlib
matplotlib.use('agg')
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from scipy import stats

from fastkdtf.lab.interpret import evaluate, reliability
from fastkdtf.lab import report
from fastkdtf.lab.report import Comparison, comparisons
from fastkdtf.lab.page import headline


def test_methods_are_neither_baseline_nor_controls():
    "A control that is judged itself, as it has a control of its own, is a method; callbacks that only scale are controls whoever named them"
    scaled = [dict(callback='ScaledCE', factor=2.)]
    records = [record('baseline', 0), record('A', 0, rank=1), record('LS', 0, rank=2, control_for=('A',)),
               record('B', 0, rank=3, control_for=('A',)), record('LS of B', 0, rank=4, control_for=('B',)),
               {**record('mine', 0, rank=5), 'callbacks': scaled}]
    c = Comparison(records)
    assert c.methods == ['A', 'B'] and c.rivals('A') == ['LS', 'B', 'baseline'] and c.rivals('B') == ['LS of B', 'baseline'] and c.rivals('LS') == ['baseline']
    assert c.scores('A') == [.5] and c.scores('A', epoch='best') == [.6] and c.scores('A', 'nll') == [1.]

def test_a_large_comparison_looks_at_each_record_a_few_times(monkeypatch):
    "30 methods, each with two controls that only its description names, over 5 seeds"
    names = [f'{kind}{i}' for i in range(30) for kind in ('A', 'CE, scaled ', 'LS ')]
    def described(i, name): return [('controls', f'CE, scaled {i//3}, LS {i//3}')] if name[0] == 'A' else []
    records = [{**record(name, seed, rank=i), 'description': described(i, name)} for i,name in enumerate(names) for seed in range(5)]
    records += [record('baseline', seed, rank=-1) for seed in range(5)]
    seen,real = [],report._described_controls
    monkeypatch.setattr(report, '_described_controls', lambda r, known: (seen.append(r), real(r, known))[1])
    c = Comparison(records)
    assert len(c._repr_html_()) > 10_000 and len(c.pairs) == 30*3+60 and c.rivals('A7') == ['CE, scaled 7', 'LS 7', 'baseline']
    assert 0 < len(seen) <= 3*len(records)

def test_the_sentences_of_the_page_err_as_rarely():
    "Whole tables, from records to the headline"
    accs,wrong = np.random.default_rng(0).binomial(360, .9, (400, 4, 3))/360,0
    for one in accs:
        records = [record(name, s, last=a, rank=i, control_for=('A',)*(name == 'LS')) for i,(name,row) in enumerate(zip(('baseline', 'A', 'B', 'LS'), one)) for s,a in enumerate(row)]
        wrong += any(' is ahead of ' in words or ' is behind ' in words for words in headline(Comparison(records)))
    assert wrong/400 < .07


# ---------------------------------------------------------------- calibration

def naive(logits, y, n_bins=15):
    "Guo et al. 2017, eq. 3, sample by sample: bin m holds the confidences in ((m-1)/M, m/M]"
    z = logits.double().numpy()
    p = np.exp(z-z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    bins = [[] for _ in range(n_bins)]
    for row,c in zip(p, y.tolist()):
        conf = row.max()
        m = next(m for m in range(n_bins) if conf <= (m+1)/n_bins+1e-12)
        bins[m].append((conf, row.argmax() == c))
    ece,table = 0.,[]
    for rows in bins:
        n = len(rows)
        conf,acc = (sum(r[i] for r in rows)/n for i in range(2)) if n else (0., 0.)
        ece += n/len(y)*abs(acc-conf)
        table.append((n, conf, acc))
    nll = -np.mean([math.log(row[c]) for row,c in zip(p, y.tolist())])
    return ece,nll,np.mean([row.argmax() == c for row,c in zip(p, y.tolist())]),table

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(2, 20), st.floats(.1, 6), st.integers(0, 10**6))
def test_calibration_is_the_naive_loops(n, k, spread, seed):
    gen = torch.Generator().manual_seed(seed)
    logits,y = spread*torch.randn(n, k, generator=gen),torch.randint(0, k, (n,), generator=gen)
    ece,nll,acc,table = naive(logits, y)
    got = evaluate(logits, y)
    assert got['nll'] == pytest.approx(nll, rel=1e-5, abs=1e-6) and got['accuracy'] == pytest.approx(acc)
    # a confidence within float32 rounding of an edge may fall on either side of it
    if [r[0] for r in got['reliability']] == [r[0] for r in table]:
        assert got['ece'] == pytest.approx(ece, abs=1e-5)
        assert np.array(got['reliability']) == pytest.approx(np.array(table), abs=1e-5)
    else: assert got['ece'] == pytest.approx(ece, abs=2/n)
    assert sum(r[0] for r in got['reliability']) == n

def test_known_calibration():
    sure = torch.tensor([[20., 0.], [20., 0.], [0., 20.], [20., 0.]])
    assert evaluate(sure, torch.tensor([0, 0, 1, 1]))['ece'] == pytest.approx(.25, abs=1e-4)
    assert evaluate(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))['ece'] == pytest.approx(0, abs=1e-6)
    assert len(evaluate(sure, torch.zeros(4, dtype=torch.long))['reliability']) == 15

@pytest.mark.parametrize('n_bins', [1, 5, 10])
def test_bins(n_bins):
    logits,y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)),torch.arange(50)%4
    assert reliability(logits, y, n_bins).numpy() == pytest.approx(np.array(naive(logits, y, n_bins)[3]), abs=1e-5)

def test_half_precision_and_not_a_number():
    logits,y = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)),torch.arange(64)%5
    assert evaluate(logits.half(), y)['nll'] == pytest.approx(evaluate(logits, y)['nll'], rel=1e-2)
    lost = evaluate(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long))
    assert math.isnan(lost['nll']) and math.isnan(lost['ece'])
    json.dumps(lost)


# ---------------------------------------------------------------- the table

def record(method, seed, last=.5, best=.6, rank=0, control_for=(), nll=1., ece=.1, time=2., history=None):
    score = lambda a: dict(accuracy=a, nll=nll, ece=ece)
    return dict(key=f'{method}/{seed}', method=method, rank=rank, control_for=list(control_for), seed=seed, baseline='baseline', setting='digits, resnet8',
                evaluated_on='test', last=score(last), best=dict(epoch=1, valid_accuracy=.7, **score(best)), seconds_per_epoch=time,
                history=history or dict(train_loss=[2., 1.], valid_loss=[2., 1.5], accuracy=[.4, last]))

def test_a_row_with_a_mark_keeps_its_control_and_its_seeds():
    runs = [{**record(name, seed, control_for=c), 'fastkdtf': v} for seed in range(2)
            for name,c,v in (('baseline', [], '0.1.0'), ('LsrKD', [], '0.2.0'), ('LSR', ['LsrKD'], '0.1.0'))]
    shown = Comparison(runs).shown
    assert any('[1]' in name for name in shown.index) and shown['seeds'].tolist() == [2, 2, 2] and shown['control for'].tolist() == ['', '', 'LsrKD']

def test_a_control_whose_name_holds_a_comma_is_one_control():
    "A method called OLS was taken for its own control, as `OLS, even` begins so"
    described = dict(description=[['method', 'smoothing'], ['controls', 'OLS, even, CE ×2']])
    runs = [record(name, seed) for name in ('baseline', 'OLS', 'CE ×2') for seed in range(2)]
    for with_it in (True, False):
        more = [record('OLS, even', seed, control_for=['OLS']) for seed in range(2)]*with_it
        c = Comparison([{**r, **described} if r['method'] == 'OLS' else r for r in runs+more])
        assert c.control_for('OLS') == [] and c.controls('OLS') == ['CE ×2', *['OLS, even']*with_it]
        assert c.known_controls('OLS', ['OLS, even']) == ['OLS, even', 'CE ×2']

def study():
    rng = np.random.default_rng(0)
    return [record(m, seed, last=rng.uniform(.5, .9), best=rng.uniform(.5, .9), rank=rank, control_for=c, nll=rng.uniform(.5, 2), ece=rng.uniform(0, .2), time=rng.uniform(1, 3))
            for seed in (0, 1, 2, 5) for rank,(m,c) in enumerate([('baseline', ()), ('LsrKD', ()), ('TfKDReg', ()), ('LS 0.1', ('LsrKD',)), ('CE ×2', ('TfKDReg', 'LsrKD'))])]

def of(records, method, *keys):
    out = []
    for r in sorted((r for r in records if r['method'] == method), key=lambda r: r['seed']):
        for k in keys: r = r[k]
        out.append(r)
    return np.array(out)

def test_table_is_the_formulas():
    records = study()
    table = Comparison(records).table
    assert list(table.index) == ['baseline', 'LsrKD', 'TfKDReg', 'LS 0.1', 'CE ×2']
    for name,row in table.iterrows():
        last,best = of(records, name, 'last', 'accuracy'),of(records, name, 'best', 'accuracy')
        assert row.seeds == 4
        assert (row['last'], row.last_sd, row.best, row.best_sd) == pytest.approx((last.mean(), last.std(ddof=1), best.mean(), best.std(ddof=1)))
        assert row.nll == pytest.approx(of(records, name, 'last', 'nll').mean()) and row.ece == pytest.approx(of(records, name, 'last', 'ece').mean())
        assert row.seconds_per_epoch == pytest.approx(of(records, name, 'seconds_per_epoch').mean())
        if name == 'baseline':
            assert row[['difference', 'low', 'high', 'seeds_low', 'seeds_high', 'overhead']].isna().all()
            continue
        base = of(records, 'baseline', 'last', 'accuracy')
        test = stats.ttest_rel(last, base).confidence_interval(.95)
        assert (row.difference, row.low, row.high) == pytest.approx(((last-base).mean(), test.low, test.high))
        assert math.isnan(row.seeds_low) and math.isnan(row.seeds_high)   # of four seeds
        assert row.overhead == pytest.approx((of(records, name, 'seconds_per_epoch')/of(records, 'baseline', 'seconds_per_epoch')).mean()-1)
    assert table.control_for['CE ×2'] == 'TfKDReg, LsrKD' and table.control_for['baseline'] == ''

def test_order_of_records_does_not_matter():
    records = study()
    shuffled = [records[i] for i in np.random.default_rng(1).permutation(len(records))]
    pd.testing.assert_frame_equal(Comparison(records).table, Comparison(shuffled).table)

def test_paired_by_seed_when_seeds_are_missing():
    "The baseline lacks seed 3, the method lacks seed 0: seeds 1 and 2 are compared"
    base = [record('baseline', s, last=.1*s+.2, time=1.) for s in (2, 0, 1)]
    ours = [record('A', s, last=.1*s+.25+.01*(s == 2), rank=1, time=1.+s) for s in (3, 1, 2)]
    row = Comparison(ours+base).table.loc['A']
    assert row.seeds == 3 and row['last'] == pytest.approx(np.mean([.35, .46, .55]))
    expected = stats.ttest_rel([.35, .46], [.3, .4]).confidence_interval(.95)
    assert (row.difference, row.low, row.high) == pytest.approx((.055, expected.low, expected.high))
    assert row.overhead == pytest.approx(1.5)

@pytest.mark.parametrize('field,mine,other', [('fastkdtf', '0.2.0', '0.1.0'), ('torch', '2.7.0', '2.6.0'), ('fastai', '2.8.9', '2.8.8'), ('device', 'NVIDIA H200', 'cpu'),
                                              ('processor', 'AMD EPYC', 'Intel Xeon'), ('threads', 4, 1), ('torchvision', '0.22.0', None)])
def test_methods_and_rivals_that_were_not_trained_alike_are_marked(field, mine, other):
    base = [{**record('baseline', s), field: other} for s in range(3)]
    control = [{**record('control', s, rank=2, control_for=['A']), field: mine} for s in range(3)]
    c = Comparison(base + [{**record('A', s, rank=1), field: mine} for s in range(3)] + control)
    said = f"A, control against baseline: {field} {mine} against {'unknown' if other is None else other}."
    assert len(c.notes) == 1 and c.notes[0].startswith(said) and 'overhead' in c.notes[0]
    assert {name: c.marks(name) for name in c.names} == {'baseline': [1], 'A': [1], 'control': [1]}
    assert list(c.shown.index) == ['baseline [1]', 'A [1]', 'control [1]'] and f'[1] {said}' in repr(c) and f'[1] {said}' in c._repr_html_()
    assert list(c.table.index) == ['baseline', 'A', 'control'] and c.table.notes.tolist() == c.notes*3

def test_runs_that_were_trained_alike_seed_by_seed_have_no_mark():
    "Another machine for another seed is no difference between methods; nor is the date, or the commit of what does not run"
    def runs(name, rank): return [{**record(name, s, rank=rank), 'processor': f'machine {s}', 'date': f'2026-01-0{rank+1}', 'platform': name} for s in range(3)]
    c = Comparison(runs('baseline', 0)+runs('A', 1))
    assert c.notes == [] and list(c.shown.index) == ['baseline', 'A'] and 'notes' not in c.table
    apart = Comparison(runs('baseline', 0)+[{**r, 'processor': 'machine 9'} if r['seed'] == 1 else r for r in runs('A', 1)])
    assert apart.notes[0].startswith('A against baseline: processor machine 9 against machine 1.')
    assert Comparison(runs('baseline', 0)+[{**r, 'seed': r['seed']+3} for r in runs('A', 1)]).notes == []   # no seed in common

def test_several_differences_have_a_footnote_each():
    rows = [('baseline', 0, '2.6'), ('A', 1, '2.7'), ('B', 2, '2.8'), ('C', 3, '2.6')]
    c = Comparison([{**record(name, s, rank=rank), 'torch': torch} for name,rank,torch in rows for s in range(2)])
    assert {name: c.marks(name) for name in c.names} == {'baseline': [1, 2], 'A': [1], 'B': [2], 'C': []}
    assert list(c.shown.index) == ['baseline [1] [2]', 'A [1]', 'B [2]', 'C']

def test_no_common_seed_or_no_baseline():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c = Comparison([record('baseline', 0), record('A', 1, rank=1)])
        assert math.isnan(c.table.loc['A'].difference) and c.shown.loc['A', 'Δ last'] == '–'
        alone = Comparison([record('A', 0)])
        assert math.isnan(alone.table.loc['A'].difference)
        repr(alone)

def test_one_seed_shows_dashes():
    c = Comparison([record('baseline', 0, last=.5), record('A', 0, last=.6, rank=1)])
    a,base = c.shown.loc['A'],c.shown.loc['baseline']
    assert a['last acc %'] == '60.00' and base['last acc %'] == '50.00' and '±' not in repr(c.shown)
    assert a['Δ last'] == '+10.00' and a['95 % interval'] == '–' and a['seeds needed'] == '–'
    assert base['Δ last'] == '–' and base['overhead'] == '–'
    assert 'nan' not in repr(c) and 'nan' not in c._repr_html_().lower()

def test_what_is_shown():
    c = Comparison([record('baseline', s, last=.5+.01*s, best=.6, nll=1.2345, ece=.0567, time=2.) for s in (0, 1)]
                   + [record('A', s, last=.6+.03*s, rank=1, control_for=('B',), time=3.) for s in (0, 1)])
    a = c.shown.loc['A']
    assert a['last acc %'] == '61.50 ± 2.12' and a['Δ last'] == '+11.00' and a['overhead'] == '+50 %' and a['s/epoch'] == '3.00' and a['control for'] == 'B'
    assert a['95 % interval'] == '[-1.71, +23.71]'
    assert c.shown.loc['baseline', 'NLL'] == '1.234' and c.shown.loc['baseline', 'ECE %'] == '5.67'
    for o in ('digits, resnet8', 'test set', 'baseline', 'mean ± sd'): assert o in repr(c) and o in c._repr_html_()
    assert c.covers in repr(c) and c.covers in c._repr_html_()
    assert '–∞' in repr(Comparison([record(m, s) for m in ('baseline', 'A') for s in range(5)]))

def test_diverged_runs():
    "As the ledger returns them, nulls for what is not a number"
    lost = record('A', 1, last=.1, nll=None, ece=None, rank=1, history=dict(train_loss=[None, None], valid_loss=[None, None], accuracy=[.1, .1]))
    c = Comparison([record('baseline', 0), record('baseline', 1), record('A', 0, rank=1), lost])
    assert c.table.loc['A', 'last'] == pytest.approx(.3) and math.isnan(c.table.loc['A'].nll)
    assert c.shown.loc['A', 'NLL'] == '–' and c.shown.loc['A', 'ECE %'] == '–' and c.shown.loc['baseline', 'NLL'] == '1.000'
    without = Comparison([record('baseline', 0), record('A', 0, last=None, best=None, rank=1)])
    assert without.shown.loc['A', 'last acc %'] == '–' and without.shown.loc['A', 'Δ last'] == '–'
    for o in (c, without):
        o.plot_accuracy(), o.plot_curves(), repr(o)
    plt.close('all')

def test_nothing_to_show():
    with pytest.raises(ValueError, match='records'): Comparison([])


def test_difference_to_any_other():
    ours,control = [.35, .46, .52],[.33, .45, .47]
    c = Comparison([record('A', s, last=a, rank=1) for s,a in enumerate(ours)] + [record('B', s, last=a, rank=2, control_for=('A',)*(s > 0)) for s,a in enumerate(control)] + [record('C', 9, rank=3)])
    expected = stats.ttest_rel(ours, control).confidence_interval(.95)
    assert c.difference('A', 'B') == pytest.approx((np.mean(np.subtract(ours, control)), expected.low, expected.high))
    assert c.controls('A') == ['B'] and c.control_for('B') == ['A'] and not c.controls('B')   # one record that says so is enough
    assert all(map(math.isnan, c.difference('A'))) and all(map(math.isnan, c.difference('A', 'C')))
    assert c.paired('A', 'B') == (ours, control) and c.paired('A', 'B', lambda r: r['seed']) == ([0, 1, 2], [0, 1, 2])

def test_curves_of_unequal_runs():
    history = lambda *a: dict(valid_loss=list(a), accuracy=[.1])
    c = Comparison([record('baseline', 0, history=history(3., None, 1.)), record('baseline', 1, history=history(2.)), record('A', 0, rank=1, history=dict(accuracy=[.1]))])
    np.testing.assert_array_equal(c.curves('baseline', 'valid_loss'), [[3., math.nan, 1.], [2., math.nan, math.nan]])
    assert c.curves('A', 'valid_loss').shape == (1, 0)
    c.plot_curves()
    plt.close('all')


def test_what_was_named_is_judged_also_where_it_controls_another_method():
    smoothed = dict(callbacks=[dict(callback='LsrKD', alpha=.1, tau=1.)])
    records = [record('baseline', 0), record('LsrKD', 0, rank=1), {**record('LSR', 0, rank=2, control_for=('LsrKD',)), **smoothed}]
    assert Comparison(records).methods == ['LsrKD', 'LSR'] and Comparison(records).controls('LsrKD') == ['LSR']   # written by 0.1.0
    scaled = dict(callbacks=[dict(callback='ScaledCE', factor=2.)])
    for named,methods in ((True, ['A', 'CE ×2']), (False, ['A'])):
        c = Comparison([record('baseline', 0), {**record('A', 0, rank=1), 'named': True}, {**record('CE ×2', 0, rank=2, control_for=('A',)), **scaled, 'named': named}])
        assert c.methods == methods and c.rivals('A') == ['CE ×2', 'baseline']
        assert any(words.startswith('No difference') or 'cannot' in words for words in headline(c) if 'CE ×2 and' in words) == named

def test_the_headline_says_why_a_method_is_held_against_the_baseline_only():
    def described(name, controls, rank): return {**record(name, 0, rank=rank), 'description': [['controls', controls]] if controls else None}
    c = Comparison([record('baseline', 0), described('A', 'none known', 1), described('B', 'the baseline', 2), described('C', 'CE ×2', 3), described('D', None, 4)])
    said = headline(c)
    for words in ('baseline only, as no matched control is known: A.', 'baseline only, which is the matched control: B.', 'baseline only, as no other control was run: C, D.'):
        assert f'Held against {words}' in said

@pytest.mark.parametrize('n_seeds,splits,said', [(1, 0, 'One seed gives no interval'), (3, 0, 'differs between 3 seeds of the training. They do not cover the split'),
                                                 (4, 4, 'differs between 4 splits of the data and 4 seeds'), (6, 3, '3 splits of the data and 6 seeds')])
def test_every_headline_says_what_its_intervals_cover(n_seeds, splits, said):
    split = lambda s: dict(split=dict(number=s%splits, of=splits, group='g')) if splits else {}
    c = Comparison([{**record(m, s, last=.5+.01*s, rank=i), **split(s)} for i,m in enumerate(('baseline', 'A')) for s in range(n_seeds)])
    assert any(said in words for words in headline(c)) and said in repr(c)

def test_seeds_of_one_split_are_averaged_before_the_interval():
    base,ours = [.70, .71, .80, .82, .75, .74],[.72, .72, .83, .86, .75, .75]
    records = [{**record(m, s, last=a, rank=i), 'settings': dict(split=s%3), 'split': dict(number=s%3, of=3, group='g')}
               for i,(m,v) in enumerate((('baseline', base), ('A', ours))) for s,a in enumerate(v)]
    c, = comparisons(records)   # in one table, though the splits have settings of their own
    d = np.subtract(ours, base)
    means = [d[[i, i+3]].mean() for i in range(3)]
    expected = stats.ttest_1samp(means, 0).confidence_interval(.95)
    assert c.difference('A') == pytest.approx((d.mean(), expected.low, expected.high)) and c.table.loc['A'].low == pytest.approx(expected.low)
    assert c.table.loc['A'].seeds == 6

def test_the_spread_of_splits_is_in_the_interval():
    "Gains of -1, 0 and 1 point on three splits, nearly the same for all seeds of one: six seeds do not hide the three splits"
    gain = {0: -.01, 1: 0., 2: .013}
    records = [{**record(m, s, last=.7+(m == 'A')*(gain[s%3]+.001*(s > 2)), rank=i), 'split': dict(number=s%3, of=3, group='g')} for i,m in enumerate(('baseline', 'A')) for s in range(6)]
    together = Comparison(records).difference('A')
    apart = Comparison([{k: v for k,v in r.items() if k != 'split'} for r in records]).difference('A')
    assert together[0] == pytest.approx(apart[0]) and together[2]-together[1] > 2*(apart[2]-apart[1])

def test_the_teachers_accuracy_stands_beside_its_students():
    records = [record(m, s, rank=i) for i,m in enumerate(('baseline', 'KD')) for s in (0, 1)]
    assert 'teacher' not in Comparison(records).table
    for r,a in zip(records[2:], (.8, .9)): r['teacher_accuracy'] = a
    c = Comparison(records)
    assert c.shown['teacher acc %'].tolist() == ['–', '85.00'] and 'Teacher: accuracy' in c.caption

nulls = st.lists(st.sampled_from(['seconds_per_epoch', 'accuracy', 'nll', 'ece', 'best', 'history', 'reliability', 'whole history']), max_size=5)

@settings(max_examples=15, deadline=None)
@given(nulls, nulls)
def test_whatever_a_diverged_run_lacks_the_report_is_written(first, second):
    "JSON has no not-a-number: each number of a record may be null"
    from fastkdtf.lab.page import failures, report_html
    records = study()
    for r,lost in ((records[1], first), (records[6], second)):
        for what in lost:
            if what == 'seconds_per_epoch': r[what] = None
            elif what == 'best': r['best'] = dict(accuracy=None, nll=None, ece=None)
            elif what == 'history': r['history'] = {k: [None]*len(v) for k,v in r['history'].items()}
            elif what == 'whole history': r['history'] = {}
            elif what == 'reliability': r['last'][what] = [[None, None, None]]*15
            else: r['last'][what] = None
    c = Comparison(records)
    html = report_html(c)
    assert 'nan' not in repr(c.shown).lower() and 'Accuracy' in html and isinstance(failures(c), list)


# ---------------------------------------------------------------- files and plots

def test_save_round_trip(tmp_path):
    c = Comparison(study())
    before = plt.get_fignums()
    assert c.save(tmp_path/'a'/'b') == tmp_path/'a'/'b'
    assert plt.get_fignums() == before
    assert sorted(o.name for o in (tmp_path/'a'/'b').iterdir()) == ['accuracy.png', 'curves.png', 'table.csv']
    again = pd.read_csv(tmp_path/'a'/'b'/'table.csv', index_col='method', keep_default_na=True).fillna({'control_for': ''})
    pd.testing.assert_frame_equal(again, c.table, check_dtype=False)
    for name in ('accuracy', 'curves'): assert plt.imread(tmp_path/'a'/'b'/f'{name}.png').std() > 0
    c.save(str(tmp_path/'a'/'b'))   # over it

def test_save_leaves_the_users_figure(tmp_path):
    plt.close('all')
    mine = plt.figure()
    mine.add_subplot().plot([0, 1])
    Comparison(study()).save(tmp_path)
    assert plt.get_fignums() == [mine.number] and len(mine.axes[0].lines) == 1
    plt.close('all')

def test_accuracy_plot():
    records = study()
    c = Comparison(records)
    ax = c.plot_accuracy()
    assert [o.get_text() for o in ax.get_yticklabels()] == c.names and ax.yaxis_inverted()
    for i,name in enumerate(c.names):
        x,y = ax.collections[i].get_offsets().T
        assert np.asarray(x) == pytest.approx(100*of(records, name, 'last', 'accuracy')) and set(y) == {i}
        assert ax.lines[i].get_xdata() == pytest.approx([100*of(records, name, 'last', 'accuracy').mean()]*2)
    own = plt.subplots()[1]
    assert c.plot_accuracy(own) is own
    plt.close('all')

def test_curves_plot():
    history = lambda a: dict(valid_loss=[3., 2., a], accuracy=[.1, .2, a])
    c = Comparison([record('baseline', 0, history=history(.3)), record('baseline', 1, history=history(.5)), record('A', 0, rank=1, history=history(.9))])
    axs = c.plot_curves()
    for ax,first in zip(axs, (3., .1)):
        assert [o.get_label() for o in ax.lines] == ['baseline', 'A']
        assert list(ax.lines[0].get_xdata()) == [1, 2, 3]
        assert ax.lines[0].get_ydata()[[0, -1]] == pytest.approx([first, .4]) and ax.lines[1].get_ydata()[-1] == pytest.approx(.9)
    plt.close('all')
