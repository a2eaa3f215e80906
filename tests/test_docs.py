"The parts of tools/docs.py, and what pages say beside the records; `make docs` builds the whole site"
import ast, json, re, sys
from pathlib import Path

import pytest
from nbdev.doclinks import nbglob

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
import docs

def page(body, head=''): return f'<html><head>{head}</head><body>{body}</body></html>'

def write(site, pages):
    for name,txt in pages.items():
        (site/name).parent.mkdir(parents=True, exist_ok=True)
        (site/name).write_text(txt)

good = {'index.html': page('<a href="sub/b.html#there">b</a><a href="https://example.com/x">out</a><a href="#top">t</a><p id="top"><img src="a.png">'),
        'sub/b.html': page('<h2 id="there">x</h2><a href="../index.html">home</a>', '<link rel="stylesheet" href="../site.css">'),
        'a.png': '', 'site.css': ''}

def test_good_site(tmp_path):
    write(tmp_path, good)
    assert docs.check_links(tmp_path)==[]

@pytest.mark.parametrize('name,txt,expected', [
    ('sub/b.html', page('<a href="../gone.html">x</a><h2 id="there">'), ['sub/b.html: ../gone.html (no such file)']),
    ('sub/b.html', page('<h2 id="elsewhere">'), ['index.html: sub/b.html#there (no such anchor)']),
    ('index.html', page('<a href="#nowhere">x</a>'), ['index.html: #nowhere (no such anchor)']),
    ('index.html', page('<img src="gone.png">'), ['index.html: gone.png (no such file)']),
    ('index.html', page('', '<link rel="stylesheet" href="https://example.com/a.css">'), ['index.html: https://example.com/a.css (loaded from another host)']),
    ('a.html', page('<pre>[a](b.html)</pre><a href="index.html">[<code>x</code>](https://example.com/x#x)</a>'),
     ['a.html: ...](https://example.com/x#x) (Markdown; a link on code is one too many, as nbdev links symbols itself)']),
])
def test_broken_site(tmp_path, name, txt, expected):
    write(tmp_path, {**good, name:txt})
    assert docs.check_links(tmp_path)==expected

def test_anchors_are_nbdev_doclinks():
    html = docs.pandoc('### AddLoss\n\n### AddLoss.\\_\\_call\\_\\_\n\n### my_func\n', 'html5', '')
    assert all(f'id="{o}"' in html for o in ('addloss', 'addloss.__call__', 'my_func'))

def test_links_between_pages():
    md = f'[a](03_losses.ipynb#kl) [b]({docs.cfg.doc_url}core.html#f) [c](https://example.com/x.html) [d](#here)'
    html = docs.pandoc(md, 'html5', '../')
    assert all(f'href="{o}"' in html for o in ('losses.html#kl', '../core.html#f', 'https://example.com/x.html', '#here'))
    readme = docs.pandoc(md, 'gfm')
    assert f'[a]({docs.cfg.doc_url}losses.html#kl)' in readme and f'[b]({docs.cfg.doc_url}core.html#f)' in readme

def test_code_loses_directives_and_keeps_output():
    from fastcore.nbio import mk_cell
    cell = mk_cell('#| slow: true\nprint(1)')
    cell.outputs = [dict(output_type='stream', name='stdout', text=['bar 10%\r', 'bar 99%\r', '1\n']),
                    dict(output_type='execute_result', data={'text/plain':['x'], 'text/html':['<table></table>']})]
    md = docs.code_md(cell, None)
    assert '#|' not in md and 'print(1)' in md and 'bar' not in md
    assert '<table></table>' in docs.pandoc(md, 'html5', '')

signature = '''def f(
    x:int, # a number, (or two)
    alpha:float=0.1, **kwargs
)->Tensor: # a scalar'''

def test_search_shows_what_one_types():
    assert docs.call(signature)=='f(x, alpha=0.1, **kwargs)'
    assert docs.call('class Strange')==docs.call('f(x=<object>)')==''

def test_search_entries():
    "A section ends at the next heading; outputs and the TeX beside equations stay out; a symbol's story and definition are one entry"
    md = f"""intro $a^2$

## F

what `f` is for

### F

```python
def F(x:int=1):
```

*Doc*

::: cell-output
hidden
:::

![](a.png)

## Other

x<br>y"""
    body = f'<header>no</header><main id="main"><h1>T</h1>{docs.pandoc(md, "html5", "", ["--mathml"])}<footer>no</footer></main>'
    assert docs.search_entries('p.html', 'T', body, {'f':'F', 'f.go':'F.go', 'f.__init__':'F.__init__'})==[
        [0, 'T', 'T', 'p.html', '', 'intro a2'], [1, 'F', 'T', 'p.html#f', 'F(x=1)', 'what f is for Doc'],
        [0, 'Other', 'T', 'p.html#other', '', 'x y'], [1, 'F.go', 'T', 'p.html#f.go', '', '']]

def test_tables_are_searched():
    "Written ones whole; computed ones by their names, without numbers; a sentence that is printed is not"
    written = '| method | ε |\n|---|---|\n| `LSR` | 0.1 |\n'
    computed = '::: cell-output\nprinted\n\n' + docs.raw('<table><caption>TfKDReg</caption><tr><th>CE ×2.9</th><td>86.69 ± 0.27</td><td>GradientClip</td></tr></table>') + '\n:::'
    body = f'<main id="main"><h1>T</h1>{docs.pandoc(written+chr(10)+computed, "html5", "")}</main>'
    (_,_,_,_,_,text), = docs.search_entries('p.html', 'T', body, {})
    assert text=='method ε LSR 0.1 TfKDReg CE ×2.9 GradientClip' or text=='method ε LSR 0.1 TfKDReg GradientClip'

# question → page that answers it, and words of its headings
questions = {
    'How do I train on my own folder of photos?': ('tutorials/your_own_photos.html', 'a folder of photos'),
    'How do I do it from a shell?': ('cli.html', 'compare'),
    'Which method should I use?': ('tutorials/which_method.html', 'The list'),
    'How do I choose α and τ?': ('tutorials/choosing_alpha.html', 'How to choose alpha and tau'),
    'Did it help, or was it chance?': ('tutorials/is_it_distillation.html', ''),
    'How do I bring a teacher?': ('tutorials/networks_as_teachers.html', ''),
    'How do I see the losses in TensorBoard or W&B?': ('tutorials/loggers.html', 'TensorBoard'),
    'Can I use it with Hugging Face, or without fastai?': ('tutorials/huggingface.html', 'In a Trainer'),
    'Can I segment images?': ('tutorials/segmentation.html', 'a teacher'),
    'Does it go together with MixUp, my loss, two processes?': ('compatibility.html', 'Two of ours together'),
    'How do I export and deploy what I trained?': ('tutorials/deploying.html', 'export'),
}

def linked(nb):
    "Pages that a notebook's text links to"
    from fastcore.nbio import read_nb
    text = '\n'.join(c.source for c in read_nb(docs.cfg.nbs_path/nb).cells if c.cell_type=='markdown')
    here = (docs.cfg.nbs_path/nb).parent
    targets = [t.split('#')[0] for t in re.findall(r'\]\(([^)\s]+\.ipynb[^)\s]*)\)', text)]
    return {(here/t).resolve().relative_to(docs.cfg.nbs_path).as_posix() for t in targets}

def test_eleven_questions_of_a_newcomer_are_answered_within_two_clicks():
    "From the text of the front page, not counting the sidebar, which has every page"
    from fastcore.nbio import read_nb
    once = linked('index.ipynb')
    twice = once.union(*map(linked, once))
    assert len(questions)==11
    by_page = {docs.nbpath2html(nb).as_posix(): nb for _,nb in docs.sidebar()}
    for question,(page,words) in questions.items():
        assert by_page[page] in twice, question
        heads = re.findall(r'^#+ (.+)$', '\n'.join(c.source for c in read_nb(docs.cfg.nbs_path/by_page[page]).cells if c.cell_type=='markdown'), re.M)
        assert heads and any(words.lower() in h.lower().replace('`', '') for h in heads), question
    assert {by_page[page] for page,_ in questions.values()} <= once, 'one click is enough for each'

def test_the_command_stands_near_the_top():
    assert [nb for _,nb in docs.sidebar()].index('50_cli.ipynb') < 5

def test_tutorials_open_in_colab():
    "Each tutorial's first code cell, hidden, installs there and only there"
    from fastcore.nbio import read_nb
    tutorials = sorted((docs.cfg.nbs_path/'tutorials').glob('*.ipynb'))
    assert tutorials
    for p in tutorials:
        src = next(c.source for c in read_nb(p).cells if c.cell_type=='code')
        assert src.startswith('#| hide\n') and '! [ -e /content ] && ' in src and docs.cfg.git_url in src and 'pip install' in src, p.name
    assert docs.colab_url('tutorials/x.ipynb')=='https://colab.research.google.com/github/fastkdtf/fastkdtf/blob/main/nbs/tutorials/x.ipynb'

def test_sidebar_holds_every_notebook():
    listed = [nb for _,nb in docs.sidebar()]
    there = [Path(p).relative_to(docs.cfg.nbs_path).as_posix() for p in nbglob(docs.cfg.nbs_path)]
    assert len(listed)==len(set(listed))
    assert set(listed)==set(there), f'only in sidebar.yml: {sorted(set(listed)-set(there))}; not in it: {sorted(set(there)-set(listed))}'

def test_readme_is_current(tmp_path):
    docs.readme(tmp_path)
    made = {p.relative_to(tmp_path).as_posix():p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    kept = {p.relative_to(root).as_posix():p.read_bytes() for p in [root/'README.md', *(root/'README_files').rglob('*')]}
    assert made==kept, 'README.md differs from nbs/index.ipynb: run `make readme`'

def test_addresses_of_0_1_0_lead_on(tmp_path):
    "Each old page exists and names the new one; an anchor leads to the page that has the symbol now"
    docs.write_redirects(tmp_path)
    pages,syms = {docs.nbpath2html(nb).as_posix() for _,nb in docs.sidebar()},docs.symbols()
    made = {p.stem:p.read_text(encoding='utf-8') for p in tmp_path.glob('*.html')}
    assert len(made)>30 and set(made)==set(docs.moved)
    for old,txt in made.items():
        first = re.search('rel="canonical" href="([^"]+)"', txt)[1]
        anchors = json.loads(re.search(r'pages = (\{.*?\}), anchor', txt)[1])
        assert first in pages and f'url={first}"' in txt, old
        for anchor,page in anchors.items(): assert page in pages and anchor in syms[page], f'{old}#{anchor}'
    assert '"networkteacher": "teachers.network.html"' in made['teachers'] and '"checkpoint": "callback.checkpoint.html"' in made['runs']

def cells(path): return [(''.join(c['source']), c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

def test_methods_cost_what_the_benchmark_measured():
    "The page of methods gives each the time that the record of the benchmark has"
    steps = json.loads((root/'results'/'bench'/'cpu.json').read_text())['steps']
    measured = {o['method']: f"{o['time / plain']:.2f}×" for o in steps}
    names = {'Tf-KD_reg': 'TfKDReg', "Tf-KD_reg, as the authors' code has it": 'TfKDReg-official', 'Normal KD': 'KD', 'MrKD': 'MrKD-1',
             'Self-guidance': 'SelfGuidance', 'R-Drop': 'RDrop'}
    said = {}
    for text,_ in cells(root/'nbs'/'methods.ipynb'):
        found = re.search(r'^### (.+?)$.*^\| cost \| (\d\.\d\d×) the plain step', text, re.M|re.S)
        if found: said[names.get(found[1], found[1])] = found[2]
    assert len(said) == 9 and said == {name: measured[name] for name in said}

def test_a_cell_that_ends_in_a_value_shows_it():
    shown,bare = 0,[]
    for path in nbglob(root/'nbs', as_path=True):
        for text,cell in cells(path):
            if cell['cell_type'] != 'code' or text[:1] in '!%': continue
            if re.search(r'^#\| *(hide|export|eval: false|output: false|slow)', text, re.M): continue
            last = ast.parse(text).body[-1:]
            value = last[0].value if last and isinstance(last[0], ast.Expr) and text[-1] != ';' else None
            if value and not isinstance(value, (ast.Call, ast.Constant)):
                shown += 1
                if not cell['outputs']: bare.append((path.name, text[-60:]))
    assert shown > 200 and not bare, bare
