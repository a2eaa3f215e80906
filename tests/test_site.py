"The built site in headless Chromium, at a desktop's and a phone's width. Needs pypandoc and Chromium; `make docs` checks links without"
import functools, html, http.server, json, os, shutil, subprocess, sys, threading
from pathlib import Path

import pytest
from filelock import FileLock
from processes import said_by

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
docs = pytest.importorskip('docs', reason='the site is built with pypandoc: pip install pypandoc_binary')
site = docs.cfg.doc_path
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(chromium is None, reason='no Chromium: chromium, chromium-browser and google-chrome are not in PATH')
flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']

# what goes wrong in a page, from before its first own script on
watch = '''<script>window.faults = []
addEventListener('error', e => faults.push(e.message || `not loaded: ${e.target.src || e.target.href}`), true)
addEventListener('unhandledrejection', e => faults.push(`${e.reason}`))
for (const k of ['error', 'warn']) console[k] = (...o) => faults.push(o.join(' '))
</script>'''

# opens every page in a frame, one width after the other, and writes down what it sees
harness = '''<!DOCTYPE html><meta charset="utf-8"><body><script>
const seen = {}, wait = ms => new Promise(f => setTimeout(f, ms)), frame = document.createElement('iframe')
const bad = (doc, selector, ok) => [...doc.querySelectorAll(selector)].filter(e => !ok(e)).map(e => e.outerHTML.slice(0, 200))
const sideways = doc => doc.documentElement.scrollWidth - doc.documentElement.clientWidth
const size = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 }
const open = async (url, width) => {
  frame.style = `width: ${width}px; height: 900px; border: 0`
  await new Promise(f => { frame.onload = f; frame.src = url })
  return [frame.contentWindow, frame.contentDocument]
}
const press = (doc, key) => doc.activeElement.dispatchEvent(
  new frame.contentWindow.KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}))
const results = doc => [...doc.querySelectorAll('#found a')].map(a => a.href)
async function search(win, doc, text) {
  const box = doc.getElementById('search')
  box.value = text
  box.dispatchEvent(new win.Event('input'))
  for (let i = 0; i < 100 && !(win.searchIndex && !doc.getElementById('found').hidden); i++) await wait(20)
  return results(doc)
}
(async () => {
  document.body.append(frame)
  for (const width of WIDTHS) for (const page of PAGES) {
    const [win, doc] = await open('/' + page, width)
    seen[`${page} at ${width}`] = {faults: win.faults, wide: sideways(doc),
      math: bad(doc, 'main math', size), images: bad(doc, 'main img', e => e.naturalWidth > 0 && size(e)),
      current: doc.querySelectorAll('.sidebar [aria-current]').length}
  }
  const menu = async (width, opened) => {
    const [win, doc] = await open('/index.html', width)
    doc.querySelector('.sidebar details').open = opened
    return [doc.querySelector('.sidebar a').checkVisibility(), sideways(doc)]
  }
  seen.menu = [await menu(1280, false), await menu(390, false), await menu(390, true)]
  let [win, doc] = await open('/index.html', 1280)
  press(doc, '/')
  const s = seen.search = {focused: doc.activeElement.id, first: {}}
  for (const text of WORDS) s.first[text] = (await search(win, doc, text))[0]
  await search(win, doc, 'LsrKD')
  const chosen = () => doc.querySelector('#found [aria-selected=true]').href
  s.hrefs = results(doc)
  s.moves = ['ArrowDown', 'ArrowDown', 'ArrowUp'].map(key => (press(doc, key), chosen()))
  press(doc, 'Escape')
  s.closed = doc.getElementById('found').hidden && !doc.getElementById('search').value && doc.activeElement.id !== 'search'
  doc.getElementById('search').focus()
  await search(win, doc, 'LsrKDLoss')
  const gone = new Promise(f => { frame.onload = f })
  press(doc, 'Enter')
  await gone
  s.entered = frame.contentWindow.location.pathname + frame.contentWindow.location.hash
  ;[win, doc] = await open('/index.html', 1280)
  const look = () => [win.getComputedStyle(doc.body).backgroundColor, doc.documentElement.dataset.theme, win.localStorage.getItem('theme')]
  seen.theme = [look()]
  for (let i = 0; i < 2; i++) {
    doc.getElementById('theme').click()
    seen.theme.push(look())
    ;[win, doc] = await open('/losses.html', 1280)
    seen.theme.push(look())
  }
})().catch(e => seen.failed = `${e.stack}`).finally(() => {
  const out = document.createElement('pre')
  out.id = 'seen'
  out.textContent = JSON.stringify(seen)
  document.body.replaceChildren(out)
})
</script>'''

def dump(url, tmp):
    "The document at `url` after its scripts have run"
    cmd = [chromium, *flags, f'--user-data-dir={tmp}', '--virtual-time-budget=120000', '--timeout=60000', '--dump-dom', url]
    return subprocess.run(cmd, capture_output=True, text=True, timeout=120).stdout

class Handler(http.server.SimpleHTTPRequestHandler):
    "The site, with `watch` in each page"
    harness = ''
    def log_message(self, *args): pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if   self.path=='/harness': txt = self.harness
        elif path.suffix=='.html' and path.exists(): txt = path.read_text(encoding='utf-8').replace('<head>', '<head>'+watch, 1)
        else: return super().do_GET()
        body = txt.encode()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def build():
    os.chdir(root)
    docs.build(site)

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    with FileLock(site.with_suffix('.lock')):    # these tests may run in several processes
        if not docs.is_current(site):
            code,said = said_by(build, file=tmp_path_factory.mktemp('site')/'said.txt')
            assert code==0, said[-5000:]
    return site

@pytest.fixture(scope='session')
def pages(built): return [p.relative_to(built).as_posix() for p in sorted(built.rglob('*.html'))]

@pytest.fixture(scope='session')
def index(built): return json.loads((built/'search-index.js').read_text(encoding='utf-8').split('=', 1)[1])

# what one types → what comes first
first = {'LsrKDLoss': 'losses.html#lsrkdloss', 'lsrkdloss': 'losses.html#lsrkdloss', 'LsrKDL': 'losses.html#lsrkdloss',
         'TfKDReg': 'callback.distill.html#tfkdreg', 'coming from other': 'translations.html', 'torchdistill': None, 'qwertzuiop': None, 'how do I deploy': 'tutorials/deploying.html',
         # what people look for, in their words
         'tensorboard': 'tutorials/loggers.html#tensorboard', 'wandb': 'tutorials/loggers.html#weights-biases-wandb',
         'hugging face': 'tutorials/huggingface.html', 'huggingface': 'tutorials/huggingface.html', 'segmentation': 'tutorials/segmentation.html',
         'choose alpha': 'tutorials/choosing_alpha.html#how-to-choose-alpha-and-tau-in-short', 'choosing α': 'tutorials/choosing_alpha.html',
         'own photos': 'tutorials/your_own_photos.html',
         # a letter wrong, missing, added, swapped; the beginning of a longer name; no section with all the words
         'tensorbord': 'tutorials/loggers.html#tensorboard', 'segmantation': 'tutorials/segmentation.html', 'hugging fcae': 'tutorials/huggingface.html',
         'LsrDKLoss': 'losses.html#lsrkdloss', 'KnowlegeDistil': 'callback.distill.html#knowledgedistillation',
         # words that stand in tables only, written and computed ones
         'get_preds without labels': 'compatibility.html', 'mdistiller repdistiller': 'translations.html'}

def browse(built, pages, tmp):
    Handler.harness = harness.replace('PAGES', json.dumps(pages)).replace('WIDTHS', '[390, 1280]').replace('WORDS', json.dumps(list(first)))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=built)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = dump(f'http://127.0.0.1:{server.server_port}/harness', tmp)
        server.shutdown()
    assert '<pre id="seen">' in page, f'Chromium did not finish: {page[-1000:]}'
    return json.loads(html.unescape(page.split('<pre id="seen">')[1].split('</pre>')[0]))

@pytest.fixture(scope='session')
def seen(built, pages, once):
    if chromium is None: pytest.skip('no Chromium')
    def look(folder): (folder/'seen.json').write_text(json.dumps(browse(built, pages, folder/'chromium')), encoding='utf-8')
    seen = json.loads((once('seen', look)/'seen.json').read_text(encoding='utf-8'))
    assert 'failed' not in seen, seen['failed']
    return seen

def test_links(built): assert docs.check_links(built)==[]

def test_search_index(built, pages, index):
    "Every entry leads to an anchor that is there; every exported name is found"
    there = {p:docs.Page(built/p).ids for p in pages}
    for _,name,_,url,_,_ in index:
        page,_,anchor = url.partition('#')
        assert page in there and (not anchor or anchor in there[page]), (name, url)
    named = {o[1] for o in index if o[0]}
    assert {n for page,syms in docs.symbols().items() if page in there for n in syms.values() if '.' not in n and n[0]!='_'} <= named
    assert next(o[4] for o in index if o[1]=='LsrKDLoss').startswith('LsrKDLoss(alpha=0.1, tau=3.0')

@needs_chromium
@pytest.mark.parametrize('what', ['faults', 'math', 'images'])
def test_pages(seen, pages, what):
    "Nothing in the console, nothing that does not load, every equation and figure has a size"
    views = {k:v for k,v in seen.items() if ' at ' in k}
    assert len(views)==2*len(pages)
    assert {k:v[what] for k,v in views.items() if v[what]}=={}

@needs_chromium
def test_no_sideways_scroll(seen): assert {k:v['wide'] for k,v in seen.items() if ' at ' in k and v['wide']>0}=={}

@needs_chromium
def test_sidebar_marks_page(seen): assert {k:v['current'] for k,v in seen.items() if ' at ' in k and v['current']!=1}=={}

@needs_chromium
def test_menu(seen):
    "The sidebar is there on a desktop, and unfolds on a phone"
    assert seen['menu']==[[True, 0], [False, 0], [True, 0]]

@needs_chromium
def test_search(seen):
    s = seen['search']
    assert s['focused']=='search'
    for text,url in first.items():
        hit = s['first'].get(text)
        if url: assert hit and (hit.endswith('/'+url) or '#' not in url and f'/{url}#' in hit), (text, hit)
    assert 'translations.html' in s['first']['torchdistill'] and 'qwertzuiop' not in s['first']
    hrefs = s['hrefs']
    assert hrefs[0].endswith('callback.distill.html#lsrkd') and s['moves']==[hrefs[1], hrefs[2], hrefs[1]]
    assert s['closed'] and s['entered']=='/losses.html#lsrkdloss'

@needs_chromium
def test_theme(seen):
    "Follows the system; the button turns it round, on the next page too; a second time brings back the system's"
    (bg,theme,kept),turned,turned_next,back,back_next = map(tuple, seen['theme'])
    assert (theme, kept)==(None, None)
    assert turned[0]!=bg and turned[1:]==('dark', 'dark') and turned_next==turned
    assert back==back_next==(bg, None, None)

@needs_chromium
def test_search_without_server(built, tmp_path):
    "Pages opened as files search too, from within a folder"
    page = dump(f'{(built/"tutorials"/"quickstart.html").as_uri()}?q=LsrKDLoss', tmp_path)
    assert page.split('id="found"')[1].split('href="')[1].split('"')[0].endswith('/losses.html#lsrkdloss')

@needs_chromium
def test_system_dark(built, tmp_path):
    shot = tmp_path/'dark.png'
    dark = ['--blink-settings=preferredColorScheme=0', '--window-size=400,300', f'--screenshot={shot}']
    subprocess.run([chromium, *flags, f'--user-data-dir={tmp_path}', *dark, (built/'index.html').as_uri()], capture_output=True, timeout=60)
    from PIL import Image
    assert Image.open(shot).convert('L').getpixel((5, 200)) < 64
