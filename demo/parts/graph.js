// What parts that draw have in common: elements, colours, and nodes that are chosen by pointer or by keys.
const SPACE = 'http://www.w3.org/2000/svg';
let picked = null;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value) { return value === null || value === undefined ? 'not known' : (+value).toFixed(3); }

// From blue (the lowest) over grey to orange (the highest).
function colour(value, low, high) {
  if (value === null || value === undefined || !(high > low)) return 'rgb(148 163 184)';
  const t = (value - low) / (high - low), [a, b, u] = t < 0.5 ? [[37, 99, 235], [148, 163, 184], 2 * t] : [[148, 163, 184], [234, 88, 12], 2 * t - 1];
  return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * u)).join(' ')})`;
}

function range(values) {
  const known = values.filter((v) => v !== null && v !== undefined);
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 0];
}

// Ticks at round numbers within [low, high].
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + 1e-9 * step; x += step) found.push(+x.toPrecision(8));
  return found;
}

// Nodes {id, x, y, r, fill, faint, told, title, text} and lines {from: [x, y], to: [x, y], faint}; one node is chosen by a click or
// by keys and is told of below. `order` are the nodes by columns, for the arrow keys.
function network(box, { width, height, label, nodes, lines, names }) {
  const kept = document.activeElement && box.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const wrap = make('div', 'scroll');
  const drawn = shape('svg', { viewBox: `0 0 ${width} ${height}`, width, height, role: 'group', 'aria-label': label });
  for (const { from: [x, y], to: [u, v], faint } of lines) {
    const m = (x + u) / 2;
    drawn.append(shape('path', { d: `M${x} ${y} C${m} ${y} ${m} ${v} ${u} ${v}`, class: faint ? 'line faint' : 'line' }));
  }
  for (const [x, text] of names) drawn.append(shape('text', { x, y: height - 4, class: 'name', 'text-anchor': 'middle' }, text));
  const columns = [...new Set(nodes.map((n) => n.x))].sort((a, b) => a - b);
  const detail = make('div', 'told');
  detail.setAttribute('role', 'region');
  detail.setAttribute('aria-label', 'The chosen node');
  detail.tabIndex = 0;
  const show = (node) => {
    detail.replaceChildren();
    if (!node) { detail.append(make('p', 'hint', 'Click a node, or move with the arrow keys, to read what was written there.')); return; }
    detail.append(make('p', 'head', node.title), make('p', 'text', node.text || '(nothing yet)'));
  };
  const marks = new Map();
  const pick = (node, focus) => {
    picked = node ? node.id : null;
    for (const [id, mark] of marks) {
      mark.setAttribute('aria-pressed', String(id === picked));
      mark.setAttribute('tabindex', id === picked ? '0' : '-1');
    }
    show(node);
    if (node && focus) marks.get(node.id).focus();
  };
  const walk = (node, key) => {
    const at = columns.indexOf(node.x), near = (some) => some.sort((a, b) => Math.abs(a.y - node.y) - Math.abs(b.y - node.y))[0];
    if (key === 'ArrowRight' || key === 'ArrowLeft') return near(nodes.filter((n) => n.x === columns[at + (key === 'ArrowRight' ? 1 : -1)]));
    const mine = nodes.filter((n) => n.x === node.x).sort((a, b) => a.y - b.y), i = mine.indexOf(node);
    return { ArrowUp: mine[i - 1], ArrowDown: mine[i + 1] }[key];
  };
  for (const node of nodes) {
    const mark = shape('circle', { cx: node.x, cy: node.y, r: node.r, fill: node.fill, class: node.faint ? 'node faint' : 'node', role: 'button', 'aria-label': node.title, 'aria-pressed': 'false', tabindex: '-1' });
    mark.dataset.id = node.id;
    mark.append(shape('title', {}, node.title));
    mark.addEventListener('click', () => pick(picked === node.id ? null : node));
    mark.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pick(node, true); return; }
      const next = walk(node, event.key);
      if (next) { event.preventDefault(); pick(next, true); }
    });
    marks.set(node.id, mark);
    drawn.append(mark);
  }
  wrap.append(drawn);
  box.append(wrap, detail);
  pick(nodes.find((n) => n.id === picked) || null, false);
  if (nodes.length && !marks.has(picked)) marks.get(nodes[0].id).setAttribute('tabindex', '0');
  if (kept && marks.has(kept)) marks.get(kept).focus();
}

// Axes within a box of `width` x `height` with room for numbers; gives the places of values.
function axes(drawn, { width, height, left, bottom, xs: [x0, x1], ys: [y0, y1], xName, yName }) {
  const right = 12, top = 10;
  const x = (v) => left + (width - left - right) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
  const y = (v) => height - bottom - (height - bottom - top) * (y1 > y0 ? (v - y0) / (y1 - y0) : 0.5);
  for (const t of ticks(y0, y1, 5)) {
    drawn.append(shape('line', { x1: left, x2: width - right, y1: y(t), y2: y(t), class: 'grid' }));
    drawn.append(shape('text', { x: left - 6, y: y(t) + 4, class: 'name', 'text-anchor': 'end' }, String(t)));
  }
  for (const t of ticks(x0, x1, 7)) drawn.append(shape('text', { x: x(t), y: height - bottom + 16, class: 'name', 'text-anchor': 'middle' }, String(t)));
  drawn.append(shape('text', { x: (left + width) / 2, y: height - 4, class: 'name', 'text-anchor': 'middle' }, xName));
  drawn.append(shape('text', { x: 12, y: (height - bottom) / 2, class: 'name', 'text-anchor': 'middle', transform: `rotate(-90 12 ${(height - bottom) / 2})` }, yName));
  return { x, y };
}
