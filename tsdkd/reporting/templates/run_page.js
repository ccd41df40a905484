(() => {
const number = value => typeof value !== "number" ? String(value) : value === 0 ? "0" : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(2) : String(+value.toPrecision(4));
const colour = line => `var(--c${line.look % 8})`, dash = line => ["", "7 3", "2 3"][Math.floor(line.look / 8) % 3];

const ends = values => values.reduce(([low, high], v) => [v < low ? v : low, v > high ? v : high], [Infinity, -Infinity]);

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * size).find(s => (high - low) / s <= count) || 10 * size;
  const made = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) made.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return made;
}

function chart(panel) {
  const off = new Set(), width = 420, height = 230, left = 56, right = 12, top = 10, bottom = 36;
  const figure = make("figure", null, {class: "panel"});
  const title = make("h3", panel.title), value = make("div", "", {class: "value small soft", "aria-live": "off"});
  const holder = make("div"), legend = make("div", null, {class: "legend"});
  figure.append(title, value, holder, legend);
  panel.lines.forEach((line, i) => {
    const button = make("button", null, {type: "button", "aria-pressed": "true"});
    button.append(make("span", null, {class: "key", style: `border-color: ${colour(line)}; border-top-style: ${dash(line) ? "dashed" : "solid"}`}), line.label);
    button.addEventListener("click", () => {
      off.has(i) ? off.delete(i) : off.add(i);
      button.setAttribute("aria-pressed", String(!off.has(i)));
      paint();
    });
    legend.append(button);
  });
  function paint() {
    const shown = panel.lines.map((line, i) => [line, i]).filter(([, i]) => !off.has(i));
    const points = shown.flatMap(([line]) => line.points.filter(p => p[1] !== null));
    holder.replaceChildren();
    if (!points.length) return;
    const xs = points.map(p => p[0]), ys = points.flatMap(p => p.length === 4 ? [p[2], p[3]] : [p[1]]).filter(v => v !== null);
    let [low, high] = ends(ys);
    if (low >= 0) low = 0;
    if (high === low) high = low + (Math.abs(low) || 1);
    const [x0, x1] = ends(xs);
    const x = v => left + (x1 > x0 ? (v - x0) / (x1 - x0) : .5) * (width - left - right);
    const y = v => top + (1 - (v - low) / (high - low)) * (height - top - bottom);
    const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${panel.title}, ${panel.unit}, over optimizer steps`});
    for (const v of ticks(low, high, 5)) {
      svg.append(draw("line", {x1: left, x2: width - right, y1: y(v), y2: y(v), stroke: "var(--line)", "stroke-width": .7}));
      svg.append(draw("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, number(v)));
    }
    for (const v of ticks(x0, x1, 5)) svg.append(draw("text", {x: x(v), y: height - bottom + 15, "text-anchor": "middle"}, number(v)));
    svg.append(draw("text", {x: (left + width) / 2, y: height - 4, "text-anchor": "middle"}, "optimizer step"));
    if (panel.unit) svg.append(draw("text", {x: 0, y: 0, transform: `translate(11 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, panel.unit));
    for (const [line, i] of shown) {
      const there = line.points.filter(p => p[1] !== null);
      const d = line.points.map((p, n) => p[1] === null ? "" : `${n && line.points[n - 1][1] !== null ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      svg.append(draw("path", {d, fill: "none", stroke: colour(line), "stroke-width": 1.6, "stroke-dasharray": dash(line), "data-line": i}));
      for (const p of there) {
        if (p.length === 4) svg.append(draw("line", {x1: x(p[0]), x2: x(p[0]), y1: y(p[2]), y2: y(p[3]), stroke: colour(line), "stroke-width": 1}));
        if (p.length === 4 || there.length < 30) svg.append(draw("circle", {cx: x(p[0]), cy: y(p[1]), r: 2.4, fill: colour(line)}));
      }
    }
    const here = draw("line", {y1: top, y2: height - bottom, stroke: "var(--soft)", "stroke-width": .8, visibility: "hidden"});
    svg.append(here);
    const steps = [...new Set(xs)].sort((a, b) => a - b);
    let chosen = -1;
    const read = nearest => {
      here.setAttribute("x1", x(nearest)); here.setAttribute("x2", x(nearest)); here.setAttribute("visibility", "visible");
      const found = shown.map(([line]) => [line, line.points.find(p => p[0] === nearest)]).filter(([, p]) => p && p[1] !== null);
      value.textContent = `step ${number(nearest)}: ` + found.map(([line, p]) => `${line.label} ${number(p[1])}`).join(", ");
      chosen = steps.indexOf(nearest);
    };
    const point = event => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
      read(steps.reduce((best, v) => Math.abs(x(v) - at) < Math.abs(x(best) - at) ? v : best, steps[0]));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("keydown", event => {
      const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!move) return;
      event.preventDefault();
      read(steps[Math.max(0, Math.min(steps.length - 1, chosen + move))]);
    });
    svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "touch") return;
      here.setAttribute("visibility", "hidden"); value.textContent = ""; });
    holder.append(svg);
  }
  paint();
  return figure;
}

if ($("panels")) {
  $("panels").append(...data.panels.map(chart));
  if (data.rest.length) $("others").addEventListener("toggle", () => {
    if (!$("rest").childElementCount) $("rest").append(...data.rest.map(chart));
  });
  else $("others").remove();
}

function strip(sample, high) {
  const box = make("div", null, {class: "strip", role: "img", "aria-label": `The completion of step ${sample.step}`});
  const entropy = sample.columns.student_entropy || [], opener = sample.columns.opener || [], top = sample.columns.top_entropy || [];
  sample.tokens.forEach((token, t) => {
    const value = entropy[t], span = make("span", null, {dir: "auto", title: value === undefined || value === null ? "" : `${number(value)} nats`});
    visible(span, token);
    if (value) span.style.backgroundColor = `rgba(var(--up), ${Math.min(1, value / high) * .62})`;
    if (opener[t]) span.classList.add("opener");
    if (top[t]) span.classList.add("top");
    box.append(span);
  });
  return box;
}
const all = data.samples.flat();
if (all.length) {
  $("samples").hidden = false;
  let high = 1e-9;
  for (const sample of all) for (const value of sample.columns.student_entropy || []) if (value > high) high = value;
  const shownSteps = samples => [...new Set(samples.map(sample => sample.step))].sort((a, b) => a - b);
  data.samples.forEach((samples, r) => {
    const steps = shownSteps(samples);
    if (!steps.length) return;
    const wanted = new Set([steps[0], steps[steps.length - 1]]);
    const row = make("p", null, {class: "small"}), into = make("div");
    row.append(data.runs.length > 1 ? `${data.runs[r]}: ` : "", "steps ");
    const fill = () => {
      into.replaceChildren();
      for (const step of steps.filter(s => wanted.has(s))) {
        into.append(make("h3", `Step ${step}${data.runs.length > 1 ? ", " + data.runs[r] : ""}`));
        for (const sample of samples.filter(s => s.step === step)) {
          const prompt = make("details");
          prompt.append(make("summary", "Prompt", {class: "small"}), make("pre", sample.prompt, {dir: "auto"}));
          into.append(prompt, strip(sample, high));
        }
      }
    };
    for (const step of steps) {
      const button = make("button", step, {type: "button", "aria-pressed": String(wanted.has(step))});
      button.addEventListener("click", () => {
        wanted.has(step) ? wanted.delete(step) : wanted.add(step);
        button.setAttribute("aria-pressed", String(wanted.has(step)));
        fill();
      });
      row.append(button, " ");
    }
    $("pick").append(row);
    $("strips").append(into);
    fill();
  });
}
})();
