"""Paper against ours: every number of the table from made-up records, by hand, and what is written of it"""
import json, math, re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest
import matplotlib
matplotlib.use('agg')

import fastkdtf.lab.reproduction
from hypothesis import given, settings, strategies as st
from scipy import stats

from fastkdtf.lab.statistics import t_interval
from fastkdtf.lab.reproduction import *


def printed(paper, table, student, method, value, metric='accuracy', sd=None, gain=None, data='cifar100', case='', contradiction='', note='', missing=()):
    id = '/'.join(filter(None, (paper, table, student, method, case)))
    return SimpleNamespace(id=id, paper=paper, table=table, data=data, student=student, method_name=method, case=case, metric=metric, value=value, sd=sd, gain=gain, contradiction=contradiction, note=note,
                           missing=list(missing))

few = settings(max_examples=60, deadline=None)

ROWS = [printed('p', 'T1', 'net', 'baseline', 70.), printed('p', 'T1', 'net', 'KD', 72., sd=.2, gain=2.1, contradiction='72.00 - 70.00 is +2.00, printed +2.10.', note='Read | from a figure.'),
        printed('p', 'T1', 'net', 'KD', 65., case='short'), printed('p', 'T1', 'net', 'baseline', 64., case='short'), printed('p', 'T1', 'net', 'LSR', 69.5, missing=['The temperature is missing.']),
        printed('p', 'T2', 'net', 'KD', None, metric='gain', gain=-.4), printed('p', 'T3', 'alone', 'KD', 60.), printed('p', 'T4', 'net', 'KD', 90., metric='accuracy5'), printed('p', 'T4', 'net', 'baseline', 89., metric='accuracy5'),
        printed('e', 'T1', 'net', 'baseline', 30., metric='error'), printed('e', 'T1', 'net', 'Replay', 29., metric='error'), printed('e', 'T1', 'net', 'SD', 28., metric='error', gain=1.5)]

@pytest.fixture(autouse=True)
def printed_rows(monkeypatch):
    "Tables of two papers: `p` reports the best epoch, 3 runs; `e` does not say"
    known = {r.id: r for r in ROWS}
    text = lambda o: '' if o is None else str(o)
    results = pd.DataFrame([{**{k: text(v) for k,v in vars(r).items()}, 'method': r.method_name} for r in ROWS])
    papers = pd.DataFrame(dict(paper=['p', 'e'], reported=['best', ''], runs=['3', '']))
    monkeypatch.setattr(fastkdtf.lab.reproduction, 'recipe', known.__getitem__)
    monkeypatch.setattr(fastkdtf.lab.reproduction, 'paper_table', dict(results=results, papers=papers).__getitem__)


def run(key, method, seed, last, best=None, rank=0):
    return dict(key=key, method=method, rank=rank, seed=seed, control_for=[], setting='made up', evaluated_on='test', last=dict(accuracy=last, nll=1., ece=.1), best=dict(accuracy=last if best is None else best),
                seconds_per_epoch=1., history=dict(train_loss=[1.], valid_loss=[1.], accuracy=[last]), callbacks=[])

def ran(id, best, method='KD', baseline='net baseline', controls=(), full=True, data='cifar100', n_epoch=200, n_train=50_000, words='all of it', seeds=None, mark='', last=None, **more):
    "A record of a recipe and its runs, from accuracies of the best epoch by arm; those of the last are lower"
    runs = [run(f'{id}{mark}/{name}/{s}', name, s, a-.01 if last is None else last[name][i], a, rank) for rank,(name,accs) in enumerate(best.items()) for i,(s,a) in enumerate(zip(seeds or range(99), accs))]
    return dict(key=f'{id}{mark}', recipe=id, data=data, n_epoch=n_epoch, epochs=200, n_train=n_train, n_train_full=50_000, full=full, words=words, metric='accuracy', method=method, baseline=baseline,
                controls=list(controls), runs={n: [r['key'] for r in runs if r['method'] == n] for n in best}, loading_share=.034, seconds_per_epoch=10., full_hours=2.5, full_hours_of_all=30., platform='somewhere', **more),runs

def reproduction(*made, failures=()): return Reproduction([o for o,_ in made], [r for _,runs in made for r in runs], failures)
def only(*args, **kwargs): return reproduction(ran(*args, **kwargs)).table.iloc[0]

BASE = [.69, .70, .71]
T2,T3 = 4.302653,3.182446   # Student's t, two-sided 95 %, 2 and 3 degrees of freedom


# ---------------------------------------------------------------- intervals and signs

def test_t_interval():
    low,high = t_interval(72., .2, 3)
    half = T2*.2/math.sqrt(3)
    assert abs(low-(72-half)) < 1e-5 and abs(high-(72+half)) < 1e-5
    for sd,n in ((.2, 1), (.2, math.nan), (math.nan, 3)): assert all(map(math.isnan, t_interval(72., sd, n)))

@pytest.mark.parametrize('difference,said', [((1., -.1, 2.1), 'yes'), ((1., 0., 2.), 'yes'), ((1., .1, 1.9), 'no'), ((-1., -1.9, -.1), 'no'),
                                             ((1., math.nan, math.nan), 'not shown')])
def test_compatible_is_an_interval_that_holds_zero(difference, said): assert compatible(difference) == said

@few
@given(st.lists(st.floats(60, 80), min_size=2, max_size=6), st.lists(st.floats(60, 80), min_size=2, max_size=6))
def test_the_interval_to_a_printed_mean_is_welchs(ours, paper):
    if np.std(ours) < 1e-3 or np.std(paper) < 1e-3: return
    printed,own = ((np.mean(values), np.std(values, ddof=1), len(values)) for values in (paper, ours))
    expected = stats.ttest_ind(ours, paper, equal_var=False).confidence_interval(.95)
    assert from_paper(printed, own) == pytest.approx((np.mean(ours)-np.mean(paper), expected.low, expected.high), rel=1e-6, abs=1e-9)

def test_a_printed_number_without_spread_is_held_for_the_mean_of_runs_that_scatter_like_ours():
    "An independent form: Student's interval of a new mean of m runs, which covers it in 95 % of cases"
    low,high = from_paper((72., math.nan, 3), (72., .5, 4))[1:]
    assert (low, high) == pytest.approx((-T3*.5*math.sqrt(1/4+1/3), T3*.5*math.sqrt(1/4+1/3)), rel=1e-5)
    rng = np.random.default_rng(0)
    for runs,stated in ((1, math.nan), (3, 3)):
        ours,paper = rng.normal(size=(2000, 4)),rng.normal(size=(2000, runs)).mean(1)
        held = [compatible(from_paper((p, math.nan, stated), (o.mean(), o.std(ddof=1), 4))) == 'yes' for p,o in zip(paper, ours)]
        assert .93 < np.mean(held) < .97

def test_a_true_difference_of_a_point_is_no_longer_called_agreement():
    "Overlap of two intervals of three runs, sd .3, took it for agreement in most cases; Welch's interval rarely"
    rng = np.random.default_rng(0)
    ours,paper = rng.normal(71, .3, (1000, 3)),rng.normal(70, .3, (1000, 3))
    def three(values): return values.mean(),values.std(ddof=1),3
    found = [compatible(from_paper(three(p), three(o))) for o,p in zip(ours, paper)]
    def overlap(a, b): return a[0] <= b[1] and b[0] <= a[1]
    before = np.mean([overlap(t_interval(*three(p)), t_interval(*three(o))) for o,p in zip(ours, paper)])
    after = found.count('yes')/len(found)
    assert before > .6 and after < .3 and after < before/2

@pytest.mark.parametrize('paper,low,high,said', [(1., .1, .5, 'same'), (-1., -.5, -.1, 'same'), (1., -.5, -.1, 'opposite'), (-1., .1, .5, 'opposite'), (1., -.1, .5, 'not shown'), (0., .1, .5, 'not shown'),
                                                 (math.nan, .1, .5, 'not shown'), (1., math.nan, math.nan, 'not shown'), (1., 0., .5, 'not shown')])
def test_same_sign(paper, low, high, said): assert same_sign(paper, low, high) == said

@pytest.mark.parametrize('id,gain,source', [
    ('p/T1/net/KD', 2.1, 'printed'), ('p/T1/net/LSR', -.5, 'value − baseline'), ('p/T1/net/KD/short', 1., 'value − baseline'), ('p/T2/net/KD', -.4, 'printed'), ('p/T4/net/KD', 1., 'value − baseline'),
    ('e/T1/net/Replay', 1., 'value − baseline'), ('e/T1/net/SD', 1.5, 'printed'), ('p/T3/alone/KD', math.nan, ''), ('p/T1/net/baseline', math.nan, '')])
def test_paper_gain(id, gain, source):
    value,where = paper_gain(next(r for r in ROWS if r.id == id))
    assert where == source and (value == gain or math.isnan(value) and math.isnan(gain))

def test_reported():
    assert reported('p') == ('best', 3.)
    epoch,n = reported('e')
    assert epoch == 'last' and math.isnan(n)


# ---------------------------------------------------------------- rows

def test_every_number_of_a_row():
    row = only('p/T1/net/KD', {'net baseline': BASE, 'teacher': [.8, .8, .8], 'KD': [.712, .721, .739], 'LS': [.70, .70, .71], 'CE': [.705, .715, .725]}, controls=['LS', 'CE'])
    close = lambda a, b: abs(a-b) < 1e-4
    values = [71.2, 72.1, 73.9]
    sd = math.sqrt(sum((v-72.4)**2 for v in values)/2)
    assert (row.metric, row.epoch, row.paper, row.paper_sd, row.paper_runs, row.seeds, row.full, row.scale) == ('accuracy', 'best', 72., .2, 3, 3, True, 'full')
    assert close(row.paper_low, 72-T2*.2/math.sqrt(3)) and close(row.paper_high, 72+T2*.2/math.sqrt(3))
    assert close(row.ours, 72.4) and close(row.ours_sd, sd) and close(row.ours_low, 72.4-T2*sd/math.sqrt(3)) and close(row.ours_high, 72.4+T2*sd/math.sqrt(3))
    diffs = [2.2, 2.1, 2.9]   # seed by seed, to the baseline
    spread = math.sqrt(sum((d-2.4)**2 for d in diffs)/2)
    assert close(row.gain, 2.4) and close(row.gain_low, 2.4-T2*spread/math.sqrt(3)) and close(row.gain_high, 2.4+T2*spread/math.sqrt(3))
    assert (row.paper_gain, row.paper_gain_from, row['sign'], row.compatible) == (2.1, 'printed', 'same', 'yes')
    over = [.7, .6, 1.4]   # to CE, the better of the controls
    spread = math.sqrt(sum((d-.9)**2 for d in over)/2)
    assert row.control == 'CE' and close(row.control_gain, .9) and close(row.control_low, .9-T2*spread/math.sqrt(3)) and close(row.control_high, .9+T2*spread/math.sqrt(3))
    assert (row.full_hours, row.all_hours, row.loading_share) == (2.5, 30., .034)

def test_an_error_rate_of_the_last_epoch():
    best = {'net baseline': [.9]*4, 'Replay': [.9]*4}
    row = only('e/T1/net/Replay', best, method='Replay', last={'net baseline': [.700, .702, .698, .700], 'Replay': [.711, .709, .713, .711]})
    sd = math.sqrt((.2**2+.2**2)/3)
    assert row.epoch == 'last' and abs(row.ours-28.9) < 1e-6 and abs(row.ours_sd-sd) < 1e-4 and abs(row.ours_low-(28.9-T3*sd/2)) < 1e-4
    assert math.isnan(row.paper_low) and row.compatible == 'yes', 'a single run like ours'
    assert abs(row.gain-1.1) < 1e-6 and row.paper_gain == 1. and row['sign'] == 'same', 'fewer errors are a gain'

@pytest.mark.parametrize('accs,agree', [([.695, .700, .705], 'no'), ([.719, .720, .721], 'yes'), ([.70, .72, .74], 'yes'), ([.72], 'not shown')])
def test_full_runs_are_compatible_by_the_interval_of_the_difference(accs, agree): assert only('p/T1/net/KD', {'net baseline': BASE, 'KD': accs}).compatible == agree

def test_without_a_printed_spread_ours_is_taken_for_it():
    for accs,agree in (([.694, .695, .696], 'yes'), ([.689, .690, .691], 'no')): assert only('p/T1/net/LSR', {'net baseline': BASE, 'LSR': accs}, method='LSR').compatible == agree

def test_shrunk_runs_are_not_compared_by_value():
    accs = {'net baseline': BASE, 'KD': [.710, .720, .731]}   # as good as the paper's
    row = only('p/T1/net/KD', accs, full=False, n_epoch=10, n_train=2500, words='10 of 200 epochs, 2,500 of 50,000 images')
    assert row.compatible is None and row['sign'] == 'same' and row.scale == '10 of 200 epochs, 2,500 of 50,000 images'
    rep = reproduction(ran('p/T1/net/KD', accs, full=False))
    assert rep.shown.result.tolist() == ['shrunk: same sign'] and 'compatible' not in rep.headline and '1 same sign' in rep.headline

def test_other_images_are_never_full():
    row = only('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}, data='digits')
    assert row.compatible is None and not row.full and row.scale == 'all of it, digits for cifar100'
    assert only('p/T1/net/KD', {'net baseline': BASE, 'KD': BASE}, data='digits', full=False, words='digits instead of cifar100').scale == 'digits instead of cifar100'

def test_a_gain_is_compared_with_a_gain():
    row = only('p/T2/net/KD', {'net baseline': BASE, 'KD': [.688, .695, .704]})   # -.2, -.5, -.6
    sd = math.sqrt((.2333**2+.0667**2+.1667**2)/2)
    assert row.paper == -.4 and abs(row.ours+.4333) < 1e-3 and abs(row.ours_sd-sd) < 1e-3 and row.compatible == 'yes'

def test_a_baseline_has_no_gain():
    row = only('p/T1/net/baseline', {'net baseline': [.699, .70, .701]}, method='net baseline')
    assert row.compatible == 'yes' and math.isnan(row.gain) and row.control == '' and row['sign'] == 'not shown'

def test_seeds_are_paired():
    made = ran('p/T1/net/KD', {'net baseline': [.60, .70, .80], 'KD': [.61, .72, .81]})
    del made[0]['runs']['net baseline'][1]   # was not finished
    row = reproduction(made).table.iloc[0]
    assert row.seeds == 3 and abs(row.gain-1.) < 1e-6 and row.gain_high-row.gain_low < 4, 'seeds 0 and 2: one point each'
    assert row.gain_low < 0 < row.gain_high, 'two seeds that gain one image of a hundred are no proof'

def test_one_seed_shows_nothing():
    rep = reproduction(ran('p/T1/net/KD', {'net baseline': [.70], 'KD': [.72]}))
    row = rep.table.iloc[0]
    assert row.compatible == 'not shown' and row['sign'] == 'not shown' and abs(row.gain-2.) < 1e-6 and math.isnan(row.gain_low)
    assert any('two seeds' in o for o in rep.notes) and rep.shown.ours.iloc[0] == '72.00, 1 seed'

def test_a_diverged_run_shows_nothing():
    made = ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]})
    made[1][-1]['best']['accuracy'] = None
    rep = reproduction(made)
    assert rep.table.compatible.tolist() == ['not shown'] and math.isnan(rep.table.ours[0]) and rep.shown.ours.iloc[0].startswith('–')

def test_top5_needs_top5():
    made = ran('p/T4/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]})
    rep = reproduction(made)
    assert math.isnan(rep.table.ours[0]) and rep.table.compatible[0] == 'not shown' and any('top-5' in o for o in rep.notes)
    for r,a in zip(made[1][3:], (.90, .905, .895)): r['best']['accuracy5'] = a
    assert abs(reproduction(made).table.ours[0]-90.) < 1e-9

def test_a_missing_control_or_baseline():
    row = only('p/T1/net/KD', {'KD': [.71, .72, .73]}, controls=['LS'])
    assert math.isnan(row.gain) and row.control == '' and row.compatible == 'yes'

def test_more_seeds_later_are_one_row():
    first = ran('p/T1/net/KD', {'net baseline': BASE[:1], 'KD': [.71]}, mark='')
    record,runs = ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}, mark='')
    rep = reproduction(first, ({**record, 'key': 'later', 'full_hours': 3.}, runs[1:3]+runs[4:]))
    assert len(rep.table) == 1 and rep.table.seeds[0] == 3 and rep.table.full_hours[0] == 3. and abs(rep.table.gain[0]-2.) < 1e-6

def test_scales_are_rows_of_their_own():
    made = [ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}, full=n == 200, n_epoch=n, mark=str(n)) for n in (200, 10)]
    assert reproduction(*made).table.full.tolist() == [True, False]

def test_nothing_to_show():
    with pytest.raises(ValueError, match='no record'): Reproduction([], [])


# ---------------------------------------------------------------- what is said

@pytest.fixture
def several():
    failures = [dict(run='KD/seed7/abc', recipe='p/T1/net/KD', name='KD', seed=7, error='RuntimeError: <out> of memory')]
    return reproduction(ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}), ran('p/T1/net/LSR', {'net baseline': BASE, 'LSR': [.599, .60, .601]}, method='LSR'),
        ran('p/T3/alone/KD', {'net baseline': BASE[:1], 'KD': [.6]}), ran('e/T1/net/Replay', {'net baseline': BASE, 'Replay': [.66, .67, .68]}, method='Replay', full=False, words='10 of 200 epochs'),
        ran('e/T1/net/SD', {'net baseline': BASE, 'SD': [.72, .73, .74]}, method='SD', full=False, words='5 of 200 epochs'), failures=failures)

def test_gains_between_runs_that_were_not_trained_alike_have_a_note():
    record,runs = ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73], 'CE': [.70, .71, .72]}, controls=['CE'])
    rep = reproduction((record, [{**r, 'processor': 'one' if r['method'] == 'net baseline' else 'two'} for r in runs]))
    assert 'KD against net baseline: processor two against one. A gain may come from that.' in rep.notes and not any('CE' in words for words in rep.notes)

def test_shown(several):
    shown = several.shown
    assert shown.result.tolist() == ['compatible, +0.00 [-2.36, +2.36]', 'apart, -9.50 [-10.00, -9.00]', 'not shown, +0.00', 'shrunk: opposite sign', 'shrunk: same sign']
    assert shown.paper.tolist() == ['72.00 ± 0.20, 3 runs [71.50, 72.50]', '69.50, no interval printed', '60.00, no interval printed', '29.00, no interval printed', '28.00, no interval printed']
    assert shown["paper's gain"].tolist() == ['+2.10', '-0.50 (computed)', '–', '+1.00 (computed)', '+1.50']
    assert shown['our gain'].tolist()[:3] == ['+2.00 [+1.50, +2.50]', '-10.00 [-12.24, -7.76]', '-9.00']
    assert shown['a full run'].tolist() == ['2.5 h (30.0 h)']*5 and shown.loading.tolist() == ['3.4 %']*5 and shown.scale.tolist()[3:] == ['10 of 200 epochs', '5 of 200 epochs']
    assert several.headline == 'At full scale (3): 1 compatible, 1 apart, 1 not shown. Compatible means that a difference of 2.36 points would not have been seen. Shrunk (2), where only the sign of the gain is compared: 1 same sign, 1 opposite sign. Intervals cover what differs between seeds, not another split of the data.'

def test_notes(several):
    assert several.notes[:3] == ['The paper contradicts itself: 72.00 - 70.00 is +2.00, printed +2.10.', 'Read | from a figure.', 'Not stated: The temperature is missing.']
    assert several.shown.notes.tolist()[:2] == ['1, 2', '3, 4'] and several.shown.notes.tolist()[3] == ''

def test_a_note_of_several_rows_is_said_once():
    rep = reproduction(*[ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}, n_epoch=n, mark=str(n)) for n in (200, 100)])
    assert len(rep.notes) == 2 and rep.shown.notes.tolist() == ['1, 2', '1, 2']

def test_markdown(several):
    lines = several.to_markdown().splitlines()
    table = [o for o in lines if o.startswith('|')]
    cells = [re.split(r'(?<!\\)\|', o)[1:-1] for o in table]
    assert len(table) == 2+5 and {len(o) for o in cells} == {len(several.shown.columns)+1} and [c[0].strip() for c in cells[2:]] == several.table.recipe.tolist()
    text = '\n'.join(lines)
    assert several.headline in text and '1. The paper contradicts itself' in text and 'KD/seed7/abc failed: RuntimeError' in text and several.caption in text

class Checker(HTMLParser):
    "Tags closed in order, and the cells that tell the result"
    void = {'meta', 'link', 'line', 'path', 'rect', 'use', 'wbr', 'br'}
    def __init__(self, html):
        super().__init__()
        self.stack,self.cells,self.ids,self.text = [],[],[],[]
        self.feed(html)
        self.close()
        assert self.stack == []
    def handle_starttag(self, tag, attrs):
        if tag not in self.void: self.stack.append((tag, dict(attrs).get('class') or ''))
        self.ids += [v for k,v in attrs if k == 'id']
        assert not any(k in ('src', 'onclick') or k == 'href' and v[0] not in '#d' for k,v in attrs)
    def handle_startendtag(self, tag, attrs): pass
    def handle_endtag(self, tag):
        if tag in self.void: return
        assert self.stack.pop()[0] == tag
    def handle_data(self, data):
        self.text.append(data)
        if self.stack and self.stack[-1][0] == 'td' and 'verdict' in self.stack[-1][1]: self.cells.append((self.stack[-1][1].split()[1], data))

def test_colours_and_words(several):
    for html in (several.html(), several._repr_html_()):
        assert Checker(html).cells == [('yes', 'compatible, +0.00 [-2.36, +2.36]'), ('no', 'apart, -9.50 [-10.00, -9.00]'), ('open', 'not shown, +0.00'), ('no', 'shrunk: opposite sign'), ('yes', 'shrunk: same sign')]
        assert '<out>' not in html and 'Read | from' in html
    assert '&lt;out&gt; of memory' in several.html()

def contrast(a, b):
    "WCAG 2's ratio of luminances"
    def light(c): return sum(w*((v/255/12.92) if v <= 10 else ((v/255+.055)/1.055)**2.4) for w,v in zip((.2126, .7152, .0722), c))
    hi,lo = sorted((light(a), light(b)), reverse=True)
    return (hi+.05)/(lo+.05)

@pytest.mark.parametrize('background,text', [((255, 255, 255), (0x1c, 0x21, 0x27)), ((0x14, 0x18, 0x1d), (0xe4, 0xe8, 0xec)), ((255, 255, 255), (0, 0, 0)), ((0x11, 0x11, 0x11), (255, 255, 255))])
def test_words_can_be_read_on_their_colours(several, background, text):
    tints = re.findall(r'td\.(yes|no|open) +\{ background: rgba\((\d+), (\d+), (\d+), ([.\d]+)\)', several.html())
    assert [o[0] for o in tints] == ['yes', 'no', 'open']
    for _,*rgb,a in tints:
        mixed = [float(a)*int(c)+(1-float(a))*b for c,b in zip(rgb, background)]
        assert contrast(mixed, text) > 7

def test_dots(several):
    gains = several.gains
    assert gains.recipe.tolist() == ['p/T1/net/KD', 'p/T1/net/LSR', 'e/T1/net/Replay', 'e/T1/net/SD'] and gains.colour.tolist() == ['yes', 'no', 'no', 'yes']
    assert abs(gains.paper_half.iloc[0]-T2*.2/math.sqrt(3)) < 1e-4 and (gains.paper_half.iloc[1:] == 0).all()
    dots = re.findall(r'<g><title>([^:]*): paper [^<]*</title><path d="M[^"]*z" transform="translate\([^)]*\)" '
                      r'style="fill:var\(--(\w+)\);stroke:var\(--(\w+)\)[^"]*" /></g>', several.html())
    assert dots == [('p/T1/net/KD', 'k0', 'k0'), ('p/T1/net/LSR', 'k1', 'k1'),
                    ('e/T1/net/Replay', 'bg', 'k1'), ('e/T1/net/SD', 'bg', 'k0')], 'the shrunk ones are hollow'
    ax = several.plot()
    dots = {tuple(np.round((*o.get_xdata(), *o.get_ydata()), 6)) for o in ax.lines if o.get_marker() == 'o'}
    assert dots == {(2.1, 2.), (-.5, -10.), (1., -3.), (1.5, 3.)}
    assert [tuple(o.get_xy1()) for o in ax.lines if hasattr(o, 'get_slope') and o.get_slope() == 1] == [(0, 0)], 'the diagonal'

def test_a_page_without_gains():
    rep = reproduction(ran('p/T1/net/baseline', {'net baseline': BASE}, method='net baseline'))
    assert '<svg' not in rep.html() and Checker(rep.html()).cells == [('yes', 'compatible, +0.00 [-4.97, +4.97]')]


# ---------------------------------------------------------------- files

def write(folder, made, failures=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name,rows in (('recipes.jsonl', [made[0]]), ('results.jsonl', made[1]), ('failures.jsonl', failures)):
        if rows: (folder/name).write_text(''.join(json.dumps(o)+'\n' for o in rows))

def test_read_from_folders(tmp_path):
    a,b = ran('p/T1/net/KD', {'net baseline': BASE, 'KD': [.71, .72, .73]}),ran('p/T1/net/LSR', {'net baseline': BASE, 'LSR': [.69, .7, .7]}, method='LSR')
    fail = lambda run, why: dict(key=f'{run}/{why}', run=run, recipe='p/T1/net/KD', error=why)
    write(tmp_path/'a', a, [fail('lost', 'first'), fail('lost', 'second'), fail(a[1][0]['key'], 'mended since')])
    write(tmp_path/'b'/'deep', b)
    rep = Reproduction(tmp_path)
    assert rep.table.recipe.tolist() == ['p/T1/net/KD', 'p/T1/net/LSR'] and rep.table.equals(reproduction(a, b).table)
    assert [(o['run'], o['error']) for o in rep.failures] == [('lost', 'second')]
    for o in (tmp_path/'a'/'results.jsonl', [tmp_path/'a'], str(tmp_path/'a'/'recipes.jsonl')): assert Reproduction(o).table.recipe.tolist() == ['p/T1/net/KD']

def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'): Reproduction(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no recipes.jsonl'): Reproduction(tmp_path)
    assert not has_recipes(tmp_path)
    write(tmp_path, ran('p/T1/net/KD', {'net baseline': [], 'KD': []}))
    assert has_recipes(tmp_path) and Reproduction(tmp_path).table.seeds.tolist() == [0] and Reproduction(tmp_path).table.compatible.tolist() == ['not shown']

def test_save(several, tmp_path):
    page = several.save(tmp_path/'new')
    assert page == tmp_path/'new'/'reproduction.html' and sorted(o.name for o in page.parent.iterdir()) == ['reproduction.csv', 'reproduction.html', 'reproduction.md']
    text = page.read_text()
    found = Checker(text)
    assert found.ids.count('reproduction') == 1 and text.count('<main>') == 1 and text.index('id="reproduction"') < text.index('id="s0"') and len(found.ids) == len(set(found.ids))
    assert page.with_suffix('.md').read_text() == several.to_markdown()
    table = pd.read_csv(page.with_suffix('.csv'))
    assert list(table.columns) == list(several.table.columns) and table.compatible.fillna('').tolist() == ['yes', 'no', 'not shown', '', ''] and np.allclose(table.ours, several.table.ours)

def test_write_beside(several, tmp_path):
    assert several.write(tmp_path/'report.html', several.runs[:1]) == tmp_path/'report.html'
    assert sorted(o.name for o in tmp_path.iterdir()) == ['report.csv', 'report.html', 'report.md'] and '1 run of 1 method' in (tmp_path/'report.html').read_text()
    with pytest.raises(ValueError, match='page must be an HTML file'): several.write(tmp_path/'report.csv')
