// Particles that are weighed and copied. value: {columns: [{step, value: [K], text: [K], from: [K], ess}], unit}, or null.
function draw() {
  const box = element.querySelector('.steer-lineage'), columns = (props.value && props.value.columns) || [];
  box.replaceChildren();
  if (!columns.length) return;
  const count = columns[0].value.length, row = Math.max(14, Math.min(26, 340 / count));
  const wide = Math.max(64, Math.min(150, 900 / columns.length)), left = 24, top = 14;
  const [low, high] = range(columns.flatMap((c) => c.value));
  // Children stand in their ancestors' order, so that lines never cross.
  const places = [[...Array(count).keys()]];
  for (const column of columns.slice(1)) {
    const before = places[places.length - 1];
    const order = [...Array(count).keys()].sort((a, b) => before[column.from[a]] - before[column.from[b]] || a - b);
    const place = Array(count);
    order.forEach((k, i) => { place[k] = i; });
    places.push(place);
  }
  const alive = [Array(count).fill(true)];
  for (let t = columns.length - 1; t > 0; t--) {
    const kept = Array(count).fill(false);
    columns[t].from.forEach((from, k) => { if (alive[0][k]) kept[from] = true; });
    alive.unshift(kept);
  }
  const nodes = [], lines = [], at = (t, k) => [left + wide * t, top + row * places[t][k]];
  columns.forEach((column, t) => column.value.forEach((value, k) => {
    const [x, y] = at(t, k);
    const gone = alive[t][k] ? '' : ', died out';
    nodes.push({ id: `${t}:${k}`, x, y, r: Math.min(7, row / 2 - 1), fill: colour(value, low, high), faint: !alive[t][k], title: `Step ${column.step}, particle ${k + 1}: reward ${number(value)}${gone}`, text: column.text[k] });
    if (t) lines.push({ from: at(t - 1, column.from[k]), to: [x, y], faint: !alive[t][k] });
  }));
  const names = columns.map((column, t) => [left + wide * t, `${t ? '' : 'ESS '}${column.ess.toFixed(1)}`]);
  box.append(make('h4', '', 'Lineage: each column weighs all particles; good ones are copied, others die out (faint). Orange is a high reward, blue a low one. ESS, below: how many independent particles they are worth.'));
  network(box, { width: left + wide * (columns.length - 1) + 40, height: top + row * count + 22, label: `Lineage of ${count} particles over ${columns.length} weighings`, nodes, lines, names });
}

watch('value', draw);
draw();
