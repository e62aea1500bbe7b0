// Reward against KL. value: {points: [{method, setting, reward: [mean, half], kl: [mean, half] or null, kind, tokens, front, texts: [[prompt, text, reward]]}]}.
const COLOURS = ['#2563eb', '#ea580c', '#16a34a', '#9333ea', '#0891b2', '#ca8a04', '#db2777', '#64748b'];
let hidden = new Set(), kept = null;

function label(point) { return point.method === 'base' ? 'the model as it is' : `${point.method}, ${point.setting}`; }

function told(point) {
  const plus = ([mean, half]) => number(mean) + (half === null ? '' : ` ± ${number(half)}`);
  return `${label(point)}: reward ${plus(point.reward)}, KL ${point.kl ? plus(point.kl) + ` nats (${point.kind})` : `not known (${point.kind})`}, ${point.tokens} tokens a prompt${point.front ? '; nothing has more reward at no more KL' : ''}`;
}

function save(name, type, parts) {
  const link = make('a');
  link.href = URL.createObjectURL(new Blob(parts, { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csv(points) {
  const cell = (x) => (x === null || x === undefined ? '' : /[",\n]/.test(String(x)) ? `"${String(x).replace(/"/g, '""')}"` : String(x));
  const rows = [['method', 'setting', 'reward', 'reward_half', 'kl', 'kl_half', 'kind_of_kl', 'tokens', 'non_dominated']];
  for (const p of points) rows.push([p.method, p.setting, ...p.reward, ...(p.kl || [null, null]), p.kind, p.tokens, p.front]);
  save('frontier.csv', 'text/csv', [rows.map((row) => row.map(cell).join(',')).join('\n') + '\n']);
}

function png(drawn) {
  const copy = drawn.cloneNode(true), box = drawn.viewBox.baseVal;
  const mine = [drawn, ...drawn.querySelectorAll('*')], theirs = [copy, ...copy.querySelectorAll('*')];
  mine.forEach((one, i) => {
    const style = getComputedStyle(one);
    for (const name of ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-size', 'font-family']) theirs[i].style.setProperty(name, style.getPropertyValue(name));
  });
  copy.setAttribute('width', 2 * box.width);
  copy.setAttribute('height', 2 * box.height);
  const image = new Image();
  image.onload = () => {
    const canvas = make('canvas'), context = canvas.getContext('2d');
    canvas.width = 2 * box.width; canvas.height = 2 * box.height;
    context.fillStyle = getComputedStyle(document.body).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0);
    canvas.toBlob((blob) => save('frontier.png', 'image/png', [blob]));
  };
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(new XMLSerializer().serializeToString(copy));
}

function draw() {
  const box = element.querySelector('.steer-frontier'), points = (props.value && props.value.points) || [];
  box.replaceChildren();
  if (!points.length) return;
  const methods = [...new Set(points.map((p) => p.method))], hue = (method) => COLOURS[methods.indexOf(method) % COLOURS.length];
  const bar = make('div', 'bar');
  for (const method of methods) {
    const wrap = make('label'), input = make('input'), swatch = make('span', 'swatch');
    input.type = 'checkbox'; input.checked = !hidden.has(method);
    input.addEventListener('change', () => { if (input.checked) hidden.delete(method); else hidden.add(method); draw(); });
    swatch.style.background = hue(method);
    wrap.append(input, swatch, document.createTextNode(method));
    bar.append(wrap);
  }
  const shown = points.map((p, i) => ({ ...p, i })).filter((p) => !hidden.has(p.method)), known = shown.filter((p) => p.kl);
  const width = 760, height = 400;
  const drawn = shape('svg', { viewBox: `0 0 ${width} ${height}`, class: 'fits', role: 'group', 'aria-label': `Reward against KL, ${known.length} points` });
  const xs = known.flatMap(({ kl: [k, h] }) => [k - (h || 0), k + (h || 0)]), ys = known.flatMap(({ reward: [r, h] }) => [r - (h || 0), r + (h || 0)]);
  const [y0, y1] = range(ys), pad = 0.06 * (y1 - y0 || 1);
  const { x, y } = axes(drawn, { width, height, left: 56, bottom: 40, xs: [Math.min(0, range(xs)[0]), Math.max(range(xs)[1], 0.1)], ys: [y0 - pad, y1 + pad], xName: 'KL to the model, nats a text', yName: 'reward, mean over prompts' });
  const most = Math.max(...points.map((p) => p.tokens)), detail = make('div', 'told');
  detail.setAttribute('role', 'region');
  detail.setAttribute('aria-label', 'The texts of the chosen point');
  detail.tabIndex = 0;
  const show = (point) => {
    detail.replaceChildren();
    if (!point) { detail.append(make('p', 'hint', 'Point at a dot, or move with the arrow keys, to read its texts. A larger dot took more tokens; a ring marks what nothing beats.')); return; }
    const list = make('dl');
    for (const [prompt, text, reward] of point.texts) list.append(make('dt', '', `${prompt} (reward ${number(reward)})`), make('dd', '', text));
    detail.append(make('p', 'head', told(point)), list);
  };
  const front = known.filter((p) => p.front).sort((a, b) => a.kl[0] - b.kl[0]);
  if (front.length > 1) drawn.append(shape('path', { class: 'front', d: front.map((p, i) => `${i ? 'L' : 'M'}${x(p.kl[0]).toFixed(1)} ${y(p.reward[0]).toFixed(1)}`).join(' ') }));
  const marks = [];
  for (const point of known) {
    const [k, kh] = point.kl, [r, rh] = point.reward, size = 4 + 9 * Math.sqrt(point.tokens / most), fill = hue(point.method);
    if (rh !== null) drawn.append(shape('line', { x1: x(k), x2: x(k), y1: y(r - rh), y2: y(r + rh), class: 'bars', stroke: fill }));
    if (kh !== null) drawn.append(shape('line', { x1: x(k - kh), x2: x(k + kh), y1: y(r), y2: y(r), class: 'bars', stroke: fill }));
    if (point.front) drawn.append(shape('circle', { cx: x(k), cy: y(r), r: size + 3, class: 'ring' }));
    const mark = shape('circle', { cx: x(k), cy: y(r), r: size, fill, class: 'node', role: 'button', 'aria-label': told(point), tabindex: marks.length ? '-1' : '0' });
    mark.dataset.id = point.i;
    const here = marks.length;
    mark.addEventListener('mouseenter', () => { kept = point.i; show(point); });
    mark.addEventListener('focus', () => { kept = point.i; show(point); });
    mark.addEventListener('click', () => { kept = point.i; show(point); });
    mark.addEventListener('keydown', (event) => {
      const next = marks[here + ({ ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key] || 0)];
      if (next && next !== mark) { event.preventDefault(); mark.setAttribute('tabindex', '-1'); next.setAttribute('tabindex', '0'); next.focus(); }
    });
    marks.push(mark);
  }
  drawn.append(...[...marks].sort((a, b) => b.getAttribute('r') - a.getAttribute('r')));  // small ones lie on large ones
  const button = (text, act) => { const made = make('button', '', text); made.type = 'button'; made.addEventListener('click', act); bar.append(made); };
  button('Save PNG', () => png(drawn));
  button('Save CSV', () => csv(points));
  box.append(bar, drawn);
  const unknown = shown.filter((p) => !p.kl);
  if (unknown.length) box.append(make('p', 'unknown', 'Without a known KL, and so not in the picture: ' + unknown.map(told).join('; ')));
  box.append(detail);
  show(points[kept] && !hidden.has(points[kept].method) ? points[kept] : null);
}

watch('value', draw);
draw();
