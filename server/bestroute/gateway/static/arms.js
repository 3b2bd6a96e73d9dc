// The chart of a decision: every arm by what it costs and what it is expected to be worth.

import { dollars, gain, named, percent, saving, svg } from "./dom.js";
import { decades, free, linear, logarithmic, ticks } from "./scales.js";

const RADIUS = 9;
const CHEAPEST = 1e-8; // what costs nothing has no place on a scale of powers
const STEPS = 160;
const LETTER = 6.4; // about the width of one
const BOLD = 7.1;

const price = (arm) => Math.max(arm.estimated_cost_usd, CHEAPEST);
const key = (arm) => `${arm.model}:${arm.samples}`;

/** By what a decision chooses: what goes up in the chart, and where an arm has to be above. */
function rule(decision) {
  const { quality_per_usd: rate, match_threshold: threshold } = decision.criterion;
  if (rate === undefined) {
    return {
      axis: "probability to match the reference",
      value: (arm) => arm.match_probability,
      text: (value) => percent(value),
      least: () => threshold,
    };
  }
  const reference = decision.reference.estimated_cost_usd;
  return {
    axis: "expected quality, less the reference’s",
    value: (arm) => arm.expected_gain,
    text: (value) => gain(value, 2),
    least: (cost) => rate * (cost - reference),
  };
}

export function describe(arm, decision, served) {
  const parts = [
    named(arm),
    `${dollars(arm.estimated_cost_usd)} (${cheaper(arm, decision.reference)})`,
    arm.expected_gain === null ? null : `gain ${gain(arm.expected_gain)}`,
    `match ${percent(arm.match_probability)}`,
    `${Math.round(arm.expected_output_tokens)} tokens an answer`,
    arm.disabled ? "switched off" : null,
    served(arm.model) ? null : "not served here",
  ];
  return parts.filter(Boolean).join(" · ");
}

function cheaper(arm, reference) {
  if (key(arm) === key(reference)) return "the reference";
  const saved = saving(arm.estimated_cost_usd, reference.estimated_cost_usd);
  return saved >= 0 ? `saves ${percent(saved)}` : `costs ${percent(-saved)} more`;
}

/**
 * Draw a decision.
 *
 * look is told which arm is pointed at or focused, null where none is any more; pick which is
 * clicked, or Enter is pressed on.
 */
export function drawArms(box, decision, served, look, pick) {
  const { reference } = decision;
  const by = rule(decision);
  const others = decision.arms.filter((arm) => key(arm) !== key(reference));
  const points = [...others, reference].filter((arm) => by.value(arm) !== null);
  points.sort((a, b) => price(a) - price(b));

  const width = box.clientWidth || 640;
  const height = Math.min(430, Math.max(300, Math.round(0.62 * width)));
  const edge = { left: 46, right: width - 14, top: 26, bottom: height - 40 };
  const costs = points.map(price);
  const domain = [Math.min(...costs) / 1.5, Math.max(...costs) * 1.5];
  const values = points.map(by.value);
  const room = (Math.max(...values) - Math.min(...values) || 0.1) * 0.12;
  const range = [Math.min(...values) - room, Math.max(...values) + room];
  const x = logarithmic(domain, [edge.left, edge.right]);
  const y = linear(range, [edge.bottom, edge.top]);

  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.arm : null;
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": "Arms by estimated cost and expected quality; arrow keys go from one to the next",
  });
  const line = border(decision, domain, x, y, edge, by);
  picture.append(
    ...axes(domain, range, x, y, edge, by),
    ...shaded(line, edge),
    ...tracks(points, line, x, y, by, decision, edge),
  );
  const dots = points.map((arm) => dot(arm, x(price(arm)), y(by.value(arm)), decision, served));
  for (const [index, node] of dots.entries()) {
    const arm = points[index];
    node.addEventListener("pointerenter", () => look(arm));
    node.addEventListener("pointerleave", () => look(null));
    node.addEventListener("focus", () => look(arm));
    node.addEventListener("blur", () => look(null));
    node.addEventListener("click", () => pick(arm));
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (step) dots[(index + step + dots.length) % dots.length].focus();
      else if (event.key === "Enter" || event.key === " ") pick(arm);
      else return;
      event.preventDefault();
    });
  }
  picture.append(...dots);
  box.replaceChildren(picture);
  if (focused) dots.find((node) => node.dataset.arm === focused)?.focus();
}

function axes(domain, range, x, y, edge, by) {
  const found = [
    svg("text", { x: edge.left - 40, y: 12 }, `↑ ${by.axis}`),
    svg(
      "text",
      { x: edge.right, y: edge.bottom + 35, "text-anchor": "end" },
      "estimated cost of the answer in USD →",
    ),
  ];
  for (const value of ticks(range, 5)) {
    const at = y(value);
    found.push(
      svg("line", { class: "grid", x1: edge.left, x2: edge.right, y1: at, y2: at }),
      svg("text", { x: edge.left - 8, y: at + 4, "text-anchor": "end" }, by.text(value)),
    );
  }
  for (const value of decades(domain)) {
    const at = x(value);
    const text = `$${Number(value.toPrecision(1)).toFixed(Math.max(0, -Math.floor(Math.log10(value) + 1e-9)))}`;
    found.push(
      svg("line", { class: "grid", x1: at, x2: at, y1: edge.top, y2: edge.bottom }),
      svg("text", { x: at, y: edge.bottom + 17, "text-anchor": "middle" }, text),
    );
  }
  return found;
}

/** Places on the line that an arm has to be above, from left to right, to be chosen. */
function border(decision, [low], x, y, edge, by) {
  const rated = decision.criterion.quality_per_usd !== undefined;
  const high = rated ? price(decision.reference) : Math.exp(Math.log(low) + 40);
  const inside = (at) => Math.min(edge.bottom, Math.max(edge.top, at));
  const places = [];
  for (let step = 0; step <= STEPS; step += 1) {
    const cost = low * (high / low) ** (step / STEPS);
    const across = Math.min(edge.right, x(cost));
    places.push([across, inside(y(by.least(cost)))]);
  }
  return places;
}

function shaded(places, edge) {
  const line = places.map(([across, up]) => `${across.toFixed(1)},${up.toFixed(1)}`).join(" ");
  const [last] = places.at(-1);
  return [
    svg("polygon", { class: "meets", points: `${edge.left},${edge.top} ${line} ${last},${edge.top}` }),
    svg("polyline", { class: "rule", points: line }),
  ];
}

/** A line through the arms of each model, and the model’s name where there is room for it. */
function tracks(points, line, x, y, by, decision, edge) {
  const taken = [
    ...points.map((arm) => around(x(price(arm)), y(by.value(arm)), RADIUS)),
    ...line.map(([across, up]) => around(across, up, 2)),
  ];
  const found = [];
  const marked = [decision.arm.model, decision.reference.model];
  for (const model of new Set([...marked, ...points.map((arm) => arm.model)])) {
    const own = points.filter((arm) => arm.model === model);
    const places = own.map((arm) => [x(price(arm)), y(by.value(arm))]);
    found.push(svg("polyline", { class: "track", points: places.map(String).join(" ") }));
    const [first, last] = [places[0], places.at(-1)];
    const long = model.length * (model === decision.arm.model ? BOLD : LETTER);
    if (!first) continue;
    const spots = [
      label(last[0] + 16, last[1], long),
      label(first[0] - 16 - long, first[1], long),
      label(last[0] - long / 2, last[1] - 19, long),
      label(last[0] - long / 2, last[1] + 19, long),
      label(first[0] - long / 2, first[1] - 19, long),
      label(first[0] - long / 2, first[1] + 19, long),
      label(last[0] + 10, last[1] - 16, long),
      label(last[0] + 10, last[1] + 16, long),
      label(first[0] - 10 - long, first[1] + 16, long),
      label(first[0] - 10 - long, first[1] - 16, long),
    ];
    const spot = free(spots, taken, edge);
    if (!spot) continue; // a small window; pointing at the arm tells its name
    taken.push(spot);
    const kind = ["chosen", "reference"].filter((_, index) => model === marked[index]).join(" ");
    found.push(svg("text", { class: `name ${kind}`, x: spot.left, y: spot.bottom - 4 }, model));
  }
  return found;
}

const around = (across, up, room) => ({
  left: across - room,
  right: across + room,
  top: up - room,
  bottom: up + room,
});

const label = (left, middle, long) => ({
  left,
  right: left + long,
  top: middle - 8,
  bottom: middle + 8,
});

function dot(arm, across, up, decision, served) {
  const chosen = key(arm) === key(decision.arm);
  const isReference = key(arm) === key(decision.reference);
  const classes = [
    "dot",
    chosen ? "chosen" : "",
    isReference ? "reference" : "",
    arm.disabled ? "off" : "",
  ];
  const words = describe(arm, decision, served);
  const node = svg(
    "g",
    {
      class: classes.filter(Boolean).join(" "),
      transform: `translate(${across.toFixed(1)} ${up.toFixed(1)})`,
      tabindex: chosen ? 0 : -1,
      role: "button",
      "aria-label": chosen ? `chosen: ${words}` : words,
      "data-arm": key(arm),
    },
    chosen ? svg("circle", { class: "halo", r: RADIUS + 4 }) : null,
    svg("circle", { r: RADIUS }),
    svg("text", { y: 4 }, String(arm.samples)),
  );
  return node;
}

/** A hint at what is to be seen. */
export function legend(decision) {
  return decision.criterion.quality_per_usd === undefined
    ? "Numbers: answers drawn. Shaded: matches often enough; the cheapest there is chosen."
    : "Numbers: answers drawn. Shaded: worth more than the reference at this target; the farthest above the line is chosen.";
}
