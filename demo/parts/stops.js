// A slider with a few named stops. value: {labels: [text], index}.
const root = () => element.querySelector('.steer-stops');
let drawn = null;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw() {
  const { labels, index } = props.value;
  if (drawn === JSON.stringify(labels)) return;
  drawn = JSON.stringify(labels);
  root().replaceChildren();
  const slider = make('input', 'slider');
  slider.type = 'range'; slider.min = 0; slider.max = labels.length - 1; slider.step = 1; slider.value = index;
  slider.setAttribute('aria-label', 'From sad to happy');
  slider.setAttribute('aria-valuetext', labels[index]);
  const names = make('div', 'names');
  const mark = (at) => [...names.children].forEach((n, i) => n.classList.toggle('now', i === at));
  labels.forEach((label, at) => {
    const name = make('button', 'name', label);
    name.type = 'button'; name.tabIndex = -1;
    name.addEventListener('click', () => { slider.value = at; slider.dispatchEvent(new Event('input')); slider.focus(); });
    names.append(name);
  });
  slider.addEventListener('input', () => {
    const at = +slider.value;
    slider.setAttribute('aria-valuetext', labels[at]);
    mark(at);
    props.value = { labels, index: at };
    trigger('moved', { index: at });
  });
  root().append(slider, names);
  mark(index);
}

watch('value', draw);
draw();
