// Candidates by score. value: {rows: [[score, text, finished]], facts: [[name, text, why]]}.
function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw() {
  const box = element.querySelector('.steer-candidates'), value = props.value, rows = (value && value.rows) || [];
  const scrolled = box.querySelector('.wrap') ? box.querySelector('.wrap').scrollTop : 0;
  box.replaceChildren();
  if (!rows.length) return;
  if (value.facts && value.facts.length) {
    const facts = make('dl', 'facts');
    for (const [name, text, why] of value.facts) {
      const one = make('div');
      one.append(make('dt', '', name), make('dd', '', text));
      if (why) one.title = why;
      facts.append(one);
    }
    box.append(facts);
  }
  const wrap = make('div', 'wrap'), table = make('table'), head = make('tr'), body = make('tbody');
  wrap.tabIndex = 0;
  wrap.setAttribute('role', 'region');
  wrap.setAttribute('aria-label', 'Candidates, the best first');
  for (const name of ['Reward', 'Candidate']) { const cell = make('th', '', name); cell.scope = 'col'; head.append(cell); }
  for (const [score, text, done] of rows) {
    const row = make('tr', done ? '' : 'open');
    row.append(make('td', 'score', score === null ? '' : (+score).toFixed(3)), make('td', 'text', done ? text : text + ' …'));
    body.append(row);
  }
  const top = make('thead');
  top.append(head);
  table.append(top, body);
  wrap.append(table);
  box.append(wrap);
  wrap.scrollTop = scrolled;
}

watch('value', draw);
draw();
