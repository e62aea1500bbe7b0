// Columns of tokens. value: {run, columns: [{title, note}], add: [[column, place of the first, [token]]], done: [[column, {name: text}]],
// whole: [[token]] once it has ended, fixed: whether it is a finished example}. token: {t text, i id, k KL, s surprise, g gate, a [[id, text, p]], b the same}.
const root = () => element.querySelector('.steer-tokens');
let run = null, columns = [], mode = 'kl', pinned = null, blind = false, order = [], fixed = false;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function build(value) {
  root().replaceChildren();
  columns = []; pinned = null; run = value.run; fixed = Boolean(value.fixed);
  if (!value.columns.length) return;
  const bar = make('div', 'bar');
  const group = make('fieldset', 'colours');
  group.append(make('legend', '', 'Colour tokens by'));
  const ways = [['kl', 'KL: how far the odds moved'], ['s', 'surprise to the unsteered model'], ['g', 'gate'], ['', 'nothing']];
  for (const [key, label] of ways.filter(([key]) => !(fixed && key === 'g'))) {
    const wrap = make('label'), input = make('input');
    input.type = 'radio'; input.name = 'colour-' + element.id; input.checked = key === mode;
    input.addEventListener('change', () => { mode = key; paint(); });
    wrap.append(input, document.createTextNode(label));
    group.append(wrap);
  }
  bar.append(group);
  if (value.columns.length > 1) {
    const button = make('button', 'blind', blind ? 'Reveal which is which' : 'Blind comparison');
    button.type = 'button';
    button.setAttribute('aria-pressed', String(blind));
    button.addEventListener('click', () => {
      blind = !blind;
      if (blind) order = [...columns.keys()].sort(() => Math.random() - 0.5);
      button.textContent = blind ? 'Reveal which is which' : 'Blind comparison';
      button.setAttribute('aria-pressed', String(blind));
      titles(); paint(); show(null);
    });
    bar.append(button);
  }
  const grid = make('div', 'grid');
  value.columns.forEach((column, index) => {
    const box = make('section', 'column');
    box.setAttribute('aria-label', column.title);
    const title = make('h3', '', column.title), note = make('p', 'note', column.note || '');
    const text = make('div', 'text');
    text.setAttribute('role', 'group');
    text.setAttribute('aria-label', column.title + ', token by token');
    const facts = make('dl', 'facts');
    box.append(title, note, text, facts);
    grid.append(box);
    columns.push({ column, box, title, note, text, facts, tokens: [] });
  });
  order = [...columns.keys()];
  const detail = make('div', 'detail');
  detail.setAttribute('role', 'region');
  detail.setAttribute('aria-label', 'The chosen token');
  root().append(bar, grid, detail);
  titles(); show(null);
}

function titles() {
  const grid = root().querySelector('.grid');
  order.forEach((index, place) => {
    const c = columns[index];
    grid.append(c.box);
    c.title.textContent = blind ? 'Text ' + 'ABC'[place] : c.column.title;
    c.note.textContent = blind ? '' : c.column.note || '';
    c.box.setAttribute('aria-label', c.title.textContent);
    c.text.setAttribute('aria-label', c.title.textContent + ', token by token');
    c.facts.hidden = blind;
  });
}

function strength(token) {
  if (blind || !mode) return 0;
  if (mode === 'kl') return Math.min(1, Math.sqrt(Math.max(0, token.k) / 2));
  if (mode === 's') return Math.min(1, Math.max(0, token.s) / 8);
  return Math.min(1, Math.abs(token.g || 0));
}

function tint(span, token) {
  const value = strength(token);
  span.style.setProperty('--heat', value.toFixed(3));
  span.classList.toggle('hot', value > 0.35);
}

function paint() {
  for (const c of columns) c.tokens.forEach((token, i) => tint(c.text.children[i], token));
}

function add(index, at, fresh) {
  const c = columns[index];
  // An update may be seen twice, or never: what is there already is left out, and a gap waits for the whole.
  if (!c || at > c.tokens.length) return;
  for (const token of fresh.slice(c.tokens.length - at)) {
    const span = make('span', 'tok', token.t === '' ? '·' : token.t);
    if (!token.t.trim()) span.setAttribute('aria-label', token.t.includes('\n') ? 'line break' : token.t ? 'space' : 'no text');
    span.setAttribute('role', 'button');
    span.tabIndex = c.tokens.length ? -1 : 0;
    span.setAttribute('aria-pressed', 'false');
    span.dataset.column = index; span.dataset.at = c.tokens.length;
    tint(span, token);
    c.tokens.push(token);
    c.text.append(span);
  }
}

function facts(index, entries) {
  const c = columns[index];
  if (!c) return;
  c.facts.replaceChildren();
  for (const [name, text, why] of entries) {
    const row = make('div');
    row.append(make('dt', '', name), make('dd', '', text));
    if (why) row.title = why;
    c.facts.append(row);
  }
}

function percent(p) { return p >= 0.0995 ? (100 * p).toFixed(0) + ' %' : (100 * p).toFixed(1) + ' %'; }

function shownText(text) { return text.replace(/\n/g, '⏎').replace(/^ /, '␣'); }

function list(title, entries, chosen, act) {
  const box = make('div', 'odds');
  box.append(make('h4', '', title));
  const items = make('ol');
  for (const [id, text, p] of entries) {
    const item = make('li');
    const label = shownText(text) || '·';
    let name;
    if (act && id !== chosen) {
      name = make('button', 'go', label);
      name.type = 'button';
      name.title = 'Go on from here with this token';
      name.setAttribute('aria-label', 'Go on from here with ' + label);
      name.addEventListener('click', () => act(id));
    } else name = make('span', 'name', label);
    const bar = make('span', 'bar-of');
    bar.style.setProperty('--p', (100 * p).toFixed(1) + '%');
    item.append(name, bar, make('span', 'p', percent(p)));
    if (id === chosen) item.className = 'chosen';
    items.append(item);
  }
  box.append(items);
  return box;
}

function show(at) {
  const detail = root().querySelector('.detail');
  if (!detail) return;
  detail.replaceChildren();
  if (!at) {
    detail.append(make('p', 'hint', 'Point at a token, or move with the arrow keys, to see what was likely there before and after steering.' + (fixed ? '' : ' Click it to keep it, then go on from there with another token.')));
    return;
  }
  const c = columns[at.column], token = c.tokens[at.at];
  const head = make('p', 'head');
  head.append(make('strong', '', shownText(token.t) || '·'));
  head.append(document.createTextNode(blind ? '' : `  KL ${token.k.toFixed(3)} nats · surprise to the unsteered model ${token.s.toFixed(2)} nats` + (token.g === undefined || token.g === null ? '' : ` · gate ${token.g.toFixed(2)}`)));
  const go = (id) => trigger('fork', { column: at.column, script: [...c.tokens.slice(0, at.at).map((t) => t.i), id], run });
  const both = make('div', 'both');
  const act = fixed ? null : go;
  both.append(list('Before: the unsteered model, at this very place', token.b, token.i, act));
  both.append(list(blind ? 'After' : 'After: ' + c.column.title.toLowerCase(), token.a, token.i, act));
  detail.append(head, both);
}

function chosen(target) {
  const span = target.closest && target.closest('.tok');
  return span ? { column: +span.dataset.column, at: +span.dataset.at, span } : null;
}

function pin(at) {
  for (const span of root().querySelectorAll('.tok[aria-pressed="true"]')) span.setAttribute('aria-pressed', 'false');
  pinned = at;
  if (at) at.span.setAttribute('aria-pressed', 'true');
  show(at);
}

function walk(from, event) {
  const text = from.span.parentElement, spans = text.children, last = spans.length - 1;
  const to = { ArrowRight: from.at + 1, ArrowLeft: from.at - 1, Home: 0, End: last }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    const next = spans[Math.max(0, Math.min(last, to))];
    for (const s of spans) s.tabIndex = -1;
    next.tabIndex = 0; next.focus();
  } else if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault(); pin(from);
  } else if (event.key === 'Escape') pin(null);
}

element.addEventListener('mouseover', (e) => { const at = chosen(e.target); if (at && !pinned) show(at); });
element.addEventListener('focusin', (e) => { const at = chosen(e.target); if (at && !pinned) show(at); });
element.addEventListener('click', (e) => { const at = chosen(e.target); if (at) pin(pinned && pinned.span === at.span ? null : at); });
element.addEventListener('keydown', (e) => { const at = chosen(e.target); if (at) walk(at, e); });

function apply() {
  const value = props.value;
  if (!value) return;
  if (value.run !== run || !root().firstChild) build(value);
  for (const [index, at, fresh] of value.add || []) add(index, at, fresh);
  (value.whole || []).forEach((all, index) => {
    const c = columns[index];
    if (!c) return;
    const same = c.tokens.length === all.length && all.every((token, i) => token.i === c.tokens[i].i);
    if (!same) { c.text.replaceChildren(); c.tokens = []; add(index, 0, all); }
  });
  for (const [index, entries] of value.done || []) facts(index, entries);
  root().dataset.run = value.whole ? value.run : '';
}

watch('value', apply);
apply();
