// Elements and words. Texts only ever become text: nothing here reads markup.

const SVG = "http://www.w3.org/2000/svg";

/** Stays on the line of its number. */
export const UNIT = "\u00a0%";

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An amount, and for whoever reads the page by program the exact number. */
export function money(usd) {
  return el("data", { value: usd }, dollars(usd));
}

/** Three digits that count, however small the amount. */
export function dollars(usd) {
  const size = Math.abs(usd);
  if (!size) return "$0";
  const digits = Math.min(12, Math.max(2, 2 - Math.floor(Math.log10(size))));
  return `${usd < 0 ? "−" : ""}$${size.toFixed(digits)}`;
}

export function percent(share, digits = 0) {
  if (share === null) return "?";
  const text = (Math.abs(share) * 100).toFixed(digits);
  return `${share < 0 && Number(text) ? "−" : ""}${text}${UNIT}`;
}

/** A difference in quality. */
export function gain(value, digits = 3) {
  if (value === null) return "?";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) ? `${value < 0 ? "−" : "+"}${text}` : "0";
}

/** Any number, with the sign that is as wide as a digit. */
export const signed = (number, digits) => number.toFixed(digits).replace("-", "−");

export const count = (number) => number.toLocaleString("en-US");

export const named = (arm) => `${arm.model} × ${arm.samples}`;

export const saving = (cost, reference) => (reference > 0 ? 1 - cost / reference : 0);

export function figure(label, value, note = "", good = false) {
  return el(
    "div",
    { class: good ? "good" : null },
    el("dt", {}, label),
    el("dd", { class: "value" }, value),
    el("dd", { class: "note" }, note),
  );
}

/** Rows of a table, the first cell of each its heading; `marked` are the chosen ones. */
export function table(node, heads, rows, marked = () => false) {
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...cells], index) =>
    el(
      "tr",
      { class: marked(index) ? "chosen" : null },
      el("th", { scope: "row" }, first),
      ...cells.map((text) => el("td", {}, text)),
    ),
  );
  node.replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
}

/** Call it no more often than every so many milliseconds, and always once more at the end. */
export function throttled(call, milliseconds) {
  let timer = null;
  return () => {
    timer ??= setTimeout(() => {
      timer = null;
      call();
    }, milliseconds);
  };
}
