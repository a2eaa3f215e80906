"""Build the documentation site from the notebooks: `python tools/docs.py`; `--readme` writes README.md only.

nbdev processes the notebooks, as for its own sites. Quarto renders them where it is installed, pandoc where it is not:
same pages, same anchors, same `_docs/`. A broken internal link or anchor ends with exit code 1 and a list."""
import argparse, ast, base64, html, json, os, re, shutil, subprocess, sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pypandoc, yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

from fastkdtf._moved import moved

tools = Path(__file__).resolve().parent
root = tools.parent
cfg = get_config(root)
assets = ('.png', '.svg', '.jpg', '.jpeg', '.gif', '.webp', '.css')
markdown = 'markdown-yaml_metadata_block-implicit_figures'

# notebooks -> markdown

def fence(txt, lang='', cls=''):
    "`txt` as a fenced code block, whatever backticks it holds"
    ticks = '`' * max(3, 1 + max(map(len, re.findall('`+', txt)), default=0))
    attrs = ' '.join(f'.{o}' for o in (lang, cls) if o)
    return f'{ticks} {{{attrs}}}\n{txt.rstrip()}\n{ticks}' if attrs else f'{ticks}\n{txt.rstrip()}\n{ticks}'

def raw(txt): return fence(txt).replace('```\n', '```{=html}\n', 1)
def joined(o): return ''.join(o or '')

def terminal(txt):
    "What a terminal would show of `txt` in the end: progress bars overwrite themselves"
    return '\n'.join(l.split('\r')[-1].rstrip() for l in txt.replace('\r\n', '\n').split('\n'))

def output_md(o, save):
    "The richest form of one cell output that a page can hold; `save(bytes, suffix)` stores an image and returns its link"
    if o.get('name')=='stderr': return ''
    if o['output_type']=='stream': return fence(shown) if (shown := terminal(joined(o['text']))).strip() else ''
    d = {k:joined(v) for k,v in (o.get('data') or {}).items() if isinstance(v, (str,list))}
    for kind in ('png', 'jpeg'):
        if f'image/{kind}' in d: return f"![]({save(base64.b64decode(d[f'image/{kind}']), kind)})"
    if 'image/svg+xml' in d: return f"![]({save(d['image/svg+xml'].encode(), 'svg')})"
    if 'text/markdown' in d: return d['text/markdown']
    if d.get('text/html', '').strip(): return raw(d['text/html'])
    if 'text/latex' in d: return d['text/latex']
    txt = d.get('text/plain', '').strip()
    return fence(txt) if txt and not re.match('<(Axes|Figure)', txt) else ''    # what a plot returns, not what it shows

def code_md(cell, save):
    "A code cell: its source without `#|` lines, then its saved outputs"
    src = cell.source
    opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*"?(.*?)"?\s*$', src, re.M))
    if opts.get('include')=='false': return ''
    src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
    code = fence(src, 'python') if src and opts.get('echo')!='false' else ''
    if code and 'code-fold' in opts:
        opened = ' open' if opts['code-fold']=='show' else ''
        code = f"<details{opened}><summary>{opts.get('code-summary', 'Code')}</summary>\n\n{code}\n\n</details>"
    outs = [] if opts.get('output')=='false' else [output_md(o, save) for o in cell.get('outputs', [])]
    outs = '\n\n'.join(o for o in outs if o)
    if outs and opts.get('output')!='asis': outs = f'::::: cell-output\n{outs}\n:::::'
    return '\n\n'.join(o for o in (code, outs) if o)

def nb_md(nb, save):
    "(front matter, markdown body) of a processed notebook"
    meta, parts = {}, []
    for c in nb.cells:
        src = joined(c.get('source'))
        if   c.cell_type=='raw' and src.startswith('---'): meta.update(yaml.safe_load(src.strip().strip('-')) or {})
        elif c.cell_type=='markdown': parts.append(src)
        elif c.cell_type=='code': parts.append(code_md(c, save))
    return meta, '\n\n'.join(p for p in parts if p)

def saver(folder, link):
    "Store images as `folder/1.png`, `2.png`, … and link to them as `link/1.png`, …"
    n = iter(range(1, 10**6))
    def save(data, suffix):
        nm = f'{next(n)}.{suffix}'
        folder.mkdir(parents=True, exist_ok=True)
        (folder/nm).write_bytes(data)
        return f'{link}/{nm}'
    return save

# links

def relink(node, kind, f):
    "Replace the target of every link or image (`kind`) in a pandoc syntax tree by `f(target)`"
    if isinstance(node, list): return [relink(o, kind, f) for o in node]
    if not isinstance(node, dict): return node
    if node.get('t')==kind: node['c'][2][0] = f(node['c'][2][0])
    return {k:relink(v, kind, f) for k,v in node.items()}

def page_link(target, up):
    "Links to notebooks and to the hosted site, as links between the built pages"
    if target.startswith(cfg.doc_url): target = up + (target[len(cfg.doc_url):] or 'index.html')
    u = urlsplit(target)
    return target if u.scheme or not u.path.endswith('.ipynb') else u._replace(path=nbpath2html(u.path).as_posix()).geturl()

def hosted_link(target):
    "Links to notebooks, as links to the hosted site (for README)"
    u = urlsplit(target)
    return target if u.scheme or not u.path.endswith(('.ipynb', '.html')) else cfg.doc_url + page_link(target, '')

def repo_image(target):
    "Images beside the index notebook, as seen from README"
    return target if urlsplit(target).scheme or target.startswith('README_files/') else f'{cfg.nbs_path.name}/{target}'

def pandoc(md, to, up=None, args=()):
    "`md` as `to`; links lead to the pages of a site whose root is at `up`, or to the hosted site if `up` is None"
    doc = json.loads(pypandoc.convert_text(md, 'json', markdown))
    if up is None: doc = relink(relink(doc, 'Link', hosted_link), 'Image', repo_image)
    else: doc = relink(doc, 'Link', lambda o: page_link(o, up))
    return pypandoc.convert_text(json.dumps(doc), to, 'json', extra_args=list(args)).rstrip() + '\n'

def inline_html(md): return re.sub(r'^<p>|</p>$', '', pypandoc.convert_text(md, 'html5', markdown, extra_args=['--mathml']).strip())

def symbols():
    "Page → anchor → name of what is exported, as nbdev's doclinks have it"
    idx,res = {},defaultdict(dict)
    exec((cfg.lib_path/'_modidx.py').read_text(encoding='utf-8'), idx)
    for mod,syms in idx['d']['syms'].items():
        for name,(loc,_) in syms.items():
            page,anchor = loc.split('#')
            res[page][anchor] = name[len(mod)+1:]
    return res

def symbol_anchors(body, anchors):
    "Doclinks may name a method without a heading of its own: let its anchor stand at its class"
    ids = set(re.findall(r'\bid="([^"]+)"', body))
    for anchor in anchors:
        if anchor in ids: continue
        ids.add(anchor)
        span = f'<span id="{html.escape(anchor)}"></span>'
        head = re.search(rf'<h\d[^>]* id="{re.escape(anchor.split(".")[0])}"[^>]*>', body)
        if not head: head = re.search('<main[^>]*>', body)
        body = body[:head.end()]+span+body[head.end():]
    return body

# search

def words_only(txt): return txt if re.search(r'[^\W\d_]{2}', txt) else ' '    # of computed tables: names, no numbers and signs

def first(anchor): return re.sub(r'-\d+$', '', anchor)    # pandoc numbers anchors of equal headings

class Sections(HTMLParser):
    "What search knows of a page: `[anchor, heading, text, signature]` of each section of its `<main>`"
    void = {'area', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'wbr'}
    def __init__(self, txt, symbols):
        super().__init__()
        self.symbols,self.sections,self.open,self.into = symbols,[],[],None
        self.feed(txt)
        self.sections = [[anchor, ' '.join(head.split()), ' '.join(body.split()), sig.strip()] for anchor,head,body,sig in self.sections]

    def skipped(self, tag, attrs):
        "Whether what this tag holds is not searched: True, False, or None for what stands outside tables only"
        if tag in ('annotation', 'footer', 'style', 'svg', 'script'): return True
        if attrs.get('class')=='cell-output': return None
        return attrs.get('class')=='colab' or 'float' in attrs.get('style', '')    # floating: show_doc's source link

    def handle_starttag(self, tag, attrs):
        attrs = {k:v or '' for k,v in attrs}
        if tag=='br': self.handle_data(' ')
        if tag in self.void: return
        self.open.append((tag, self.skipped(tag, attrs)))
        if not self.main: return
        if re.fullmatch('h[1-4]', tag):
            self.sections.append([attrs.get('id', ''), '', '', ''])
            self.into = 1
        elif tag=='pre' and self.sections and attrs.get('class', '').startswith('sourceCode') and self.signature: self.into = 3
        elif tag in ('p', 'pre', 'td', 'th', 'li', 'summary', 'caption'): self.handle_data(' ')

    @property
    def main(self): return any(t=='main' for t,_ in self.open)
    @property
    def signature(self):
        anchor,_,txt,sig = self.sections[-1]
        return first(anchor) in self.symbols and not txt.strip() and not sig

    def handle_endtag(self, tag):
        if any(t==tag for t,_ in self.open):
            while self.open.pop()[0]!=tag: pass
        if re.fullmatch('h[1-4]|pre', tag): self.into = 2

    @property
    def out_of_table(self): return any(o is None for _,o in self.open) and not any(t=='table' for t,_ in self.open)

    def handle_data(self, data):
        if not (self.main and self.sections) or any(o for _,o in self.open) or self.out_of_table: return
        in_output = any(o is None for _,o in self.open)
        self.sections[-1][self.into] += words_only(data) if in_output else data

def call(signature):
    "The parameters of a signature as `show_doc` writes it, in one line without comments and types: what one types"
    try: f = ast.parse(signature.rstrip()+'\n    pass').body[0]
    except SyntaxError: return ''
    for o in ast.walk(f.args):
        if isinstance(o, ast.arg): o.annotation = None
    return f'{f.name}({ast.unparse(f.args)})'

def search_entries(page, title, txt, symbols):
    "`[symbol?, title, page's title, link, signature, text]` of each section and exported symbol of a page"
    res = {}
    for anchor,head,body,sig in Sections(txt, symbols).sections:
        before = res.get(first(anchor))
        link = f'{page}#{anchor}' if anchor else page
        if before and before[0] and head==before[1]: before[4:] = call(sig), f'{before[5]} {body}'    # a symbol's definition below its story
        else: res[anchor] = [int(anchor in symbols), symbols.get(anchor, head), title, link, call(sig), body]
    for anchor,name in symbols.items():
        if anchor not in res and not re.search(r'(^|\.)_', name): res[anchor] = [1, name, title, f'{page}#{anchor}', '', '']
    return list(res.values())

# pages

def sidebar_entries(contents):
    "Flatten `sidebar.yml` contents into `(section or None, notebook)` in reading order"
    for o in contents:
        if isinstance(o, str): yield None, o
        else: yield from ((o['section'], p) for p in o['contents'])

def sidebar():
    contents = yaml.safe_load((cfg.nbs_path/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return list(sidebar_entries(contents))

def sidebar_html(entries, titles, here, up):
    res, last = [], None
    for section,nb in entries:
        if nb not in titles: continue
        if section!=last: res.append(f'<h2>{html.escape(section)}</h2>')
        last = section
        cur = ' aria-current="page"' if nb==here else ''
        res.append(f'<a href="{up}{nbpath2html(nb).as_posix()}"{cur}>{html.escape(titles[nb])}</a>')
    return '\n'.join(res)

def colab_url(nb):
    repo = cfg.git_url.replace('https://github.com', 'https://colab.research.google.com/github')
    return f'{repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{nb}'

def is_current(out):
    "Whether the site in `out` was built after the last change of what it is made from"
    made_from = [p for o in (cfg.nbs_path, cfg.lib_path, tools) for p in o.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    index = out/'search-index.js'    # written last
    return index.exists() and index.stat().st_mtime > max(p.stat().st_mtime for p in made_from)

def build(out):
    "Render all processed notebooks to `out`"
    refresh_quarto_yml()
    cache = proc_nbs(str(cfg.nbs_path), force=True, n_workers=0)   # each worker would import all libraries first
    shutil.rmtree(out, ignore_errors=True)
    nbs = sorted(p.relative_to(cache).as_posix() for p in cache.rglob('*.ipynb'))
    pages = {nb:nb_md(read_nb(cache/nb), saver(out/nbpath2html(nb).with_suffix('').as_posix(), nbpath2html(nb).stem)) for nb in nbs}
    titles = {nb:meta.get('title', Path(nb).stem) for nb,(meta,_) in pages.items()}
    entries,syms,index = sidebar(),symbols(),[]
    order = [nb for _,nb in entries if nb in titles]
    for nb,(meta,md) in pages.items():
        page = nbpath2html(nb)
        up = '../' * (len(page.parts)-1)
        about = meta.get('description', '')
        values = dict(root=up, site=cfg.title, title=titles[nb], home=str(nb=='index.ipynb' or ''), repo=cfg.git_url,
                      description=inline_html(about), summary=html.escape(re.sub('[`*$]', '', about)),
                      nav=sidebar_html(entries, titles, nb, up), source=f'{cfg.git_url}/blob/{cfg.branch}/{cfg.nbs_path.name}/{nb}')
        if nb.startswith('tutorials/'): values['colab'] = colab_url(nb)
        i = order.index(nb) if nb in order else None
        for k,j in (('prev', -1), ('next', 1)):
            if i is not None and 0<=i+j<len(order):
                values |= {f'{k}url': up+nbpath2html(order[i+j]).as_posix(), f'{k}title': titles[order[i+j]]}
        args = ['--standalone', f'--template={tools/"page.html"}', '--mathml', '--toc', '--toc-depth=3', '--wrap=preserve', '--email-obfuscation=none',
                '-M', 'pagetitle='+titles[nb]]
        args += [o for k,v in values.items() if v for o in ('-V', f'{k}={v}')]
        dest = out/page
        dest.parent.mkdir(parents=True, exist_ok=True)
        txt = symbol_anchors(pandoc(md, 'html5', up, args), syms[page.as_posix()])
        dest.write_text(txt, encoding='utf-8')
        index += search_entries(page.as_posix(), titles[nb], txt, syms[page.as_posix()])
    for f in cache.rglob('*'):
        if f.suffix in assets: shutil.copy(f, (out/f.relative_to(cache)).parent.resolve())
    for f in ('site.css', 'site.js'): shutil.copy(tools/f, out)
    # a script, not JSON: pages opened as files may load scripts only
    (out/'search-index.js').write_text(f'window.searchIndex = {json.dumps(index, ensure_ascii=False)}\n', encoding='utf-8')

def readme(out=root):
    "README.md (and its images in `README_files/`) in `out`, from the index notebook"
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    FilterDefaults()(nb)
    shutil.rmtree(out/'README_files', ignore_errors=True)
    meta,md = nb_md(nb, saver(out/'README_files', 'README_files'))
    md = re.sub(r'<style.*?</style>\s*', '', md, flags=re.S)
    md = f"# {meta['title']}\n\n> {meta['description']}\n\n{md}" if 'description' in meta else f"# {meta.get('title', cfg.title)}\n\n{md}"
    (out/'README.md').write_text(pandoc(md, 'gfm', args=['--wrap=preserve']), encoding='utf-8')

# addresses of 0.1.0

redirect = """<!doctype html><meta charset="utf-8"><title>{first}</title><link rel="canonical" href="{first}">
<p>This page is now <a href="{first}">{first}</a>.</p>
<script>const pages = {pages}, anchor = location.hash.slice(1); location.replace((pages[anchor] || '{first}') + location.search + location.hash)</script>
<noscript><meta http-equiv="refresh" content="0; url={first}"></noscript>
"""

def write_redirects(out):
    "A page at each address that a module had in 0.1.0, which leads on to where the module, or the symbol after `#`, is now"
    syms = symbols()
    for old,new in moved.items():
        pages = [f'{o}.html' for o in new]
        anchors = {anchor:page for page in pages[1:] for anchor in syms[page]}
        (out/f'{old}.html').write_text(redirect.format(first=pages[0], pages=json.dumps(anchors)), encoding='utf-8')

# link check

class Page(HTMLParser):
    "The ids of a page, its links, what a browser would load for it, and links that are still Markdown"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.raw, self.in_pre = set(), [], [], [], 0
        self.feed(Path(path).read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.in_pre += tag=='pre'
        self.ids.update(o for o in (attrs.get('id'), attrs.get('name') if tag=='a' else None) if o)
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        if attrs.get('src'): self.loads.append(attrs['src'])
        if tag=='link' and attrs.get('href') and attrs.get('rel') not in ('canonical', 'alternate'): self.loads.append(attrs['href'])

    def handle_endtag(self, tag): self.in_pre -= tag=='pre'
    def handle_data(self, data):
        if not self.in_pre: self.raw += re.findall(r'\]\([^\s)]+[#.:/][^\s)]*\)', data)

def check_links(site):
    "One line per internal link, anchor or file of the built `site` that leads nowhere, per request to another host, and per link left as Markdown"
    site = Path(site).resolve()
    pages = {p:Page(p) for p in sorted(site.rglob('*.html'))}
    bad = []
    for path,page in pages.items():
        bad += [f'{path.relative_to(site).as_posix()}: ...{o} (Markdown; a link on code is one too many, as nbdev links symbols itself)' for o in page.raw]
        for target in page.links+page.loads:
            u = urlsplit(target)
            where = f'{path.relative_to(site).as_posix()}: {target}'
            if u.scheme or u.netloc:
                if target in page.loads and u.scheme!='data': bad.append(f'{where} (loaded from another host)')
                continue
            dest = (path.parent/unquote(u.path)).resolve() if u.path else path
            if dest.is_dir(): dest = dest/'index.html'
            if   not dest.exists(): bad.append(f'{where} (no such file)')
            elif u.fragment and dest in pages and unquote(u.fragment) not in pages[dest].ids: bad.append(f'{where} (no such anchor)')
    return bad

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--readme', action='store_true', help='only write README.md')
    args = p.parse_args()
    os.chdir(root)
    readme()
    if args.readme: return
    if shutil.which('quarto'): subprocess.run([sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs()'], check=True)
    elif not is_current(cfg.doc_path): build(cfg.doc_path)
    write_redirects(cfg.doc_path)
    bad = check_links(cfg.doc_path)
    if bad: sys.exit('\n'.join(['Broken links:', *bad]))
    print(f'{len(list(cfg.doc_path.rglob("*.html")))} pages in {cfg.doc_path.relative_to(root)}/, links checked')

if __name__=='__main__': main()
