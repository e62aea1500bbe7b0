// How well a vector separates at each layer. value: {accuracy: [share], random: [share], best, chosen: [layer]}.
// Which layers it acts on is chosen here and goes back as `chosen`.
const root = () => element.querySelector('.steer-layers');
let mine = null;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw() {
  const value = props.value;
  root().replaceChildren();
  if (!value || !value.accuracy) return;
  const chart = make('div', 'chart');
  chart.setAttribute('role', 'group');
  chart.setAttribute('aria-label', 'Layers: choose those that the vector acts on');
  value.accuracy.forEach((share, layer) => {
    const bar = make('button', 'layer' + (layer === value.best ? ' best' : ''));
    const on = value.chosen.includes(layer);
    bar.type = 'button';
    bar.tabIndex = layer === (value.chosen[0] || 0) ? 0 : -1;
    bar.setAttribute('aria-pressed', String(on));
    const random = value.random[layer];
    const told = `Layer ${layer}: ${(100 * share).toFixed(0)} % of held-out texts on the right side; random directions ${(100 * random).toFixed(0)} %`;
    bar.setAttribute('aria-label', told);
    bar.title = told;
    bar.style.setProperty('--h', `${Math.max(0, (share - 0.5) * 200).toFixed(1)}%`);
    bar.style.setProperty('--r', `${Math.max(0, (random - 0.5) * 200).toFixed(1)}%`);
    bar.append(make('span', 'fill'), make('span', 'random'), make('span', 'number', String(layer)));
    bar.addEventListener('click', () => {
      const chosen = on ? value.chosen.filter((l) => l !== layer) : [...value.chosen, layer].sort((a, b) => a - b);
      mine = { ...value, chosen };
      props.value = mine;
      draw();
      root().querySelectorAll('.layer')[layer].focus();
    });
    bar.addEventListener('keydown', (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && root().querySelectorAll('.layer')[layer + step];
      if (next) { event.preventDefault(); bar.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    });
    chart.append(bar);
  });
  const key = make('p', 'key');
  key.append(make('span', 'swatch on'), document.createTextNode('acts here'), make('span', 'swatch off'), document.createTextNode('does not'), make('span', 'swatch line'), document.createTextNode('random directions'));
  root().append(make('h4', '', 'Separation by layer, on held-out texts (50 % to 100 %)'), chart, key);
}

watch('value', () => { if (JSON.stringify(props.value) !== JSON.stringify(mine) || !root().firstChild) { mine = props.value; draw(); } });
draw();
