// The best so far against what was spent. value: {curve: [[tokens, score]], ghost: [[tokens, score]], title, ghostName}.
function draw() {
  const box = element.querySelector('.steer-curve'), value = props.value;
  box.replaceChildren();
  if (!value || !value.curve || !value.curve.length) return;
  const ghost = value.ghost || [], all = [...value.curve, ...ghost];
  const width = 640, height = 230, [low, high] = range(all.map((p) => p[1])), pad = 0.08 * (high - low || 1);
  const most = Math.max(...all.map((p) => p[0]));
  const last = value.curve[value.curve.length - 1];
  const told = `${value.title}: ${number(last[1])} after ${last[0]} tokens` + (ghost.length ? `; best-of-${ghost.length} reaches ${number(ghost[ghost.length - 1][1])} on average with as many` : '');
  const drawn = shape('svg', { viewBox: `0 0 ${width} ${height}`, class: 'fits', role: 'img', 'aria-label': told });
  const { x, y } = axes(drawn, { width, height, left: 52, bottom: 36, xs: [0, most], ys: [low - pad, high + pad], xName: 'tokens drawn', yName: 'reward' });
  const path = (points) => points.map(([a, b], i) => `${i ? 'L' : 'M'}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(' ');
  if (ghost.length) drawn.append(shape('path', { d: path(ghost), class: 'ghost' }));
  drawn.append(shape('path', { d: path(value.curve), class: 'main' }));
  for (const [a, b] of value.curve) drawn.append(shape('circle', { cx: x(a), cy: y(b), r: 3, class: 'dot' }));
  const key = make('p', 'key');
  const entry = (kind, text) => { const one = make('span'); one.append(make('i', kind), document.createTextNode(text)); key.append(one); };
  entry('main', value.title);
  if (ghost.length) entry('ghost', `best-of-N with as many tokens, on average (N = ${ghost.length})`);
  box.append(drawn, key);
}

watch('value', draw);
draw();
