// Candidates side by side as they are written, what the reward makes of them, and the money.

import { $, count, dollars, el, figure, money, percent, saving, signed } from "./dom.js";

const ENDS = { length: "cut at the token limit", cancelled: "cancelled", content_filter: "filtered" };

/** One Generate: told of its events, it shows them in place of the former one's. */
export class Answers {
  constructor() {
    this.candidates = new Map();
    this.finished = false;
    this.reference = "";
    $("answers").hidden = false;
    $("candidates").replaceChildren();
    $("events").replaceChildren();
    $("money").hidden = true;
    $("generate-error").textContent = "";
    $("result").textContent = "Asking …";
  }

  happened({ decision, delta, retry, candidate, fallback, result }) {
    if (decision) this.decided(decision);
    else if (delta) this.column(delta.candidate).text.firstChild.appendData(delta.text);
    else if (retry) this.note(`${retry.model}: attempt ${retry.attempt} failed (${retry.cause}); asked again after ${retry.delay.toFixed(1)} s.`);
    else if (fallback) this.fellBack(fallback);
    else if (candidate) this.complete(candidate);
    else if (result) this.result(result);
  }

  /** The stream is over. */
  ended() {
    if (!this.finished) this.failed("The connection has ended before the answer was complete.");
  }

  failed(words) {
    $("result").textContent = "";
    $("generate-error").textContent = words;
    for (const { data, mark } of this.candidates.values()) {
      if (!data) mark.textContent = "not complete";
    }
  }

  decided({ arm, reference }) {
    this.reference = reference.model;
    const many = arm.samples === 1 ? "one answer" : `${arm.samples} answers`;
    $("result").textContent = `Drawing ${many} of ${arm.model} …`;
    for (let index = 0; index < arm.samples; index += 1) this.column(index, arm.model);
    $("answers").scrollIntoView({ block: "nearest" });
  }

  fellBack({ failed_model: failed, model, samples, cause }) {
    this.note(`${failed} gave no answer (${cause}); ${model} is asked instead.`);
    const next = this.candidates.size;
    for (let index = next; index < next + samples; index += 1) this.column(index, model);
  }

  note(words) {
    $("events").append(el("li", {}, words));
  }

  /** The column of a candidate; beyond those announced it is the reference’s. */
  column(index, model = this.reference) {
    let found = this.candidates.get(index);
    if (!found) {
      const text = el("pre", { tabindex: 0, role: "group", "aria-label": `answer ${index + 1}` });
      text.append(document.createTextNode(""));
      const mark = el("span", { class: "mark" }, "writing …");
      const footer = el("footer", {});
      const node = el(
        "article",
        { class: "candidate", "data-candidate": index, "aria-label": `candidate ${index + 1}` },
        el("header", {}, el("b", {}, String(index + 1)), el("span", {}, model), mark),
        text,
        el("p", { class: "error" }),
        footer,
      );
      found = { node, text, mark, footer, data: null };
      this.candidates.set(index, found);
      $("candidates").append(node);
    }
    return found;
  }

  complete(data) {
    const found = this.column(data.index, data.model);
    const { node, text, mark, footer } = found;
    found.data = data;
    text.firstChild.data = data.text;
    if (data.error) {
      node.classList.add("failed");
      node.querySelector(".error").textContent = data.error;
      mark.textContent = "failed";
    } else {
      mark.textContent = ENDS[data.finish_reason] ?? "complete";
    }
    const { input_tokens: read, output_tokens: written, estimated } = data.usage;
    footer.replaceChildren(
      data.reward === null
        ? el("span", {}, data.error ? "" : "not scored")
        : el(
            "span",
            { class: "reward" },
            el("span", {}, "reward"),
            // Any number may be a reward; what is shown of it rises with it, between 0 and 1.
            el("meter", { value: 1 / (1 + Math.exp(-data.reward)), "aria-label": "reward" }),
            el("data", { value: data.reward }, signed(data.reward, 3)),
          ),
      el(
        "span",
        {},
        `${count(read)} + ${count(written)} tokens${estimated ? " (estimated)" : ""} · `,
        money(data.cost_usd),
      ),
    );
  }

  result(result) {
    this.finished = true;
    const all = [...this.candidates.values()];
    const best = this.candidates.get(result.candidate);
    const scored = all.filter(({ data }) => data?.reward !== null && data && !data.error);
    best.node.classList.add("best");
    best.mark.textContent = scored.length > 1 ? "★ best" : "★ the answer";
    $("result").replaceChildren(
      el("strong", {}, `Answer ${result.candidate + 1} is given`),
      `, by ${result.model}${this.why(best, scored, result)}.`,
      el(
        "span",
        { class: "quiet" },
        ` First words after ${result.time_to_first_token.toFixed(2)} s, done after ${result.duration.toFixed(2)} s.`,
      ),
    );
    this.bill(result);
  }

  why(best, scored, result) {
    if (result.escalated) return "; the answers did not convince, so the reference was asked too";
    if (scored.length < 2) return "";
    const highest = Math.max(...scored.map(({ data }) => data.reward));
    return best.data.reward === highest
      ? ": the highest reward"
      : ": agreement with the other answers counts beside the reward";
  }

  bill({ cost_usd: cost, reference_cost_usd: reference }) {
    const saved = reference - cost;
    const drawn = this.candidates.size;
    $("money").replaceChildren(
      figure("This answer cost", money(cost), drawn > 1 ? `all ${drawn} candidates` : "one candidate"),
      figure("The reference, by estimate", money(reference), `one answer of ${this.reference}`),
      saved >= 0
        ? figure("Saved", money(saved), percent(saving(cost, reference)), true)
        : figure("Cost more by", money(-saved), `than ${dollars(reference)}`),
    );
    $("money").hidden = false;
  }
}
