"use strict";
// What every page's script stands on: its data, elements, and texts of which each character is seen.
const began = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const make = (name, text, attributes = {}) => {
  const node = document.createElement(name);
  if (text !== null && text !== undefined) node.textContent = text;
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  return node;
};
const draw = (name, attributes, text) => {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
};

// Characters that would not be seen, or would turn the page's order around.
const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164\ufe00-\ufe0f\ufeff\ufff9-\ufffb\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/u, mark = /\p{M}/u;
function visible(node, text) {
  if (/^⟨([0-9A-F]{2}( [0-9A-F]{2})*|#\d+)⟩$/.test(text)) return node.append(text);
  let plain = "";
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  for (const c of text) {
    if (c === " ") { flush(); node.append(make("i", "·")); }
    else if (c === "\n") { flush(); node.append(make("i", "↵"), "\n"); }
    else if (c === "\t") { flush(); node.append(make("i", "⇥")); }
    else if (hidden.test(c)) { flush(); node.append(make("i", "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩")); }
    else plain += !plain && mark.test(c) ? "◌" + c : c;
  }
  flush();
}
