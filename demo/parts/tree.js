// A search tree. value: {parent: [M], step: [M], value: [M], visits: [M], text: [M]}, or null; node 0 is the root.
function draw() {
  const box = element.querySelector('.steer-tree'), tree = props.value;
  box.replaceChildren();
  if (!tree || !tree.parent || tree.parent.length < 2) return;
  const size = tree.parent.length, children = Array.from({ length: size }, () => []);
  tree.parent.forEach((up, node) => { if (up >= 0) children[up].push(node); });
  const steps = [...new Set(tree.step)].sort((a, b) => a - b), place = Array(size);
  let leaves = 0;
  const settle = (node) => {
    const below = children[node];
    below.forEach(settle);
    place[node] = below.length ? (place[below[0]] + place[below[below.length - 1]]) / 2 : leaves++;
  };
  settle(0);
  const row = Math.max(13, Math.min(24, 380 / leaves)), wide = Math.max(70, 640 / Math.max(1, steps.length - 1)), left = 24, top = 14;
  const [low, high] = range(tree.value.slice(1)), most = Math.max(...tree.visits.slice(1));
  const at = (node) => [left + wide * steps.indexOf(tree.step[node]), top + row * place[node]];
  const ends = [...Array(size).keys()].filter((node) => node && !children[node].length);
  const best = new Set();
  for (let node = ends.reduce((a, b) => (tree.value[b] > tree.value[a] ? b : a)); node >= 0; node = tree.parent[node]) best.add(node);
  const nodes = [], lines = [];
  for (let node = 0; node < size; node++) {
    const [x, y] = at(node), end = node && !children[node].length;
    const what = node ? (end ? 'finished text' : `after ${tree.step[node]} steps`) : 'the prompt';
    nodes.push({ id: String(node), x, y, r: 4 + 4 * Math.sqrt(tree.visits[node] / Math.max(most, tree.visits[node], 1)), fill: node ? colour(tree.value[node], low, high) : 'rgb(148 163 184)', faint: false, title: `Node ${node}, ${what}: value ${number(tree.value[node])}, visited ${tree.visits[node]} times${best.has(node) ? ', on the best path' : ''}`, text: tree.text[node] });
    if (node) lines.push({ from: at(tree.parent[node]), to: [x, y], faint: !best.has(node) });
  }
  const names = steps.map((step, i) => [left + wide * i, step < 0 ? 'root' : `step ${step}`]);
  box.append(make('h4', '', 'Tree: every path from the left is a text; the strong line is the best one. Orange is a high value, blue a low one; larger nodes were visited more often.'));
  network(box, { width: left + wide * (steps.length - 1) + 40, height: top + row * leaves + 22, label: `Search tree of ${size} nodes`, nodes, lines, names });
}

watch('value', draw);
draw();
