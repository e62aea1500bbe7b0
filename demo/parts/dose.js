// Cards of edits. value: {available: [{name, kind, label, low, high, zones: [green, red], layers}], cards: [{name,
// strength, layers, scope}]}. What is chosen goes back as the value.
const root = () => element.querySelector('.steer-dose');
let mine = null;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function send(cards) {
  mine = { available: props.value.available, cards };
  props.value = mine;
}

function zone(strength, [green, red]) {
  const size = Math.abs(strength);
  return size <= green ? ['green', 'gentle'] : size <= red ? ['amber', 'strong, texts may stumble'] : ['red', 'texts break'];
}

function field(label, input) {
  const wrap = make('label', 'field');
  wrap.append(make('span', '', label), input);
  return wrap;
}

function card(entry, index, cards, about) {
  const box = make('section', 'card');
  box.setAttribute('aria-label', 'Edit ' + about.label);
  const head = make('div', 'head');
  head.append(make('strong', '', about.label), make('span', 'kind', about.kind));
  const drop = make('button', 'drop', '×');
  drop.type = 'button';
  drop.setAttribute('aria-label', 'Remove ' + about.label);
  drop.addEventListener('click', () => { send(cards.filter((_, i) => i !== index)); draw(); });
  head.append(drop);
  const limit = about.limit, [green, red] = about.zones;
  const slider = make('input', 'slider');
  slider.type = 'range'; slider.min = -limit; slider.max = limit; slider.step = about.step;
  slider.value = entry.strength;
  slider.setAttribute('aria-label', 'Strength of ' + about.label);
  const place = (x) => (50 + 50 * x / limit).toFixed(1) + '%';
  slider.style.setProperty('--a', place(-red)); slider.style.setProperty('--b', place(-green));
  slider.style.setProperty('--c', place(green)); slider.style.setProperty('--d', place(red));
  const ends = make('div', 'ends');
  ends.append(make('span', '', about.low ? '← ' + about.low : ''), make('span', 'told'), make('span', '', about.high ? about.high + ' →' : ''));
  const number = make('input', 'number');
  number.type = 'number'; number.step = about.step; number.value = entry.strength;
  number.setAttribute('aria-label', 'Strength of ' + about.label + ', as a number');
  const told = () => {
    const [name, text] = zone(+number.value, about.zones);
    const where = ends.querySelector('.told');
    where.className = 'told ' + name; where.textContent = text + (about.measured ? ', as measured' : '');
    slider.setAttribute('aria-valuetext', number.value + ', ' + text);
  };
  const change = (value) => {
    const next = cards.map((c, i) => (i === index ? { ...c, strength: value } : c));
    cards = next; send(next); told();
  };
  slider.addEventListener('input', () => { number.value = slider.value; change(+slider.value); });
  number.addEventListener('input', () => { slider.value = number.value; change(number.value === '' ? null : +number.value); });
  const line = make('div', 'line');
  line.append(slider, number);
  box.append(head, line, ends);
  const more = make('details', 'more');
  more.append(make('summary', '', 'Layers and scope'));
  const layers = make('input');
  layers.type = 'text'; layers.value = entry.layers || ''; layers.placeholder = about.layers || 'all';
  layers.addEventListener('change', () => { cards = cards.map((c, i) => (i === index ? { ...c, layers: layers.value } : c)); send(cards); });
  const scope = make('select');
  for (const [value, label] of [['', 'as its card says'], ['all', 'prompt and reply'], ['prompt', 'the prompt'], ['generated', 'what is generated']]) {
    const option = make('option', '', label);
    option.value = value; option.selected = value === (entry.scope || '');
    scope.append(option);
  }
  scope.addEventListener('change', () => { cards = cards.map((c, i) => (i === index ? { ...c, scope: scope.value } : c)); send(cards); });
  more.append(field('Layers, such as 10-19', layers), field('Acts on', scope));
  if (about.kind !== 'policy') box.append(more);
  told();
  return box;
}

function draw() {
  const { available, cards } = props.value;
  root().replaceChildren();
  cards.forEach((entry, index) => {
    const about = available.find((a) => a.name === entry.name);
    if (about) root().append(card(entry, index, cards, about));
  });
  if (!cards.length) root().append(make('p', 'none', 'No edit yet: the steered column will be the unsteered one.'));
  const rest = available.filter((a) => !cards.some((c) => c.name === a.name));
  if (rest.length) {
    const line = make('div', 'line');
    const choice = make('select', 'choice');
    choice.setAttribute('aria-label', 'An edit to add');
    for (const about of rest) { const o = make('option', '', `${about.label} (${about.kind})`); o.value = about.name; choice.append(o); }
    const plus = make('button', 'plus', 'Add edit');
    plus.type = 'button';
    plus.addEventListener('click', () => {
      const about = available.find((a) => a.name === choice.value);
      send([...cards, { name: about.name, strength: about.strength, layers: '', scope: '' }]); draw();
    });
    line.append(choice, plus);
    root().append(line);
  }
}

watch('value', () => { if (props.value !== mine && JSON.stringify(props.value) !== JSON.stringify(mine) || !root().firstChild) { mine = props.value; draw(); } });
draw();
