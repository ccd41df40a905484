(() => {
// What was packed for the file's size: ids as places in one list, which holds differences, and what follows from other columns.
let last = 0;
const idAt = data.ids.map(step => last += step), texts = new Map(idAt.map((id, i) => [id, data.texts[i]]));
for (const view of data.completions.flat()) {
  const c = view.candidates;
  c.ids = c.ids.map(row => row.map(place => idAt[place]));
  if (c.teacher_ranks) c.teacher_ranks = c.teacher_ranks.map(row => typeof row === "string" ? [...row].map(d => parseInt(d, 36)) : row);
  if (view.columns.teacher_log_prob)
    view.columns.log_ratio = view.columns.teacher_log_prob.map((value, t) => value === null ? null : value - view.columns.student_log_prob[t]);
}
const state = {which: 0, quantity: null, at: 0, threshold: 0};
let spans = [], heres = [];

const largest = values => values.reduce((most, value) => value > most ? value : most, -Infinity);
const exact = value => value === null || value === undefined ? "–" : String(+value.toPrecision(9));
const number = value => value === null || value === undefined ? "–" :
  value === 0 ? "0" : Math.abs(value) < 1e-4 || Math.abs(value) >= 1e5 ? value.toExponential(3) : String(+value.toPrecision(6));
const share = value => value === null || value === undefined ? "" : value >= 0.0995 ? (100 * value).toFixed(1) + " %" :
  value === 0 ? "0 %" : (value >= 1e-5 ? String(+(100 * value).toPrecision(2)) : (100 * value).toExponential(1)) + " %";

const shown = text => { const node = make("span"); visible(node, text); return node.textContent.replace(/\n/g, ""); };

const views = () => data.completions[state.which];
function column(view, name) {
  if (name === "contribution") {
    const parts = Object.keys(view.columns).filter(n => n.startsWith("contribution/")).map(n => view.columns[n]);
    return view.tokens.map((_, t) => parts.reduce((sum, part) => sum + (part[t] || 0), 0));
  }
  return view.columns[name];
}
const quantities = () => {
  const names = [...new Set(views().flatMap(view => Object.keys(view.columns)))].filter(name => !name.startsWith("takes/"));
  const order = name => ["student_entropy", "teacher_entropy"].includes(name) ? 0 : name.startsWith("gate/") ? 1 : name === "divergence" ? 2 : name.startsWith("contribution/") ? 4 : 5;
  const all = [...names.sort((a, b) => order(a) - order(b))];
  const first = all.findIndex(name => name.startsWith("contribution/"));
  if (first >= 0) all.splice(first, 0, "contribution");
  return all;
};
const meaning = name => name === "contribution" ? ["part of the loss, all terms", "loss"] : data.meanings[name] || [name, ""];

function range(name) {
  const values = views().flatMap(view => (column(view, name) || []).filter(v => v !== null)).sort((a, b) => a - b);
  if (!values.length) return {low: 0, high: 0, cap: 0};
  return {low: values[0], high: values[values.length - 1], cap: values[Math.floor((values.length - 1) * .99)]};
}
function colour(value, {low, high, cap}) {
  if (value === null || value === undefined) return "transparent";
  const reach = Math.max(Math.abs(low), Math.abs(cap), 1e-12);
  if (low < 0) return `rgba(var(${value < 0 ? "--down" : "--up"}), ${Math.min(1, Math.abs(value) / reach) * .62})`;
  const span = cap - low || high - low;
  return `rgba(var(--up), ${span ? Math.min(1, (value - low) / span) * .62 : 0})`;
}

const firstOf = (view, kind) => Object.keys(view.terms).find(name => view.terms[name].kind === kind && view.columns["takes/" + name]);

function build() {
  const container = $("views");
  container.replaceChildren();
  spans = []; heres = [];
  const opened = $("prompt");
  opened.querySelector("pre").textContent = views()[0].prompt;
  views().forEach((view, v) => {
    const box = make("section", null, {"aria-label": view.label});
    box.append(make("h2", view.label));
    const terms = Object.entries(view.terms).map(([name, t]) => `${number(t.weight)} × ${name} ${number(t.value)}`).join(" + ");
    box.append(make("p", `loss ${number(view.loss)} = ${terms || "no terms"}${view.temperature !== 1 ? `; probabilities and entropies at τ = ${view.temperature}` : ""}`, {class: "small soft"}));
    if (view.note) box.append(make("p", view.note, {class: "small"}));
    box.append(strip(view, v));
    const text = make("div", null, {class: "text", role: "listbox", "aria-label": "The completion, a token each"});
    const opener = firstOf(view, "ranking"), top = firstOf(view, "entropy"), picked = firstOf(view, "divergence");
    let into = text;
    spans.push(view.tokens.map((token, t) => {
      const inside = opener && view.columns["takes/" + opener][t];
      if (inside && into === text) { into = make("span", null, {class: "opener"}); text.append(into); }
      if (!inside) into = text;
      const span = make("span", null, {class: "token", role: "option", tabindex: "-1", dir: "auto", "data-t": t});
      visible(span, token);
      if (top && view.columns["takes/" + top][t]) span.classList.add("top");
      if (picked && view.columns["takes/" + picked][t]) span.classList.add("picked");
      into.append(span);
      return span;
    }));
    text.addEventListener("pointerover", event => over(event, false));
    text.addEventListener("click", event => over(event, true));
    text.addEventListener("focusin", event => over(event, false));
    text.addEventListener("keydown", keys);
    box.append(text);
    const plain = make("details");
    plain.append(make("summary", "The text"), make("pre", view.text ?? view.tokens.join(""), {dir: "auto"}));
    box.append(plain);
    container.append(box);
  });
  state.at = Math.min(state.at, views()[0].tokens.length - 1);
  const select = $("quantity"), names = quantities();
  select.replaceChildren(...names.map(name => make("option", meaning(name)[0] + (meaning(name)[1] ? ` (${meaning(name)[1]})` : ""), {value: name})));
  state.quantity = names.includes(state.quantity) ? state.quantity : names[0];
  select.value = state.quantity;
  paint();
  show(state.at);
  if (matchMedia("(max-width: 900px)").matches) $("panel").replaceChildren();  // it covers the text until a token is asked for
}

function over(event, focus) {
  const token = event.target.closest(".token");
  if (token) show(+token.dataset.t, focus ? token : null);
}
function keys(event) {
  const last = views()[0].tokens.length - 1;
  const to = {ArrowRight: state.at + 1, ArrowLeft: state.at - 1, Home: 0, End: last, PageDown: state.at + 20, PageUp: state.at - 20}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const v = spans.findIndex(row => row.includes(document.activeElement));
  const t = Math.max(0, Math.min(last, to));
  show(t, spans[Math.max(0, v)][t]);
}

function paint() {
  const scale = range(state.quantity);
  const limit = state.threshold >= 1000 ? scale.high : scale.low + (scale.high - scale.low) * state.threshold / 1000;
  const counts = views().map((view, v) => {
    const values = column(view, state.quantity) || [];
    let count = 0;
    spans[v].forEach((span, t) => {
      const value = values[t];
      const on = value !== null && value !== undefined && (state.threshold === 0 || value >= limit);
      if (on) count++;
      span.style.backgroundColor = colour(value, scale);
      span.classList.toggle("off", state.threshold > 0 && !on);
    });
    return `${count} of ${spans[v].length} tokens (${(100 * count / spans[v].length).toFixed(1)} %)`;
  });
  $("count").textContent = `≥ ${number(limit)}: ${counts.join(" | ")}`;
  const legend = $("legend");
  const from = scale.low < 0 ? "rgba(var(--down), .62), transparent" : "transparent";
  legend.replaceChildren(number(scale.low < 0 ? -Math.max(-scale.low, scale.cap) : scale.low),
    make("span", null, {class: "ramp", style: `background: linear-gradient(90deg, ${from}, rgba(var(--up), .62))`}),
    number(scale.low < 0 ? Math.max(-scale.low, scale.cap) : scale.cap));
  most();
}

function most() {
  const name = state.quantity.startsWith("contribution") ? state.quantity : "contribution";
  const view = views()[0], values = column(view, name);
  const total = values.reduce((a, b) => a + Math.abs(b || 0), 0);
  const order = values.map((value, t) => [value || 0, t]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 12);
  $("most").replaceChildren(...order.filter(([value]) => value !== 0).map(([value, t]) => {
    const item = make("li"), button = make("button", shown(view.tokens[t]) || "(empty)", {type: "button"});
    button.addEventListener("click", () => jump(t));
    item.append(button, ` token ${t}: ${number(value)}, ${share(Math.abs(value) / total)}`);
    return item;
  }));
  $("of").textContent = `: ${meaning(name)[0]}, and its share`;
}
function jump(t) {
  show(t, spans[0][t]);
  spans[0][t].scrollIntoView({block: "center"});
}

const PLOT = {height: 160, left: 44, right: 10, top: 8, bottom: 32};
function strip(view, v) {
  const {height, left, right, top, bottom} = PLOT, n = view.tokens.length;
  const room = $("views").clientWidth || 900, across = Math.max(1, Math.min(views().length, Math.floor(room / 330)));
  const width = Math.max(300, Math.min(900, room / across - 18));
  const x = t => left + (t + .5) / n * (width - left - right);
  const gate = Object.keys(view.columns).find(name => name.startsWith("gate/"));
  const lines = [["student_entropy", "--c0", "student's entropy, nats", ""], ["teacher_entropy", "--c1", "teacher's entropy, nats", "6 3"]].filter(([name]) => view.columns[name]);
  const high = largest([1e-9, ...lines.flatMap(([name]) => view.columns[name])]);
  const most = gate ? largest([1, ...view.columns[gate]]) : 1;
  const y = value => top + (1 - value / high) * (height - top - bottom);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, class: "strip", role: "img", "aria-label": "Entropies and gate at each position"});
  const opener = firstOf(view, "ranking");
  const ranked = opener ? view.columns["takes/" + opener] : [], wide = (width - left - right) / n;
  ranked.forEach((on, t) => {  // in one piece where it is a prefix, as an opener is
    if (!on || ranked[t - 1]) return;
    let end = t;
    while (ranked[end + 1]) end++;
    const edge = x(end) + wide / 2;
    svg.append(draw("rect", {x: x(t) - wide / 2, y: top, width: edge - x(t) + wide / 2, height: height - top - bottom, fill: "var(--hatch)"}));
    svg.append(draw("line", {x1: edge, x2: edge, y1: top, y2: height - bottom, stroke: "var(--c2)", "stroke-width": 2}));
  });
  svg.append(draw("line", {x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, stroke: "var(--line)"}));
  for (const value of [0, high / 2, high]) svg.append(draw("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, value.toPrecision(2)));
  for (const t of new Set([0, 1, 2, 3, 4].map(i => Math.round(i * (n - 1) / 4))))
    svg.append(draw("text", {x: x(t), y: height - 18, "text-anchor": "middle"}, `${t}`));
  svg.append(draw("text", {x: (left + width) / 2, y: height - 3, "text-anchor": "middle"}, "token"));
  const path = (values, scale) => values.map((value, t) => value === null ? "" : `${t && values[t - 1] !== null ? "L" : "M"}${x(t).toFixed(1)} ${scale(value).toFixed(1)}`).join("");
  if (gate) svg.append(draw("path", {d: path(view.columns[gate], value => top + (1 - value / most) * (height - top - bottom)), fill: "none", stroke: "var(--c5)", "stroke-width": 1.1, "stroke-dasharray": "1.5 2.5"}));
  for (const [name, color, , dash] of lines) svg.append(draw("path", {d: path(view.columns[name], y), fill: "none", stroke: `var(${color})`, "stroke-width": 1.4, "stroke-dasharray": dash}));
  if (n === 1) for (const [name, color] of lines) if (view.columns[name][0] !== null) svg.append(draw("circle", {cx: x(0), cy: y(view.columns[name][0]), r: 3, fill: `var(${color})`}));
  const here = draw("line", {class: "here", y1: top, y2: height - bottom, x1: 0, x2: 0});
  svg.append(here);
  heres[v] = [here, x];
  svg.addEventListener("click", event => {
    const box = svg.getBoundingClientRect();
    const t = Math.floor(((event.clientX - box.left) / box.width * width - left) / (width - left - right) * n);
    jump(Math.max(0, Math.min(n - 1, t)));
  });
  const key = make("p", null, {class: "small soft keys"});
  for (const [, color, told, dash] of [...lines, ...(gate ? [["", "--c5", `gate, 0 to ${number(most)}`, "."]] : [])]) {
    const one = make("span", null);
    one.append(make("span", null, {class: "key", style: `border-color: var(${color}); border-top-style: ${dash === "." ? "dotted" : dash ? "dashed" : "solid"}`}), told);
    key.append(one);
  }
  if (opener) {
    const one = make("span", null), taken = view.columns["takes/" + opener].reduce((a, b) => a + b, 0);
    one.append(make("span", null, {class: "key area"}), `${opener} term (opener): ${taken} of ${n} tokens`);
    key.append(one);
  }
  const box = make("div");
  box.append(svg, key);
  return box;
}

function show(t, focus) {
  for (const row of spans) {
    const old = row.find(span => span.hasAttribute("aria-current"));
    if (old) { old.removeAttribute("aria-current"); old.tabIndex = -1; }
    row[t].setAttribute("aria-current", "true");
    row[t].tabIndex = 0;
  }
  state.at = t;
  heres.forEach(([line, x]) => { line.setAttribute("x1", x(t)); line.setAttribute("x2", x(t)); });
  if (focus) focus.focus({preventScroll: false});
  const panel = $("panel"), parts = [];
  views().forEach(view => {
    const title = make("h2");
    visible(title, view.tokens[t].replace(/\n/g, "↵"));
    title.append(make("span", `  token ${t}, id ${view.token_ids[t]}`, {class: "small soft"}));
    parts.push(title);
    if (views().length > 1) parts.push(make("p", view.label, {class: "small soft"}));
    parts.push(candidates(view, t), figures(view, t));
  });
  const close = make("button", "×", {type: "button", class: "close", "aria-label": "Close"});
  close.addEventListener("click", () => panel.replaceChildren());
  panel.replaceChildren(close, ...parts);
}

function figures(view, t) {
  const table = make("table", null, {class: "figures"});
  const row = (name, value) => {
    const [told, unit] = meaning(name), line = make("tr", null, {"data-column": name});
    line.append(make("td", told), make("td", exact(value), {class: "number"}), make("td", unit, {class: "soft"}));
    table.append(line);
  };
  for (const name in view.columns) {
    if (name.startsWith("takes/")) {
      const line = make("tr", null, {"data-column": name});
      line.append(make("td", meaning(name)[0]), make("td", view.columns[name][t] ? "yes" : "no", {class: "number"}), make("td", ""));
      table.append(line);
    } else row(name, view.columns[name][t]);
  }
  return table;
}

function candidates(view, t) {
  const c = view.candidates, ids = c.ids[t], k = ids.length, row = 19, width = 344, left = 128, right = 216;
  const written = view.token_ids[t], at = ids.indexOf(written);
  const name = id => { const text = shown(texts.get(id) ?? `⟨#${id}⟩`); return [...text].length > 11 ? [...text].slice(0, 10).join("") + "…" : text; };
  const svg = draw("svg", {viewBox: `0 0 ${width} ${(k + 2.6) * row}`, role: "img", class: "candidates",
    "aria-label": `The student's ${k} candidates and the teacher's order of them`});
  svg.append(draw("text", {x: 0, y: 12}, "student's order"));
  if (c.teacher) svg.append(draw("text", {x: width, y: 12, "text-anchor": "end"}, "teacher's order"));
  const y = place => (place + 1.75) * row;
  ids.forEach((id, i) => {
    const mine = id === written, bold = {"font-weight": mine ? 700 : 400, style: `fill: ${mine ? "var(--focus)" : "var(--ink)"}`};
    svg.append(draw("text", {x: 0, y: y(i) + 4, ...bold}, name(id)));
    svg.append(draw("text", {x: left - 6, y: y(i) + 4, "text-anchor": "end"}, share(c.student[t][i])));
    if (!c.teacher) return;
    const place = c.teacher_ranks[t][i];
    svg.append(draw("line", {x1: left, x2: right, y1: y(i), y2: y(place), stroke: mine ? "var(--focus)" : place === i ? "var(--line)" : "var(--c0)",
      "stroke-width": mine ? 2.5 : 1.3, "data-from": i, "data-to": place}));
    svg.append(draw("text", {x: right + 6, y: y(place) + 4}, share(c.teacher[t][i])));
    svg.append(draw("text", {x: width, y: y(place) + 4, "text-anchor": "end", ...bold}, name(id)));
  });
  const box = make("div");
  box.append(svg);
  if (at < 0) {
    const p = value => value === undefined || value === null ? null : Math.exp(value);
    const teacher = view.columns.teacher_log_prob ? `, teacher ${share(p(view.columns.teacher_log_prob[t]))}` : "";
    box.append(make("p", `Written: ${shown(view.tokens[t])}, not among the candidates: student ${share(p(view.columns.student_log_prob[t]))}${teacher}.`, {class: "small written"}));
  }
  if (c.teacher && !ids.includes(c.teacher_best[t]))
    box.append(make("p", `The teacher's own best, ${shown(texts.get(c.teacher_best[t]) ?? "")}, ${share(c.teacher_best_prob[t])}, is not among them.`, {class: "small"}));
  return box;
}

const timed = change => event => { const start = performance.now(); change(event); document.body.dataset.switched = (performance.now() - start).toFixed(1); };
$("which").addEventListener("change", timed(event => { state.which = +event.target.value; state.threshold = 0; $("threshold").value = 0; state.at = 0; build(); }));
$("quantity").addEventListener("change", timed(event => { state.quantity = event.target.value; state.threshold = 0; $("threshold").value = 0; paint(); }));
$("threshold").addEventListener("input", timed(event => { state.threshold = +event.target.value; paint(); }));
build();
document.body.dataset.built = (performance.now() - began).toFixed(1);
})();
