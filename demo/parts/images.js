// Methods beside each other, step by step. value: {columns, count, w, methods: [{name, title, note, facts, frames: [{label, src}], rewards, best}]}.
let at = 1, split = 0.5;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(src, alt) {
  const made = make('img');
  if (String(src).startsWith('data:image/png;base64,')) made.src = src;
  made.alt = alt;
  return made;
}

function slider(label, value, told, act) {
  const bar = make('div', 'bar'), name = make('label', '', label), input = make('input'), id = `${element.id}-${label.replace(/\W+/g, '-')}`;
  input.type = 'range'; input.min = 0; input.max = 100; input.value = 100 * value; input.id = id;
  name.htmlFor = id;
  input.setAttribute('aria-valuetext', told(value));
  input.addEventListener('input', () => { input.setAttribute('aria-valuetext', told(input.value / 100)); act(input.value / 100); });
  bar.append(name, input);
  return bar;
}

function frameOf(method) {
  const last = method.frames.length - 1;
  return last < 0 ? null : method.frames[Math.round(at * last)];
}

function fill(box, method, value) {
  const frame = frameOf(method), sheet = box.querySelector('.sheet'), label = box.querySelector('.label');
  sheet.replaceChildren();
  if (!frame) return;
  const ended = frame === method.frames[method.frames.length - 1] && method.rewards, count = ended ? method.rewards.length : value.count;
  const alt = `${method.title}, ${frame.label}` + (ended ? `: rewards ${method.rewards.map((r) => r.toFixed(2)).join(', ')}` : '');
  sheet.append(picture(frame.src, alt));
  label.textContent = frame.label;
  if (ended) {
    const columns = Math.min(value.columns, count), rows = Math.ceil(count / columns), mark = make('span', 'mark');
    mark.style.left = `${(100 * (method.best % columns)) / columns}%`;
    mark.style.top = `${(100 * Math.floor(method.best / columns)) / rows}%`;
    mark.style.width = `${100 / columns}%`;
    mark.style.height = `${100 / rows}%`;
    sheet.append(mark);
  }
}

function compared(value) {
  const last = (name) => { const m = value.methods.find((one) => one.name === name); return m && m.rewards ? m.frames[m.frames.length - 1].src : null; };
  const base = last('plain'), guided = last('rlg');
  if (!base || !guided) return null;
  const box = make('section'), sheet = make('div', 'sheet'), over = picture(guided, `The same images under guidance with w = ${value.w}`);
  box.append(make('h3', '', `Base and guided, w = ${value.w}`), make('p', 'note', 'The same seed: left of the line the model, right of it the model under guidance.'));
  over.className = 'over';
  sheet.append(picture(base, 'Images of the model'), over, make('span', 'cut'));
  const move = (share) => { split = share; sheet.style.setProperty('--at', `${100 * share}%`); };
  move(split);
  box.append(sheet, slider('From guided to base', split, (share) => `${Math.round(100 * share)} % of the width shows the model`, move));
  return box;
}

function draw() {
  const root = element.querySelector('.steer-images'), value = props.value;
  root.replaceChildren();
  if (!value || !value.methods || !value.methods.length) return;
  const grid = make('div', 'grid'), boxes = [];
  for (const method of value.methods) {
    const box = make('section'), facts = make('dl', 'facts');
    box.setAttribute('aria-label', method.title);
    for (const [name, text, why] of method.facts) {
      const one = make('div');
      one.append(make('dt', '', name), make('dd', '', text));
      if (why) one.title = why;
      facts.append(one);
    }
    box.append(make('h3', '', method.title), make('p', 'note', method.note), make('div', 'sheet'), make('p', 'label'), facts);
    fill(box, method, value);
    boxes.push(box);
    grid.append(box);
  }
  const told = (share) => `${Math.round(100 * share)} % of the way`;
  root.append(slider('From noise to image', at, told, (share) => { at = share; value.methods.forEach((method, i) => fill(boxes[i], method, value)); }));
  const both = compared(value);
  if (both) grid.append(both);
  root.append(grid);
}

watch('value', draw);
draw();
