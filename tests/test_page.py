"""The HTML report: its numbers against SciPy and NumPy loops, its tags, what it loads, and what records can do to it"""
import csv, json, math, re
from html import unescape
from html.parser import HTMLParser

import numpy as np, pandas as pd, pytest, torch
from scipy import stats

import matplotlib
matplotlib.use('agg')
from fastcore.xml import B, P, to_xml
from matplotlib import pyplot as plt

from fastkdtf.lab.draw import Look, draw_curves, house_style, note, palette, panel, round_ticks, spread, strips, style_sheet
from fastkdtf.lab.interpret import evaluate
from fastkdtf.lab.page import failures, headline, pooled_reliability, report_html, write_report
from fastkdtf.lab.report import Comparison, comparisons, csv_safe, read_runs
from fastkdtf.lab.runs import Ledger

void = set('meta link br hr img input'.split())

class Page(HTMLParser):
    "Tags must balance; collects attributes and text"
    def __init__(self, html):
        super().__init__()
        self.open,self.tags,self.words,self.css = [],[],[],''
        self.feed(html)
        self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:])
        self.open.pop()
    def handle_data(self, data):
        if self.open and self.open[-1] == 'style': self.css += data
        elif data.strip(): self.words.append(data.strip())
    @property
    def text(self): return ' '.join(self.words)
    def all(self, tag, css=None): return [a for t,a in self.tags if t == tag and (css is None or css in (a.get('class') or '').split())]
    def labels(self, start): return [a['aria-label'] for t,a in self.tags if (a.get('aria-label') or '').startswith(start)]

def record(method, seed, acc=.5, rank=0, control_for=(), setting='digits, resnet8: 2 epochs', bins=None, seconds=1., **kwargs):
    bins = bins or [[10., .05*i, .04*i] for i in range(15)]
    last = dict(accuracy=acc, nll=1., ece=.02, reliability=bins)
    return {**dict(key=f'{setting}/{method}/{seed}', method=method, rank=rank, seed=seed, control_for=list(control_for), baseline='baseline', setting=setting, settings=dict(n_epoch=2, lr=None),
        callbacks=[], evaluated_on='test', last=last, best=dict(accuracy=acc), seconds_per_epoch=seconds, history=dict(train_loss=[2., 1.], valid_loss=[2., 1.5], accuracy=[.3, acc]),
        torch='2.6.0', commit='abc123', dirty=False, date=f'2026-01-0{1+seed%9}T00:00:00+00:00'), **kwargs}

accs = {'baseline': [.90, .91, .93, .92], 'A': [.93, .94, .955, .95], 'A control': [.91, .918, .94, .93], 'B': [.90, .93, .92, .91], 'C': [.80, .82, .83, .82]}
def study(**kwargs):
    return [record(m, s, a, i, ['A'] if m == 'A control' else [], seconds=1+.1*i+.01*s*i, **kwargs) for i,(m,v) in enumerate(accs.items()) for s,a in enumerate(v)]

def shapes(svg):
    "Words and places of the marks in a drawing, and the ends of its lines by colour and width"
    marks = [(title, float(x), float(y)) for x,y,title in re.findall(r'transform="translate\(([-.\d]+) ([-.\d]+)\)" style="[^"]*"><title>([^<]*)</title>', svg)]
    paths = re.findall(r'<path d="(M[-.\d ]+L[-.\d ]+)" style="([^"]*)"', svg)
    lines = [(style, [tuple(map(float, o.split())) for o in re.split('[ML]', d)[1:]]) for d,style in paths]
    return marks,lines

def line(lines, *style):
    "The one line whose style has these words"
    found, = [places for s,places in lines if all(o in s for o in style)]
    return found

def interval(a, b):
    d = np.array(a)-np.array(b)
    i = stats.ttest_rel(a, b).confidence_interval(.95)
    return f'{100*d.mean():+.2f} points [{100*i.low:+.2f}, {100*i.high:+.2f}]'


# ---------------------------------------------------------------- numbers

def test_differences_are_scipys():
    page = Page(report_html(study()))
    for a,b in (('A', 'A control'), ('A', 'baseline'), ('A control', 'baseline'), ('B', 'baseline'), ('C', 'baseline')):
        label, = page.labels(f'{a} minus {b},')
        assert label.endswith(interval(accs[a], accs[b]))
        assert ('its matched control' in label) == (b == 'A control')
    assert not page.labels('B minus A') and not page.labels('baseline minus')

def test_marks_are_where_the_values_are():
    html = report_html(study())
    row = re.search(r'<svg role="img" aria-label="A: mean 94.38 %.*?</svg>', html).group()
    marks,lines = shapes(row)
    at = {float(re.fullmatch(r'A, seed \d: ([\d.]+) %', title)[1]): x for title,x,_ in marks}
    assert sorted(at) == [93., 94., 95., 95.5] and len({y for *_,y in marks}) == 1
    slope,start = np.polyfit([*at], [*at.values()], 1)
    for v,x in at.items(): assert start+slope*v == pytest.approx(x, abs=.02)
    mean = line(lines, 'stroke:var(--k0)', 'stroke-width:3')
    assert [x for x,_ in mean] == pytest.approx([start+slope*100*np.mean(accs['A'])]*2, abs=.02)
    base = line(lines, 'stroke:var(--zero)')
    assert base[0][0] == pytest.approx(start+slope*100*np.mean(accs['baseline']), abs=.02)
    ticks = {float(v): float(x) for x,v in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.]+)</text>', html.split('class="ticks"')[1].split('</svg>')[0])}
    assert len(ticks) > 2
    for v,x in ticks.items(): assert start+slope*v == pytest.approx(x, abs=.05)   # of 560
    box = [float(o) for o in re.search(r'viewBox="([^"]*)"', row)[1].split()]
    assert box == [0, 24, 560, 24] and all(box[1] < y < box[1]+box[3] for *_,y in marks), 'the second row is cut out of the chart'

def test_interval_reaches_as_far_as_it_says():
    html = report_html(study())
    row = re.search(r'<svg role="img" aria-label="A minus baseline.*?</svg>', html).group()
    _,lines = shapes(row)
    zero,(x0,x1) = line(lines, 'stroke:var(--zero)')[0][0],[x for x,_ in line(lines, 'stroke:var(--k0)', 'stroke-width:2.5')]
    i = stats.ttest_rel(accs['A'], accs['baseline']).confidence_interval(.95)
    assert (x0-zero)/(x1-zero) == pytest.approx(i.low/i.high, abs=.01)

def test_table_is_the_comparisons():
    c = Comparison(study())
    page = Page(report_html(c))
    for name,row in c.shown.iterrows():
        assert name in page.words
        for v in row: assert not str(v) or str(v) in page.words
    assert len(page.all('tr')) == 1+len(accs)

def test_curves_are_means_over_seeds():
    history = lambda a: dict(train_loss=[3., 2., 1.], valid_loss=[3., 2., a], accuracy=[.1, .2, a])
    records = [record('baseline', 0, history=history(.3)), record('baseline', 1, history=history(.5)), record('A', 0, rank=1, history=history(.9)), record('A', 1, rank=1, history=history(.8))]
    html = report_html(records)
    label, = Page(html).labels('validation accuracy')
    assert 'baseline 40' in label and 'A 85' in label
    panel = html[html.index('aria-label="validation accuracy'):].split('</figure>')[0]
    ys = {n: [float(o.split()[1]) for o in re.split('[ML]', d)[1:]] for n,d in re.findall(r'<g><title>(\w+)</title><path d="([^"]*)"', panel)}
    assert set(ys) == {'baseline', 'A'}
    assert ys['baseline'][:2] == ys['A'][:2]
    assert (ys['A'][0]-ys['A'][2])/(ys['A'][0]-ys['A'][1]) == pytest.approx(75/10, rel=.03)
    assert (ys['baseline'][0]-ys['baseline'][2])/(ys['A'][0]-ys['A'][1]) == pytest.approx(30/10, rel=.03)

def test_pooled_bins_are_those_of_all_predictions():
    g = torch.Generator().manual_seed(0)
    parts = [(3*torch.randn(n, 5, generator=g), torch.randint(5, (n,), generator=g)) for n in (200, 330)]
    whole = evaluate(torch.cat([z for z,_ in parts]), torch.cat([y for _,y in parts]))['reliability']
    found = pooled_reliability([dict(last=evaluate(z, y)) for z,y in parts])
    np.testing.assert_allclose(found, whole, atol=1e-6)

def test_reliability_bars():
    bins = [[0., 0., 0.]]*12 + [[10., .85, .5], [30., .9, .8], [60., .97, 1.]]
    last = lambda e: dict(accuracy=.8, nll=1., ece=e, reliability=bins)
    html = report_html([record('baseline', 0, last=last(.1)), record('baseline', 1, last=last(.2))])
    assert 'ECE 15.00 %' in html and Page(html).labels('Reliability of baseline, ECE 15.00 %')
    outlines = re.findall(r'<title>confidence [^<]*</title><path d="([^"]*)"', html)
    bars = [[float(o.split()[1]) for o in re.split('[ML]', d.removesuffix(' z'))[1:]] for d in outlines]
    heights = [max(ys)-min(ys) for ys in bars]
    assert len(heights) == 3 and heights[0]/heights[2] == pytest.approx(.5, abs=.01) and heights[1]/heights[2] == pytest.approx(.8, abs=.01)
    assert 'confidence 0.80 to 0.87: 20 predictions, mean confidence 0.850, accuracy 0.500' in html

def test_cost():
    page = Page(report_html(study()))
    label, = page.labels('Cost against gain')
    ratio = np.mean([1+.3+.01*s*3 for s in range(4)])
    assert f'B {ratio:.2f} times the time, {100*(np.mean(accs["B"])-np.mean(accs["baseline"])):+.2f} points' in label and 'baseline ' not in label


# ---------------------------------------------------------------- what it says

def test_headline():
    first,*rest = headline(Comparison(study()))
    assert first.endswith(': A (1 of 3).')
    says = {o.split()[0]: o for o in rest}
    assert says['A'].startswith('A is ahead of A control') and interval(accs['A'], accs['A control']) in says['A'] and interval(accs['A'], accs['baseline']) in says['A']
    assert says['C'].startswith('C is behind baseline') and says['No'].startswith('No difference is shown between B and baseline')
    assert rest[3:] == ['Held against baseline only, as no other control was run: B, C.', Comparison(study()).covers]   # the control is not judged

def test_ahead_of_the_baseline_only():
    records = [r for m,v in (('baseline', [.90, .91, .92]), ('A', [.92, .93, .941]), ('control', [.93, .92, .94])) for r in [record(m, s, a, control_for=['A'] if m == 'control' else []) for s,a in enumerate(v)]]
    first,second,_ = headline(Comparison(records))
    assert first.endswith('none (0 of 1).')
    assert second.startswith('A is ahead of baseline') and 'no difference is shown to control' in second

def test_one_seed():
    records = [r for r in study() if r['seed'] == 0]
    found = headline(Comparison(records))
    assert 'none (0 of 3)' in found[0] and 'nothing here can be told from chance' in found[-1]
    page = Page(report_html(records))
    assert page.labels('A minus baseline')[0].endswith('+3.00 points')
    assert 'stroke-width:2.5' not in report_html(records) and 'stroke-width:2.5' in report_html(study())
    assert 'nan' not in page.text.lower()

def test_missing_control_and_baseline():
    only = [r for r in study() if r['method'] in ('A', 'B')]
    assert 'no run of baseline' in ' '.join(headline(Comparison(only))) and 'nan' not in Page(report_html(only)).text
    page = Page(report_html([r for r in study() if r['method'] != 'A control']))
    assert page.labels('A minus baseline') and not page.labels('A minus A control')
    assert headline(Comparison([record('baseline', 0)]))[0].startswith('There is no method')
    Page(report_html([record('baseline', 0)]))
    lost = [record('baseline', 0), record('A', 1, rank=1)]
    assert 'A: no run with seed 0.' in failures(Comparison(lost)) and Page(report_html(lost))

def test_diverged_runs_are_named():
    nan_last = dict(accuracy=None, nll=None, ece=None, reliability=[[0, None, None]]*15)
    gone = dict(train_loss=[2., None], valid_loss=[None, None], accuracy=[.1, None])
    records = study() + [record('D', 0, .1, 5, last=dict(accuracy=.1, nll=None, ece=None, reliability=[[10., .1, .1]]*15)), record('D', 1, 5, last=nan_last, best=dict(accuracy=None), history=gone)]
    assert failures(Comparison(records))[:2] == ['D, seed 0: diverged, its loss is not a number (accuracy 10.00 %, which the table counts).', 'D, seed 1: diverged, its loss is not a number.']
    assert not failures(Comparison(study()))
    c = Comparison(records)
    assert len(c.diverged) == 2 and all(said in repr(c) and said in c._repr_html_() for said in c.diverged)
    unwritten = Comparison(study() + [record('D', 0, math.inf, 5, last=dict(accuracy=math.inf, nll=math.inf, ece=.1))])   # the ledger writes null
    assert failures(unwritten)[0] == 'D, seed 0: diverged, its loss is not a number.' and any(o.startswith('D cannot') for o in headline(unwritten))
    assert any(o.startswith('D cannot be judged') for o in headline(Comparison(records)))
    page = Page(report_html(records))
    assert 'D, seed 1: diverged, its loss is not a number.' in page.words
    for t,a in page.tags:   # nothing is drawn at a place that is not a number
        for k in ('x', 'y', 'd', 'transform', 'viewbox', 'width', 'height'): assert not re.search('nan|inf', a.get(k) or ''), (t, a)

def test_a_loss_that_explodes_does_not_flatten_the_others():
    boom = dict(train_loss=[2., 1e9], valid_loss=[2., 1e12], accuracy=[.3, .1])
    page = Page(report_html(study() + [record('D', 0, .1, 5, history=boom)]))
    assert 'validation loss (cut)' in page.words

def test_histories_of_other_lengths():
    twice = [record('twice', s, rank=6, history=dict(train_loss=[2.]*4, valid_loss=[2.]*4, accuracy=[.5]*4)) for s in (0, 1)] + [record('none', 0, rank=7, history={})]
    Page(report_html(study()+twice))
    assert Comparison(twice).plot_curves() is not None

def test_description_and_callbacks():
    described = record('A', 0, rank=1, description=[['hard term', '0.9 · H(q, p)'], ['note', 'a <note>']])
    called = record('B', 0, rank=2, callbacks=[dict(callback='LsrKD', alpha=.1, tau=3., gamma=None)])
    old = record('C', 0, rank=3)
    del old['callbacks'], old['settings']
    text = Page(report_html([record('baseline', 0), described, called, old])).text
    for o in ('0.9 · H(q, p)', 'a <note>', 'alpha = 0.1, tau = 3, gamma = None', 'none: the loss of the learner', 'not recorded'): assert o in text, o

def test_methods_that_were_not_trained_alike_are_marked_with_a_footnote():
    plain = Page(report_html(study()))
    page = Page(report_html([{**r, 'torch': '2.7.0'} if r['method'] == 'A' else r for r in study()]))
    said = [words for words in page.words if words.startswith('[1] ')]
    assert len(said) == 1 and said[0].startswith('[1] A against A control and A against baseline: torch 2.7.0 against 2.6.0.')
    assert page.words.count('[1]') == 3 and 'Not trained alike' in page.text   # A, its control and the baseline
    assert '[1]' not in plain.text and 'Not trained alike' not in plain.text

def test_settings_and_versions():
    records = study()
    records[0].update(commit='def456', dirty=True)
    records[3]['device'] = 'cuda'
    text = Page(report_html(records)).text
    for o in ('epochs', 'learning rate', 'abc123 (19 runs)', 'def456 (1 runs)', 'yes (1 runs)', '2026-01-01T00:00:00+00:00 to 2026-01-04T00:00:00+00:00', '2.6.0', 'cuda (1 runs)', '0, 1, 2, 3'): assert o in text, o


# ---------------------------------------------------------------- settings and files

def test_a_section_for_each_setting():
    page = Page(report_html(study() + study(setting='cifar10, resnet20: 9 epochs')))
    assert [o for o in page.words if o == 'cifar10, resnet20'] and {a['href'] for a in page.all('a')} == {'#s0', '#s1'}
    assert {a['id'] for a in page.all('section') if 'id' in a} == {'s0', 's1'}
    assert len(page.labels('A minus baseline')) == 2

def test_a_section_is_headed_by_the_students_network_not_the_teachers():
    teacher = [{**record('teacher', s, .95), 'setting': 'digits, resnet20: 2 epochs'} for s in range(4)]
    c = Comparison([*teacher, *study()])
    words = Page(report_html(c)).words
    assert 'digits, resnet8' in words and 'digits, resnet20' not in words and c.caption.startswith('digits, resnet8: 2 epochs')

def keys_of(html, name): return re.findall(rf'<span class="named">(<svg (?:(?!</svg>).)*</svg>){re.escape(name)}</span>', html)

def test_same_colour_in_every_figure():
    html = report_html(study() + study(setting='other: 1'))
    names = [n for n in accs if n != 'baseline']
    for i,n in enumerate(names):
        found = keys_of(html, n)
        assert len(found) > 8 and {c for key in found for c in re.findall(r'stroke:var\(--(\w+)\)', key)} == {f'k{i}'}
    assert {c for key in keys_of(html, 'baseline') for c in re.findall(r'var\(--(\w+)\)', key)} == {'grey'}
    colours = {n: set(re.findall(rf'<title>{n}</title><path [^>]*stroke:var\(--(\w+)\)', html)) for n in accs}
    assert colours == {'baseline': {'grey'}, **{n: {f'k{i}'} for i,n in enumerate(names)}}, 'curves'

def test_one_name_for_two_configurations():
    one,two = ([record('A', s, .5+.1*i, 1, callbacks=[dict(callback='LsrKD', alpha=a)]) for s in (0, 1)] for i,a in enumerate((.1, .2)))
    c, = comparisons([record('baseline', 0), record('baseline', 1), *one, *two, record('control', 0, rank=2, control_for=['A'])])
    assert c.names == ['baseline', 'A (1)', 'A (2)', 'control'] and c.control_for('control') == [] and c.controls('A (1)') == []
    assert c.table.loc['A (1)', 'last'] == pytest.approx(.5) and c.table.loc['A (2)', 'last'] == pytest.approx(.6)
    again = record('A', 0, .7, 1, callbacks=one[0]['callbacks'], key='later', date='2027-01-01')
    c, = comparisons([again, *one])
    assert len(c.runs('A')) == 2 and c.runs('A')[0]['last']['accuracy'] == .7   # the later of two runs of the same thing

def test_read_runs(tmp_path):
    for folder,records in (('a', study()), ('b/c', study(setting='other: 1')), ('copy', study())):
        for r in records: Ledger(tmp_path/folder/'results.jsonl').append(r)
    assert len(read_runs(tmp_path)) == 40 and len(read_runs([tmp_path/'a', str(tmp_path/'copy'/'results.jsonl')])) == 20
    assert len(comparisons(read_runs(tmp_path))) == 2
    (tmp_path/'empty').mkdir()
    (tmp_path/'nothing.jsonl').write_text('')
    with pytest.raises(FileNotFoundError, match='nowhere'): read_runs(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='results.jsonl'): read_runs(tmp_path/'empty')
    with pytest.raises(ValueError, match='no finished run'): read_runs(tmp_path/'nothing.jsonl')

def test_write_report(tmp_path):
    assert write_report(study(), tmp_path) == tmp_path/'report.html'
    assert write_report(Comparison(study()), tmp_path/'new'/'x.html', title='Two & three').read_text(encoding='utf-8').count('<title>Two &amp; three</title>') == 1
    assert sorted(o.name for o in tmp_path.rglob('*')) == ['new', 'report.html', 'x.html']
    assert (tmp_path/'report.html').read_text(encoding='utf-8') == report_html(study())   # the same runs, the same page
    for bad,error in (([], ValueError), ([1], TypeError)):
        with pytest.raises(error, match='runs'): report_html(bad)


# ---------------------------------------------------------------- drawing

def test_elements_escape_all_but_markup():
    "What the page relies on fastcore for"
    p = P('<a>', ('&', None, 3), B('"'), id='x"y', aria_label='<', cls='k', style=None)
    assert to_xml(p, indent=False) == """<p id='x"y' aria-label="&lt;" class="k">&lt;a&gt;&amp;3<b>"</b></p>"""
    assert to_xml(P(Look(['<i>'], []).named('<i>')), indent=False).count('<i>') == 0

@pytest.mark.parametrize('values', [[0, 1], [.1234, .1235], [5, 5], [0, 0], [-3e6, 2e9], [math.nan, 2, 3, math.inf], [], [-.2, -.1]])
def test_axis_holds_its_values_and_some_ticks(values):
    ax = plt.subplots()[1]
    ax.scatter(values, [0]*len(values))
    round_ticks(ax.xaxis)
    ax.figure.canvas.draw()
    low,high = ax.get_xlim()
    inside = [v for v in values if math.isfinite(v)]
    ticks = [(t, label.get_text()) for t,label in zip(ax.get_xticks(), ax.get_xticklabels()) if low <= t <= high]
    assert all(low < v < high for v in inside) and 1 <= len(ticks) < 9
    for t,label in ticks: assert float(label) == pytest.approx(t, rel=1e-4, abs=1e-8)
    assert len({l for _,l in ticks}) == len(ticks)
    plt.close()

def test_labels_stand_apart():
    places = spread([3., 1., 2., 30.], 5)
    assert places == [11., 1., 6., 30.] and spread([], 5) == []

def curve(values, top=None): return panel(lambda ax: draw_curves(ax, {'A': np.array([values])}, Look(['A'], []), top), 'a curve')

def test_gaps_in_curves():
    "A point alone shows as a dot, a value that is not a number leaves a gap"
    drawn = re.search(r'<g><title>A</title>.*?</g>', curve([1, math.nan, 2, 3]))[0]
    d, = re.findall(r'<path d="([^"]*)" style="fill:none', drawn)
    assert re.fullmatch(r'M[\d.]+ [\d.]+M[\d.]+ [\d.]+L[\d.]+ [\d.]+', d)
    dot, = re.findall(r'transform="translate\(([\d. ]+)\)"', drawn)
    assert dot == d[1:].split('M')[0]
    assert 'translate' in curve([1.]) and 'translate' not in curve([1., 2., 3.])

def test_what_is_cut_ends_at_its_axes():
    whole,cut = curve([1., 9., 1.]),curve([1., 9., 1.], top=2.)
    assert whole.count('<svg') == 1 and '<svg x="44" y="26" width="286" height="168" viewBox="44 26 286 168"><title>A</title>' in cut
    ys = [float(o.split()[1]) for o in re.split('[ML]', re.search(r'<title>A</title><path d="([^"]*)"', cut)[1])[1:]]
    assert min(ys) < 26 < ys[0] < 26+168 and ys[-1] == ys[0], 'the line goes on beyond the box that cuts it'

def test_looks_differ():
    names = [str(i) for i in range(30)]
    look = Look(['base', *names], ['base'])
    assert len({look.key(n) for n in names}) == 30 and look.colour('base') == palette()['grey']
    assert set(re.findall(r'var\(--(\w+)\)', look.key('base'))) == {'grey'}
    hollow = Look(['A'], [], ['A']).key('A')
    assert 'fill:var(--bg)' in hollow and 'stroke-dasharray' in hollow and 'dasharray' not in look.key('0')

def test_a_drawing_has_no_ids_and_every_colour_by_name():
    html = report_html(study())
    for svg in re.findall(r'<svg.*?</svg>', html): assert ' id=' not in svg and not re.search('#[0-9a-f]{6}|font', svg), svg
    names = set(re.findall(r'var\(--(\w+)\)', html))
    light,dark = (dict(re.findall(r'--(\w+): (#\w+);', o)) for o in style_sheet().split('@media')[:2])
    assert names <= set(light) and {'bg', 'fg', 'less', 'rule', 'zero', 'grey'} <= set(dark)

def test_the_users_style_does_not_reach_the_page():
    expected,figures = report_html(study()),plt.get_fignums()
    with plt.style.context('dark_background'), plt.rc_context({'font.size': 30, 'axes.grid': False, 'svg.fonttype': 'path', 'lines.linewidth': 9}):
        assert report_html(study()) == expected
        assert plt.rcParams['font.size'] == 30
    assert plt.get_fignums() == figures

def test_strips_take_a_chart_apart():
    def draw(ax):
        for i in range(3): note(ax.plot([i, i+1], [i, i], color='#123456')[0], f'line {i}', row=i)
        ax.set(ylim=(2.5, -.5), xlabel='x < y')
    html = to_xml(strips(draw, [(f'row {i}', i, f'said {i}') for i in range(3)]), indent=False)
    page = Page(html)
    assert page.labels('said') == ['said 0', 'said 1', 'said 2'] and 'x < y' in page.words
    rows = re.findall(r'<svg[^>]*aria-label="said (\d)"[^>]*>(.*?)</svg>', html)
    assert [(i, re.findall(r'<title>(.*?)</title>', o)) for i,o in rows] == [(str(i), [f'line {i}']) for i in range(3)]
    grids = [re.findall(r'<path d="[^"]*" style="[^"]*var\(--rule\)[^"]*"', o) for _,o in rows]
    assert grids[0] and grids[0] == grids[1] == grids[2]


# ---------------------------------------------------------------- a sound page

def test_loads_nothing():
    html = report_html(study())
    page = Page(html)
    assert not re.search(r'https?://|url\(|@import|//[a-z]', html, re.I) and not page.all('script') and not page.all('img')
    for t,a in page.tags:
        for k in ('src', 'href', 'xlink:href', 'data', 'action'): assert k not in a or a[k].startswith('#') or (t, a[k]) == ('link', 'data:,'), (t, a)
        assert not any(k.startswith('on') for k in a)
    assert "default-src 'none'" in html
    ids = [a['id'] for _,a in page.tags if 'id' in a]
    assert len(ids) == len(set(ids)) and {a['href'][1:] for t,a in page.tags if (a.get('href') or '').startswith('#')} <= set(ids)

def test_figures_speak():
    page = Page(report_html(study()))
    for a in page.all('svg'): assert a.get('role') == 'img' and a['aria-label'] or a.get('aria-hidden') == 'true' or 'x' in a or set(a) == {'width', 'height'}, a
    assert len(page.all('figure')) == 8 and ('html', {'lang': 'en'}) in page.tags
    for o in ('prefers-color-scheme: dark', 'color-scheme: light dark', '@media print', 'max-width: 640px'): assert o in page.css

def test_strings_are_escaped():
    evil = '<script>alert("1")</script>\' onload="x" &amp; <b>'
    records = [record(m, s, rank=i, setting=evil, settings={evil: evil}, evaluated_on=evil, control_for=[evil] if i == 2 else [], description=[[evil, evil]] if i else None,
                      callbacks=[{'callback': evil, evil: evil}], platform=evil, **{evil: evil}) for i,m in enumerate(('baseline', evil, evil+'2')) for s in (0, 1)]
    html = report_html(records, title=evil)
    page = Page(html)
    assert not page.all('script') and not page.all('b') and '<script' not in html
    assert not any('onload' in a for _,a in page.tags)
    assert evil in page.words and unescape(html).count(evil) > 20
    assert '<script' not in Comparison(records)._repr_html_()

def test_many_methods_and_long_names():
    names = ['baseline'] + [f'a method with a very long name that goes on and on, number {i}, α=0.{i}' for i in range(30)]
    g = np.random.default_rng(0)
    records = [record(n, s, .5+.1*g.random(), i, control_for=[names[i-1]] if i%3 == 2 else []) for i,n in enumerate(names) for s in range(3)]
    html = report_html(records)
    page = Page(html)
    assert len(html) < 700_000 and len(page.labels('Reliability of')) == 31 and len(page.labels('a method with')) > 60
    assert len({key for n in names[1:] for key in keys_of(html, n)}) == 30   # colour and mark tell them apart

odd = ['cost in $', '$x$ and $y', '_hidden', '=HYPERLINK("http://a")', '+1', '-1', '@name', 'tab\there', '\x01\x02', 'line\nbreak', '\udcff', '%s %d', '\\alpha', '', ' ', '<b>', 'a, b']

@pytest.mark.parametrize('name', odd)
def test_a_method_may_have_any_name(name, tmp_path):
    "In plots, legends, tables, pages and CSV files"
    records = [record(m, s, .5+.01*s+.1*i, i) for i,m in enumerate(('baseline', name)) for s in range(2)]
    c = Comparison(records)
    page = Page(report_html(records))
    assert sum(a.get('aria-label', '').startswith(f'{name} minus baseline') for _,a in page.tags) == 1
    c.save(tmp_path)
    write_report(c, tmp_path)
    ax = c.plot_curves()[1]
    ax.figure.canvas.draw()
    assert len(ax.get_legend().get_texts()) == 2, 'no name is left out of the legend'
    shown = ax.get_legend().get_texts()[1].get_text().replace(r'\$', '$').strip()
    assert shown == ''.join(o if o.isprintable() else ' ' for o in name).strip()
    plt.close('all')
    cells = list(csv.reader((tmp_path/'table.csv').read_text(encoding='utf-8', errors='surrogateescape').splitlines(keepends=True)))
    assert not any(cell and cell[0] in '=+-@\t\r' and not re.fullmatch(r'-?[\d.e-]+', cell) for row in cells for cell in row), cells

def test_a_table_without_formulas_keeps_its_numbers():
    table = pd.DataFrame({'=a': [-1., 2.], 'words': ['-1', 'x'], 'count': [-1, 3]}, index=['@i', 'j'])
    safe = csv_safe(table)
    assert list(safe.columns) == ["'=a", 'words', 'count'] and list(safe.index) == ["'@i", 'j']
    assert safe['words'].tolist() == ["'-1", 'x'] and safe['count'].tolist() == [-1, 3] and safe["'=a"].tolist() == [-1., 2.]

def test_a_run_whose_seconds_are_null_breaks_no_report():
    records = study()
    for r in records[4:6]: r['seconds_per_epoch'] = None
    page = Page(report_html(records))
    assert page.labels('Cost against gain') and 'nan' not in page.text.lower()
    for r in records: r['seconds_per_epoch'] = None
    assert not Page(report_html(records)).labels('Cost against gain')
