// What was spent over the last hours, beside what the reference would have cost.

import { get } from "./api.js";
import { $, count, dollars, el, figure, money, named, percent, saving, svg, table } from "./dom.js";
import { linear, ticks } from "./scales.js";

const REFRESH = 4000;

const BASES = {
  answers: {
    spent: (period) => period.answers_usd,
    reference: (period) => period.answers_reference_usd,
    many: (period) => period.answers,
    labels: ["Spent on answers", "The reference, by estimate", "Answers"],
  },
  decisions: {
    spent: (period) => period.estimated_usd,
    reference: (period) => period.reference_usd,
    many: (period) => period.decisions,
    labels: ["Decided to spend, by estimate", "The reference, by estimate", "Decisions"],
  },
};

let history = null;
let timer = null;
let asked = 0;

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const clock = (seconds) =>
  new Date(1000 * seconds).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });

export function startSavings() {
  for (const radio of document.querySelectorAll("input[name=hours]")) {
    radio.addEventListener("change", refresh);
  }
  for (const radio of document.querySelectorAll("input[name=basis]")) {
    radio.addEventListener("change", () => history && show());
  }
  document.addEventListener("visibilitychange", refresh);
  new ResizeObserver(() => history && drawSeries()).observe($("series"));
}

/** Ask now, and again and again for as long as somebody looks. */
export async function refresh() {
  clearTimeout(timer);
  if ($("view-savings").hidden || document.hidden) return;
  const own = (asked += 1);
  try {
    const found = await get(`bestroute/history?hours=${chosen("hours")}`);
    if (own !== asked) return;
    history = found;
    $("savings-error").textContent = "";
    show();
  } catch (error) {
    if (own !== asked) return;
    if (error.status !== 401) $("savings-error").textContent = error.message;
  }
  timer = setTimeout(refresh, REFRESH);
}

function show() {
  const basis = BASES[chosen("basis")];
  const { total } = history;
  const [spent, reference] = [basis.spent(total), basis.reference(total)];
  const saved = reference - spent;
  const troubles = [
    total.failovers ? `failovers: ${count(total.failovers)}` : "",
    total.errors ? `errors: ${count(total.errors)}` : "",
  ];
  $("totals").replaceChildren(
    figure(basis.labels[0], money(spent)),
    figure(basis.labels[1], money(reference)),
    saved >= 0
      ? figure("Saved", money(saved), percent(saving(spent, reference)), true)
      : figure("Cost more by", money(-saved), percent(-saving(spent, reference))),
    figure(
      basis.labels[2],
      el("data", { value: basis.many(total) }, count(basis.many(total))),
      troubles.filter(Boolean).join(", "),
    ),
  );
  const empty = !basis.many(total) && !spent;
  $("nothing").hidden = !empty;
  $("nothing").textContent = empty ? nothing(total) : "";
  $("series-box").hidden = empty;
  drawSeries();
  listSeries(basis);
  showShares(total);
  const processes =
    history.workers > 1 ? ` The server runs ${history.workers} processes; this is one of them.` : "";
  $("scope").textContent =
    `Since ${new Date(1000 * history.since).toLocaleString("en-GB")}, when the process started; ` +
    `at most a day is kept. Decisions that this page shows while you type are not counted.${processes}`;
}

function nothing(total) {
  const { hours } = history;
  const time = hours === 1 ? "the last hour" : `the last ${hours} hours`;
  if (chosen("basis") === "decisions") {
    return `Nothing was decided in ${time}. Send requests to the API, or generate an answer here.`;
  }
  const decided = total.decisions
    ? ` ${count(total.decisions)} prompts were routed, though: see “decisions, estimated”.`
    : "";
  return `Nothing was answered in ${time}.${decided} Generate an answer here, or by the API, and it shows up.`;
}

function drawSeries() {
  const box = $("series");
  const basis = BASES[chosen("basis")];
  const { now, since, hours, step, periods } = history;
  const width = box.clientWidth;
  if (!width) return;
  const height = 244;
  const edge = { left: 64, right: width - 8, top: 10, bottom: height - 24 };
  const last = Math.floor(now / step) * step + step;
  const first = last - hours * 3600;
  const x = linear([first, last], [edge.left, edge.right]);
  const most = Math.max(...periods.map((p) => Math.max(basis.spent(p), basis.reference(p))), 1e-12);
  const y = linear([0, most * 1.05], [edge.bottom, edge.top]);
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `Money by ${step / 60} minutes: spent, and saved against the reference; the table has the numbers`,
  });
  picture.append(...axes(most, y, first, last, x, edge));
  if (since > first) picture.append(...before(x(since), edge));
  const wide = Math.max(1, x(first + step) - x(first) - 2);
  for (const period of periods) {
    if (period.start < first) continue;
    const [spent, reference] = [basis.spent(period), basis.reference(period)];
    const at = x(period.start) + 1;
    const bar = (kind, from, to) =>
      svg("rect", { class: kind, x: at, width: wide, y: y(to), height: Math.max(0, y(from) - y(to)) });
    const saved = reference - spent;
    picture.append(
      svg(
        "g",
        { class: "column" },
        svg("title", {}, `${clock(period.start)}: spent ${dollars(spent)}, the reference ${dollars(reference)}`),
        bar("spent", 0, Math.min(spent, reference)),
        saved >= 0 ? bar("saved", spent, reference) : bar("over", reference, spent),
      ),
    );
  }
  box.replaceChildren(picture);
}

/** The time in which nothing was kept, because the process had not begun. */
function before(start, edge) {
  const right = start - edge.left > 130;
  return [
    svg("rect", {
      class: "before",
      x: edge.left,
      y: edge.top,
      width: start - edge.left,
      height: edge.bottom - edge.top,
    }),
    svg(
      "text",
      { x: start + (right ? -8 : 8), y: edge.top + 14, "text-anchor": right ? "end" : "start" },
      "process started",
    ),
  ];
}

function axes(most, y, first, last, x, edge) {
  const found = [];
  const values = ticks([0, most], 4);
  const digits = Math.max(0, -Math.floor(Math.log10(values[1] ?? 1) + 1e-9));
  for (const value of values) {
    found.push(
      svg("line", { class: "grid", x1: edge.left, x2: edge.right, y1: y(value), y2: y(value) }),
      svg("text", { x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, value ? `$${value.toFixed(digits)}` : "$0"),
    );
  }
  const every = [600, 1800, 3600, 7200, 14400, 28800].find(
    (each) => (last - first) / each <= (edge.right - edge.left) / 70,
  );
  for (let at = Math.ceil(first / every) * every; at < last; at += every) {
    found.push(svg("text", { x: x(at), y: edge.bottom + 18, "text-anchor": "middle" }, clock(at)));
  }
  return found;
}

function listSeries(basis) {
  table(
    $("series-table"),
    ["from", basis.labels[2].toLowerCase(), "spent", "reference", "saved"],
    history.periods.map((period) => [
      clock(period.start),
      count(basis.many(period)),
      dollars(basis.spent(period)),
      dollars(basis.reference(period)),
      dollars(basis.reference(period) - basis.spent(period)),
    ]),
  );
}

function showShares(total) {
  $("shares-card").hidden = !total.arms.length;
  $("shares").replaceChildren(
    ...total.arms.map((arm) =>
      el(
        "div",
        { class: "share" },
        el("span", {}, named(arm)),
        el("meter", { value: arm.decisions / total.decisions, "aria-hidden": "true" }),
        el("span", {}, `${count(arm.decisions)} · ${percent(arm.decisions / total.decisions)}`),
      ),
    ),
  );
}
