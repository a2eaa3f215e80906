// Theme, search and small comforts of the site built without Quarto. Plain JavaScript, no network: works from file:// too.
(() => {
'use strict'
const root = new URL('.', document.currentScript.src), html = document.documentElement
const el = (tag, cls, ...kids) => { const e = document.createElement(tag); e.className = cls; e.append(...kids); return e }

// Theme: the system's, until the button says otherwise
const dark = matchMedia('(prefers-color-scheme: dark)')
document.getElementById('theme').onclick = () => {
  const system = dark.matches ? 'dark' : 'light', next = (html.dataset.theme || system) === 'dark' ? 'light' : 'dark'
  if (next === system) delete html.dataset.theme
  else html.dataset.theme = next
  try { next === system ? localStorage.removeItem('theme') : localStorage.setItem('theme', next) } catch {}
}

// Search: window.searchIndex holds one [symbol?, title, page's title, link, signature, text] per section of the site
const box = document.getElementById('search'), list = document.getElementById('found')
const greek = {α: 'alpha', β: 'beta', γ: 'gamma', δ: 'delta', ε: 'epsilon', κ: 'kappa', λ: 'lambda', τ: 'tau'}
const fold = o => o.toLowerCase()
const plain = o => fold(o).replace(/[α-ω]/g, c => greek[c] || c)    // α is found as alpha, and alpha as α
const closed = o => plain(o).replace(/[^\p{L}\p{N}]+/gu, '')    // so that huggingface finds Hugging Face
const filler = new Set('a an and are can do does for from how i in is it me my of on or the to use what when where which with'.split(' '))
let index = null, chosen = -1, vocabulary = []

function load() {
  if (index) return
  index = []
  const script = document.createElement('script')
  script.onload = () => {
    index = window.searchIndex.map(([symbol, title, page, url, signature, text]) =>
      ({symbol, title, page, url, signature, text, low: symbol ? plain(title) : `${plain(title)} ${closed(title)}`, all: plain(`${title} ${page} ${signature} ${text} ${closed(title)} ${closed(page)}`)}))
    const counts = new Map()
    for (const o of index) for (const w of o.all.match(/[\p{L}\p{N}_]{3,}/gu) || []) counts.set(w, (counts.get(w) || 0) + 1)
    vocabulary = [...counts]
    search()
  }
  script.src = new URL('search-index.js', root)
  document.head.append(script)
}

// how many letters must be changed, added, left out or swapped with their neighbour; more than `most` are not told apart
function distance(a, b, most) {
  if (Math.abs(a.length - b.length) > most) return most+1
  let before = [], last = [...Array(b.length+1).keys()]
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(last[j]+1, row[j-1]+1, last[j-1] + (a[i-1] !== b[j-1]))
      if (i > 1 && j > 1 && a[i-1] === b[j-2] && a[i-2] === b[j-1]) row[j] = Math.min(row[j], before[j-2]+1)
    }
    if (Math.min(...row) > most) return most+1
    before = last
    last = row
  }
  return last[b.length]
}

// a word that is nowhere on the site becomes the nearest one, or the nearest beginning of one; the more frequent first
function meant(word) {
  if (word.length < 4 || index.some(o => o.all.includes(word))) return word
  const most = word.length < 8 ? 1 : 2
  let best = [word, most+.5, 0]
  for (const [w, n] of vocabulary) {
    let d = distance(word, w, most)
    if (d > most && w.length > word.length) d = distance(word, w.slice(0, word.length), most) + .25
    if (d < best[1] || d === best[1] && n > best[2]) best = [w, d, n]
  }
  return best[0]
}

// lower comes first: exact symbol, symbol's beginning, heading, inside a symbol or a symbol's method, text
function rank(o, query, words) {
  const name = o.symbol ? o.low : ''
  if (name && name === query) return o.title === box.value.trim() ? 0 : 1
  if (name && name.startsWith(query) && !name.includes('.', query.length)) return 2
  if (words.every(w => o.low.includes(w))) return o.symbol ? 5 : o.low.startsWith(query) ? 3 : 4
  return words.every(w => o.all.includes(w)) ? o.all.includes(query) ? 6 : 7 : null
}

function marked(text, words) {
  const low = fold(text), first = Math.min(...words.map(w => low.indexOf(w)).filter(i => i >= 0), text.length)
  const from = first < 30 || first === text.length ? 0 : first-20
  let rest = (from ? '…' : '') + text.slice(from, from+160)
  const out = el('span', 'text')
  while (rest) {
    const hits = words.map(w => [fold(rest).indexOf(w), w.length]).filter(h => h[0] >= 0).sort((a, b) => a[0]-b[0] || b[1]-a[1])
    if (!hits.length) break
    const [i, n] = hits[0]
    out.append(rest.slice(0, i), el('mark', '', rest.slice(i, i+n)))
    rest = rest.slice(i+n)
  }
  out.append(rest)
  return out
}

function row(o, i, words) {
  const head = el('span', 'title', o.symbol ? el('code', '', o.title) : o.title, el('span', 'page', o.page))
  const a = el('a', '', head)
  if (o.signature) a.append(el('code', 'text', o.signature))
  else if (o.text) a.append(marked(o.text, words))
  Object.assign(a, {href: new URL(o.url, root), id: `found-${i}`})
  a.setAttribute('role', 'option')
  a.onmousemove = () => choose(i)
  a.onclick = () => close()
  return a
}

function search() {
  const asked = plain(box.value.trim()).split(/\s+/), told = asked.filter(w => !filler.has(w)), given = told.length ? told : asked
  if (!asked[0]) return close()
  const words = given.map(meant), query = words.join(' ')
  let hits = index.map(o => [rank(o, query, words), o]).filter(([r]) => r !== null)
  if (!hits.length && words.length > 1) {    // no section has all the words: those that have most of them
    const counted = index.map(o => [words.filter(w => o.all.includes(w)).length, o]), most = Math.max(0, ...counted.map(([n]) => n))
    if (most) hits = counted.filter(([n]) => n === most).map(([, o]) => [words.some(w => o.low.includes(w)) ? o.symbol ? 9 : 8 : 10, o])
  }
  hits.sort(([r, a], [s, b]) => r-s || a.title.length-b.title.length || a.url.includes('#')-b.url.includes('#'))
  list.replaceChildren(...hits.slice(0, 20).map(([, o], i) => row(o, i, words)))
  if (hits.length && words.some((w, i) => w !== given[i])) list.prepend(el('p', '', `Nothing found for “${box.value.trim()}”. Shown: “${query}”`))
  if (!hits.length) list.append(el('p', '', window.searchIndex ? `Nothing found for “${box.value.trim()}”` : 'Loading…'))
  list.hidden = false
  box.setAttribute('aria-expanded', true)
  choose(hits.length ? 0 : -1)
}

function choose(i) {
  const rows = list.querySelectorAll('a')
  chosen = rows.length ? (i + rows.length) % rows.length : -1
  rows.forEach((a, j) => a.setAttribute('aria-selected', j === chosen))
  if (chosen < 0) return box.removeAttribute('aria-activedescendant')
  box.setAttribute('aria-activedescendant', rows[chosen].id)
  rows[chosen].scrollIntoView({block: 'nearest'})
}

function close() {
  list.hidden = true
  box.setAttribute('aria-expanded', false)
  box.removeAttribute('aria-activedescendant')
}

box.onfocus = () => { load(); if (box.value) search() }
box.oninput = () => { load(); search() }
box.onkeydown = e => {
  const rows = list.hidden ? [] : list.querySelectorAll('a')
  if (e.key === 'Escape') { box.value = ''; close(); box.blur() }
  else if (e.key === 'ArrowDown' && rows.length) choose(chosen+1)
  else if (e.key === 'ArrowUp' && rows.length) choose(chosen-1)
  else if (e.key === 'Enter' && rows.length) rows[chosen].click()
  else return
  e.preventDefault()
}
document.addEventListener('keydown', e => {
  const typing = e.target.closest('input, textarea, select, [contenteditable]')
  if (e.key === '/' && !typing && !e.ctrlKey && !e.metaKey && !e.altKey || e.key === 'k' && (e.ctrlKey || e.metaKey)) {
    e.preventDefault()
    box.focus()
    box.select()
  }
})
document.addEventListener('pointerdown', e => { if (!e.target.closest('.search')) close() })
const asked = new URLSearchParams(location.search).get('q')    // index.html?q=LsrKDLoss
if (asked) { box.value = asked; box.focus(); load() }

// Links to headings, copy buttons, the section being read, the page's entry in the sidebar
const heads = [...document.querySelectorAll('main :is(h2, h3, h4)[id]')]
for (const h of heads) {
  const a = el('a', 'anchor', '#')
  a.href = '#' + h.id
  a.setAttribute('aria-label', 'Link to this section')
  h.append(a)
}

for (const code of document.querySelectorAll('main div.sourceCode')) if (navigator.clipboard) {
  const b = el('button', 'copy', 'Copy')
  b.onclick = () => navigator.clipboard.writeText(code.querySelector('code').textContent).then(() => {
    b.textContent = 'Copied'
    setTimeout(() => b.textContent = 'Copy', 1500)
  })
  code.append(b)
}

const entries = new Map([...document.querySelectorAll('.toc a')].map(a => [decodeURIComponent(a.hash.slice(1)), a]))
function follow() {
  const read = heads.filter(h => entries.has(h.id) && h.getBoundingClientRect().top < 120).pop()
  for (const [id, a] of entries) a.toggleAttribute('aria-current', read?.id === id)
}
if (entries.size) { addEventListener('scroll', () => requestAnimationFrame(follow), {passive: true}); follow() }

const here = document.querySelector('.sidebar [aria-current]'), side = document.querySelector('.sidebar')
if (here && here.offsetTop + 50 > side.clientHeight) side.scrollTop = here.offsetTop - side.clientHeight/2
})()
