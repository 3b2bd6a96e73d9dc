// A prompt, its decision, and the answers as they come.

import { get, post, told } from "./api.js";
import { describe, drawArms, legend } from "./arms.js";
import { Answers } from "./answers.js";
import { $, UNIT, dollars, el, gain, named, percent, saving, table, throttled } from "./dom.js";

const TARGETS = {
  max_quality_drop: { label: "Quality drop of at most", most: 10, step: 0.1, value: 1 },
  min_cost_saving: { label: "Saving of at least", most: 80, step: 1, value: 40 },
  match_threshold: { label: "Matches the reference with at least", most: 100, step: 1, value: 80 },
};
const FALLBACKS = {
  below_threshold: "No arm meets this target for this prompt, so the reference is asked. ",
  over_budget: "Everything that meets the target costs too much. ",
  router_failed: "The router has failed, so the reference is asked. ",
  shadow: "The server is in shadow mode: it decides, and always asks the reference. ",
};

let pool = null;
let decision = null;
let generating = null;
const kept = Object.fromEntries(Object.entries(TARGETS).map(([name, { value }]) => [name, value]));

const served = (model) => pool?.models.find((each) => each.name === model)?.served ?? false;
const target = () => document.querySelector("input[name=target]:checked").value;
const tenths = (number) => Number(number.toFixed(1));

export async function startTrying() {
  for (const radio of document.querySelectorAll("input[name=target]")) {
    radio.addEventListener("change", () => {
      setSlider();
      soon();
    });
  }
  $("slider").addEventListener("input", () => {
    kept[target()] = Number($("slider").value);
    showTarget();
    soon();
  });
  $("prompt").addEventListener("input", soon);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("stop").addEventListener("click", () => generating?.abort());
  let width = 0;
  new ResizeObserver(() => {
    if (decision && $("chart").clientWidth !== width) draw();
    width = $("chart").clientWidth;
  }).observe($("chart"));
  setSlider();
  await loadPool();
}

/** Learn of the pool; also once there is a key. */
export async function loadPool() {
  try {
    pool = await get("bestroute/pool");
  } catch (error) {
    if (error.status !== 401) say("decide-error", error.message);
    return;
  }
  const { name, version } = pool.bundle;
  const models = pool.models.length;
  $("bundle").textContent = `bundle ${name} ${version} · ${models} models · reference ${pool.reference}`;
  const choices = [...pool.arms, { model: pool.reference, samples: 1 }].map((arm) =>
    el("option", { value: JSON.stringify([arm.model, arm.samples]) }, named(arm)),
  );
  $("arm").replaceChildren(el("option", { value: "" }, "the decision"), ...choices);
  say("decide-error", "");
  setSlider();
  soon();
}

function setSlider() {
  const { label, most, step } = TARGETS[target()];
  const slider = $("slider");
  slider.max = target() === "min_cost_saving" ? Math.min(most, mostSaved()) : most;
  slider.step = step;
  slider.value = kept[target()];
  kept[target()] = Number(slider.value);
  $("slider-label").textContent = label;
  showTarget();
}

/** What nothing was measured to save can't be asked. */
function mostSaved() {
  const curve = pool?.trade_offs ?? pool?.thresholds ?? [];
  return Math.floor(Math.max(1, ...curve.map((point) => 100 * point.cost_saving)));
}

function showTarget() {
  const text = tenths(kept[target()]) + UNIT;
  $("slider-value").textContent = text;
  $("slider").setAttribute("aria-valuetext", text);
}

function asked() {
  return { prompt: $("prompt").value, [target()]: tenths(kept[target()]) / 100 };
}

const soon = throttled(decide, 50);
let wanted = 0;
let deciding = false;

/** Decide about what there is now; of many changes the last one counts. */
async function decide() {
  wanted += 1;
  if (deciding) return;
  deciding = true;
  let latest;
  do {
    latest = wanted;
    await decideOnce();
  } while (latest !== wanted);
  deciding = false;
}

async function decideOnce() {
  const question = asked();
  if (!question.prompt.trim()) {
    decision = null;
    $("chart").replaceChildren();
    $("arms").replaceChildren();
    say("detail", "");
    say("measured", "");
    say("decide-error", "");
    say("decision", "Type a prompt to see what it would be answered with.");
    return;
  }
  try {
    decision = await post("bestroute/route", question);
    say("decide-error", "");
    show();
  } catch (error) {
    if (error.status !== 401) say("decide-error", error.message);
  }
}

function show() {
  const { arm, reference, fallback } = decision;
  const saved = saving(arm.estimated_cost_usd, reference.estimated_cost_usd);
  const isReference = arm.model === reference.model && arm.samples === 1;
  const took = decision.seconds === null ? "" : ` Read in ${(1000 * decision.seconds).toFixed(1)} ms.`;
  $("decision").replaceChildren(
    FALLBACKS[fallback] ?? "",
    decision.shadow ? `Otherwise it would ask ${named(decision.shadow)}. ` : "",
    "Ask ",
    el("strong", { class: isReference ? "reference" : null }, named(arm)),
    isReference
      ? `: ${dollars(arm.estimated_cost_usd)}.`
      : `: ${dollars(arm.estimated_cost_usd)} instead of ${dollars(reference.estimated_cost_usd)} for ${reference.model}, ${
          saved >= 0 ? `saves ${percent(saved)}` : `costs ${percent(-saved)} more`
        }.`,
    pool?.models.some((model) => model.served) && !served(arm.model)
      ? " No provider serves it here; Generate chooses among those that are served."
      : "",
    el(
      "span",
      { class: "quiet" },
      ` ${decision.prompt_tokens} tokens${decision.truncated ? ", of which the middle was not read" : ""}.`,
      decision.remembered ? " Remembered." : took,
    ),
  );
  say("measured", measured());
  draw();
  listArms();
}

/** What the setting was measured to give, over all prompts of the bundle's data. */
function measured() {
  const { quality_per_usd: rate, match_threshold: threshold } = decision.criterion;
  const point =
    rate === undefined
      ? pool?.thresholds.filter((each) => each.match_threshold <= threshold + 1e-9).at(-1)
      : pool?.trade_offs?.find((each) => each.quality_per_usd === rate);
  if (!point) return "Nothing was measured for this setting.";
  const drop = point.quality_drop;
  const quality = drop <= 0 ? `gained ${percent(-drop, 1)}` : `lost ${percent(drop, 1)}`;
  return (
    `Over the bundle’s data this setting saved ${percent(point.cost_saving)} and ` +
    `${quality} of the quality (95${UNIT} sure: at most ${percent(point.quality_drop_upper, 1)} lost).`
  );
}

function draw() {
  const rest = decision.arms.length ? legend(decision) : "";
  say("detail", rest);
  if (!decision.arms.length) {
    $("chart").replaceChildren();
    return;
  }
  drawArms(
    $("chart"),
    decision,
    served,
    (arm) => say("detail", arm ? describe(arm, decision, served) : rest),
    (arm) => {
      $("arm").value = JSON.stringify([arm.model, arm.samples]);
      say("detail", `${describe(arm, decision, served)} — Generate will use it`);
    },
  );
}

function listArms() {
  const { arm: chosen, reference } = decision;
  const same = (a, b) => a.model === b.model && a.samples === b.samples;
  const rows = [...decision.arms.filter((arm) => !same(arm, reference)), reference];
  rows.sort((a, b) => a.estimated_cost_usd - b.estimated_cost_usd);
  table(
    $("arms"),
    ["arm", "cost", "saves", "gain", "match", "tokens", ""],
    rows.map((arm) => [
      named(arm),
      dollars(arm.estimated_cost_usd),
      percent(saving(arm.estimated_cost_usd, reference.estimated_cost_usd)),
      arm.expected_gain === null ? "–" : gain(arm.expected_gain),
      percent(arm.match_probability),
      String(Math.round(arm.expected_output_tokens)),
      [
        same(arm, chosen) ? "chosen" : "",
        same(arm, reference) ? "reference" : "",
        arm.disabled ? "switched off" : "",
        served(arm.model) ? "" : "not served",
      ]
        .filter(Boolean)
        .join(", "),
    ]),
    (index) => same(rows[index], chosen),
  );
}

async function generate() {
  const question = { ...asked(), escalate: $("escalate").checked };
  if (!question.prompt.trim()) {
    say("decision", "Type a prompt first.");
    $("prompt").focus();
    return;
  }
  if ($("arm").value) {
    const [model, samples] = JSON.parse($("arm").value);
    question.arm = { model, samples };
  }
  generating?.abort();
  const own = (generating = new AbortController());
  const answers = new Answers();
  busy(true);
  try {
    for await (const event of told("bestroute/generate", question, own.signal)) {
      if (event.decision?.arms.length) {
        decision = event.decision;
        show();
      }
      answers.happened(event);
    }
    answers.ended();
  } catch (error) {
    if (generating !== own) return;
    answers.failed(error.name === "AbortError" ? "Stopped; nothing more is asked." : error.message);
  } finally {
    if (generating === own) {
      generating = null;
      busy(false);
    }
  }
}

function busy(working) {
  $("generate").disabled = working;
  $("stop").hidden = !working;
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}
