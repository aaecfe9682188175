"use strict";

// Layers

function layerTitle(layer) {
  const graphs = new Set(DATA.layers.map((one) => one.graph)).size;
  const name = layer.title ? layer.members[0] || layer.title : "outside of layers";
  const more = layer.members.length > 1 && layer.title ? ` and ${layer.members.length - 1} alike` : "";
  return `${graphs > 1 ? `graph ${layer.graph}: ` : ""}${name}${more}`;
}

function setUpLayers() {
  $("chooser").append(...DATA.layers.map((layer, index) => make("button", { type: "button", role: "radio",
    title: layer.members.join("\n"), onclick: () => { state.layer = index; state.node = null; showLayer(); } }, layerTitle(layer))));
  $("chooser").addEventListener("keydown", (event) => {
    const next = step($("chooser").children, event.target, event.key);
    if (!next) return;
    event.preventDefault();
    next.click();
    next.focus();
  });
  $("moves").addEventListener("change", () => {
    $("graph").classList.toggle("without-views", !$("moves").checked);
    drawEdges();
  });
  $("graph").addEventListener("keydown", moveInGraph);
  window.addEventListener("resize", drawEdges);
}

function hue(name) {
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.charCodeAt(0)) % 3600;
  return (sum * 47) % 360;
}

function nodeButton(node, side, row) {
  const full = node.text ? `${node.name} = ${node.text}` : node.name;
  const text = node.text ? `${node.name} = ${short(node.text)}` : node.name;
  return make("button", { type: "button", class: `node${node.moves ? " moves" : ""}`, tabindex: "-1", "aria-pressed": "false",
    "data-side": side, "data-name": node.name, "data-row": String(row), title: full, "data-where": node.where || "",
    onclick: (event) => choose(event.currentTarget) },
  make("span", { class: "type" }, shape(node.type || "")), text);
}

function rowElement(row, index) {
  const onlyMoves = [...row.before, ...row.after].every((node) => node.moves);
  const group = row.kind ? ` group ${row.kind}` : "";
  const element = make("div", { class: `row${group}${onlyMoves ? " moves" : ""}`, style: null });
  if (row.kind) element.style.setProperty("--hue", hue(row.record.op));
  const before = make("div", { class: "side" }, ...row.before.map((node) => nodeButton(node, "before", index)));
  const after = make("div", { class: "side" });
  if (row.kind) {
    const done = row.kind === "fused" ? `${row.record.op}, ${row.record.backend}` : `${row.kind}: ${row.record.op}`;
    after.append(make("span", { class: `badge${row.kind === "fused" ? "" : ` ${row.kind}`}` }, done));
  }
  after.append(...row.after.map((node) => nodeButton(node, "after", index)));
  if (!row.after.length && !row.kind) after.append(make("span", { class: "gone" }, "not needed any more"));
  const arrow = row.kind === "fused" ? "→" : row.after.length && row.before.length ? "" : row.after.length ? "+" : "−";
  element.append(before, make("span", { class: "arrow", "aria-hidden": "true" }, arrow), after);
  return element;
}

function showLayer() {
  const layer = DATA.layers[state.layer];
  const chooser = [...$("chooser").children];
  chooser.forEach((button, index) => button.setAttribute("aria-checked", String(index === state.layer)));
  rove(chooser, chooser[state.layer]);
  if (!layer) {
    $("about").textContent = "No graph was traced.";
    return;
  }
  const fused = layer.rows.filter((row) => row.kind === "fused");
  const sum = (name) => fused.reduce((total, row) => total === null || row[name] === null ? null : total + row[name], 0);
  const count = (side) => layer.rows.reduce((total, row) => total + row[side].filter((node) => !node.moves).length, 0);
  const saved = sum("bytes") === null ? "" : `; one kernel each, they would move ${size(sum("bytes"))}, the ops move ${size(sum("left"))}`;
  $("about").textContent = `${times(count("before"), "operator")} before, ${count("after")} after. `
    + `${times(fused.length, "fused op")} stand for ${times(sum("operators"), "operator")}${saved}.${measuredIn(fused)}`;
  const head = make("div", { class: "row head" }, make("span", {}, "before: the model's operators"), make("span"), make("span", {}, "after: ops and what is left"));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  $("graph").replaceChildren(svg, head, ...layer.rows.map(rowElement));
  for (const button of nodes()) button.classList.toggle("inside", Boolean(state.path) && inside(button.dataset.where, state.path) && state.path !== layer.title);
  const first = nodes()[0];
  if (first) first.tabIndex = 0;
  showDetails(null);
}

const micros = (us) => `${us < 100 ? us.toPrecision(3) : Math.round(us)} µs`;

// Of a layer: the ops that were measured, together.
function measuredIn(rows) {
  const found = rows.map((row) => row.time).filter((time) => time && !time.why);
  if (!found.length) return "";
  const sum = (name) => micros(found.reduce((total, time) => total + time[name], 0));
  const which = found.length === rows.length ? "they take" : `the ${found.length} that were measured take`;
  return ` On ${found[0].device} ${which} ${sum("us")}; what they replaced, compiled by Inductor alone, ${sum("replaced_us")}.`;
}

const nodes = () => [...document.querySelectorAll("#graph .node")];

function goTo(layer, row) {
  state.layer = layer;
  showLayer();
  showTab($("tab-layers"));
  const found = nodes().filter((button) => button.dataset.row === String(row));
  const button = found.find((one) => one.dataset.side === "after") || found[0];
  if (!button) return;
  choose(button);
  button.focus();
  button.scrollIntoView({ block: "center" });
}

function moveInGraph(event) {
  const button = event.target.closest(".node");
  if (!button) return;
  const shown = nodes().filter((one) => one.offsetParent);
  let next = null;
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    const side = event.key === "ArrowRight" ? "after" : "before";
    const others = shown.filter((one) => one.dataset.side === side);
    const distance = (one) => Math.abs(Number(one.dataset.row) - Number(button.dataset.row));
    next = others.reduce((best, one) => (!best || distance(one) < distance(best) ? one : best), null);
  } else {
    next = step(shown.filter((one) => one.dataset.side === button.dataset.side), button, event.key);
  }
  if (!next) return;
  event.preventDefault();
  rove(nodes(), next, true);
}

function choose(button) {
  for (const one of nodes()) one.setAttribute("aria-pressed", String(one === button));
  rove(nodes(), button);
  state.node = button;
  showDetails(button);
}

function nodeOf(button) {
  return DATA.layers[state.layer].rows[Number(button.dataset.row)][button.dataset.side].find((node) => node.name === button.dataset.name);
}

function showDetails(button) {
  state.node = button;
  drawEdges();
  if (!button) {
    $("details").replaceChildren(make("p", { class: "hint" }, "Choose a node: it tells its line, its op, who runs it and why."));
    return;
  }
  const layer = DATA.layers[state.layer], row = layer.rows[Number(button.dataset.row)], node = nodeOf(button);
  const types = Object.fromEntries(layer.rows.flatMap((one) => [...one.before, ...one.after]).map((one) => [one.name, one.type || ""]));
  const list = make("dl");
  const tell = (name, ...values) => {
    const given = values.filter(Boolean);
    if (given.length) list.append(make("dt", {}, name), ...given.map((value) => make("dd", {}, value)));
  };
  tell("Node", make("code", {}, node.text ? `${node.name} = ${node.text}` : node.name));
  tell("Value", node.type);
  tell("Module", node.where);
  tell("Line of the model", node.source && make("span", { class: "source" }, node.source));
  if (row.kind) {
    const record = row.record;
    tell(row.kind === "fused" ? "Fused into" : row.kind === "refused" ? "Refused" : "Missed", record.op + (record.scheme ? `, ${record.scheme}` : ""));
    tell("Rules", (record.rules || [record.rule]).filter(Boolean).join(" → "));
    tell("Run by", record.backend);
    tell("Why", record.reason);
    tell(hint(row.kind), record.advice);
    if (row.kind === "fused") {
      tell("Operators replaced", `${row.operators} by 1${record.backend === "inductor" ? ", if Inductor makes one kernel of it" : ""}`);
      if (row.bytes !== null && row.left !== null) {
        tell("Bytes moved", `${size(row.bytes)} with a kernel for each operator, ${size(row.left)} by the op`,
          row.bytes > row.left ? `${size(row.bytes - row.left)} saved` : null);
      } else tell("Bytes moved", "depends on sizes that are symbolic");
      if (row.time) {
        tell("Measured", ...(row.time.why ? [`not: ${row.time.why}`] : [`${micros(row.time.us)} on ${row.time.device}`,
          `${micros(row.time.replaced_us)} for what it replaced, compiled by Inductor alone`]));
      }
    }
  }
  tell("Reads", ...(node.inputs || []).map((name) => make("span", {}, make("code", {}, name), ` ${name in types ? types[name] : (layer.outside[name] || [""]).join(" ")}`)));
  $("details").replaceChildren(list);
}

function drawEdges() {
  const svg = document.querySelector("#graph svg"), button = state.node;
  if (!svg) return;
  svg.replaceChildren();
  for (const one of nodes()) one.classList.remove("reads", "readby");
  if (!button || !button.offsetParent) return;
  const side = button.dataset.side, node = nodeOf(button);
  const shown = nodes().filter((one) => one.dataset.side === side && one.offsetParent);
  const frame = $("graph").getBoundingClientRect();
  const point = (one) => {
    const box = one.getBoundingClientRect();
    return [(side === "before" ? box.left - frame.left : box.right - frame.left), (box.top + box.bottom) / 2 - frame.top];
  };
  const edge = (one, kind) => {
    const [x, from] = point(button), [other, to] = point(one), out = side === "before" ? -1 : 1;
    const bend = out * (8 + Math.min(14, Math.abs(from - to) / 20));
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M ${x} ${from} C ${x + bend} ${from} ${other + bend} ${to} ${other} ${to}`);
    path.setAttribute("class", kind);
    svg.append(path);
  };
  for (const one of shown) {
    if ((node.inputs || []).includes(one.dataset.name)) { one.classList.add("reads"); edge(one, "in"); }
    else if ((nodeOf(one).inputs || []).includes(node.name)) { one.classList.add("readby"); edge(one, "out"); }
  }
}
