const DATA = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["missed", "refused", "fused"];
const $ = (id) => document.getElementById(id);
const state = { path: "", layer: 0, node: null };

// All that comes from the model goes through text nodes and attributes set one by one, never through markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A name may be broken behind a dot or an underscore.
const breakable = (text) => make("span", {}, ...text.split(/(?<=[._])/).flatMap((part) => [part, make("wbr")]));

// What a line has room for; the details have the rest.
const short = (text) => text.replace(/^(aten|prims|torch\.ops\.fusionpass)\./, "").replace(/^(\w+)\.default\(/, "$1(");
const shape = (type) => ((type.match(/\[/g) || []).length > 1 ? "" : type.replace(/ strides \([^)]*\)/g, ""));

const times = (count, one, many) => `${count} ${count === 1 ? one : many || one + "s"}`;
const inside = (path, module) => !module || path === module || path.startsWith(module + ".");
const layerOf = (path) => (path.match(/^(.*?\.)?\d+(?=\.|$)/) || [""])[0];

function size(bytes) {
  if (bytes === null || bytes === undefined) return "as many bytes as the size asks for";
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

// One stop of the Tab key for a group; arrows move inside it.
function rove(items, current, focus) {
  for (const item of items) item.tabIndex = item === current ? 0 : -1;
  if (focus && current) current.focus();
}

function step(items, current, key) {
  const list = [...items], at = list.indexOf(current);
  const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: list.length - 1 }[key];
  return to === undefined ? null : list[Math.max(0, Math.min(list.length - 1, to))];
}

function showTab(tab, focus) {
  const tabs = document.querySelectorAll("[role=tab]");
  for (const one of tabs) {
    one.setAttribute("aria-selected", String(one === tab));
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  rove(tabs, tab, focus);
  if (tab.id === "tab-layers") drawEdges();
}

function setUpTabs() {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", () => showTab(tab));
    tab.addEventListener("keydown", (event) => {
      const next = step(document.querySelectorAll("[role=tab]"), tab, event.key);
      if (next) { event.preventDefault(); showTab(next, true); }
    });
  }
}

function showSummary() {
  for (const [name, count] of DATA.summary) {
    const kind = KINDS.includes(name) ? name : "";
    $("summary").append(make("li", { class: kind }, make("b", {}, String(count)), name));
  }
}

// Modules

function treeItem(branch) {
  const label = make("span", { class: "label", onclick: () => chooseModule(item) },
    branch.last ? `${branch.name} – ${branch.last}` : branch.name);
  for (const kind of KINDS) {
    if (branch.counts[kind]) {
      label.append(make("span", { class: `count ${kind}`, title: `${branch.counts[kind]} ${kind}` }, String(branch.counts[kind])));
    }
  }
  const told = KINDS.filter((kind) => branch.counts[kind]).map((kind) => `${branch.counts[kind]} ${kind}`).join(", ");
  const item = make("li", { role: "treeitem", tabindex: "-1", "aria-selected": "false", "data-path": branch.path,
    "aria-label": `${label.firstChild.textContent}: ${told}` }, label);
  if (branch.children.length) {
    item.setAttribute("aria-expanded", "true");
    item.append(make("ul", { role: "group" }, ...branch.children.map(treeItem)));
  }
  return item;
}

const visibleItems = () => [...document.querySelectorAll("#tree [role=treeitem]")].filter((item) => item.offsetParent);

function chooseModule(item) {
  const same = item.getAttribute("aria-selected") === "true";
  for (const one of document.querySelectorAll("#tree [aria-selected=true]")) one.setAttribute("aria-selected", "false");
  item.setAttribute("aria-selected", String(!same));
  state.path = same ? "" : item.dataset.path;
  rove(document.querySelectorAll("#tree [role=treeitem]"), item, true);
  showSites();
  const layer = DATA.layers.findIndex((one) => one.members.includes(layerOf(state.path)));
  if (layer >= 0) state.layer = layer;
  showLayer();
}

function setUpTree() {
  $("tree").append(...DATA.tree.map(treeItem));
  const first = document.querySelector("#tree [role=treeitem]");
  if (first) first.tabIndex = 0;
  $("tree").addEventListener("keydown", (event) => {
    const item = event.target.closest("[role=treeitem]"), open = item.getAttribute("aria-expanded");
    let next = null;
    if (event.key === "Enter" || event.key === " ") chooseModule(item);
    else if (event.key === "ArrowRight" && open === "false") item.setAttribute("aria-expanded", "true");
    else if (event.key === "ArrowRight" && open === "true") next = item.querySelector("[role=treeitem]");
    else if (event.key === "ArrowLeft" && open === "true") item.setAttribute("aria-expanded", "false");
    else if (event.key === "ArrowLeft") next = item.parentElement.closest("[role=treeitem]");
    else if (event.key !== "ArrowRight") next = step(visibleItems(), item, event.key);
    if (!next && !["Enter", " ", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    if (next) rove(document.querySelectorAll("#tree [role=treeitem]"), next, true);
  });
}

// Sites

// What runs as it should needs nothing to be done.
const hint = (kind) => (kind === "fused" ? "Hint" : "To do");

function setUpFilters() {
  for (const kind of KINDS) {
    $("kinds").append(make("label", { class: kind }, make("input", { type: "checkbox", name: kind, checked: "" }), ` ${kind}`));
  }
  for (const name of ["op", "rule"]) {
    const values = [...new Set(DATA.sites.map((site) => site[name]).filter(Boolean))].sort();
    $(name).append(make("option", { value: "" }, "any"), ...values.map((value) => make("option", { value }, value)));
  }
  $("filters").addEventListener("input", showSites);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => {
    for (const one of document.querySelectorAll("#tree [aria-selected=true]")) one.setAttribute("aria-selected", "false");
    state.path = "";
    setTimeout(showSites);
  });
}

function wanted(site) {
  const text = $("text").value.trim().toLowerCase();
  const words = [...site.members, site.reason, site.source, site.op, site.rule, site.scheme, site.backend].join("\n").toLowerCase();
  return document.querySelector(`#kinds [name=${site.kind}]`).checked
    && (!$("op").value || site.op === $("op").value)
    && (!$("rule").value || site.rule === $("rule").value)
    && site.members.some((path) => inside(path, state.path))
    && words.includes(text);
}

function siteRow(site) {
  const place = site.where || "(no module)";
  const where = site.layer === null ? breakable(place)
    : make("button", { class: "to", type: "button", onclick: () => goTo(site.layer, site.row) }, breakable(place));
  const others = site.count > 1 ? make("div", { class: "faint", title: site.members.join("\n") }, `and ${site.count - 1} alike`) : null;
  return make("tr", { "data-kind": site.kind },
    make("td", { class: `kind ${site.kind}` }, site.kind),
    make("td", {}, breakable(site.op), site.scheme ? make("div", { class: "faint" }, site.scheme) : null),
    make("td", {}, breakable(site.rule)),
    make("td", {}, site.backend),
    make("td", {}, where, others),
    make("td", { class: "why" }, site.reason, site.advice ? make("div", {}, make("b", {}, `${hint(site.kind)}: `), site.advice) : null,
      site.source ? make("div", { class: "source" }, site.source) : null));
}

function showSites() {
  const chosen = DATA.sites.filter(wanted);
  const total = (sites) => sites.reduce((sum, site) => sum + site.count, 0);
  $("shown").textContent = `${total(chosen)} of ${times(total(DATA.sites), "site")}${state.path ? ` in ${state.path}` : ""}`;
  const heads = ["Kind", "Op", "Rule", "Run by", "Module", "Reason and line"];
  $("list").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...chosen.map(siteRow))));
}

// Pieces, CUDA graphs, memory

function table(title, heads, rows) {
  if (!rows.length) return [];
  return [make("h2", {}, title), make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell === null ? "–" : String(cell)))))))];
}

function setUpRun() {
  const run = DATA.run;
  if (run.notes.length) $("run").append(make("h2", {}, "Notes"), make("ul", {}, ...run.notes.map((text) => make("li", {}, text))));
  $("run").append(...table("Compiled graphs", ["Graph", "Kernels", "From the cache", "Nodes before", "Nodes after"], run.graphs));
  if (run.replays.length) $("run").append(make("h2", {}, "CUDA graphs"), ...run.replays.map((text) => make("pre", {}, text)));
  $("run").append(make("h2", {}, "Memory"), make("pre", {}, run.memory),
    ...table("Time of the passes", ["Pass", "ms, all graphs together"], run.passes),
    ...table("Pieces", ["Graph", "Piece", "Compiled as", "Modules", "Cut in front of it because", "Outside of CUDA graphs because"], run.pieces));
}

showSummary();
setUpTabs();
setUpTree();
setUpFilters();
setUpLayers();
setUpRun();
showSites();
showLayer();
