// Puts the page together: its two views, and the key.

import { keepKey } from "./api.js";
import { $ } from "./dom.js";
import { refresh, startSavings } from "./savings.js";
import { loadPool, startTrying } from "./try.js";

function turn() {
  const savings = location.hash === "#savings";
  $("view-try").hidden = savings;
  $("view-savings").hidden = !savings;
  const [here, there] = savings ? ["to-savings", "to-try"] : ["to-try", "to-savings"];
  $(here).setAttribute("aria-current", "page");
  $(there).removeAttribute("aria-current");
  refresh();
}

document.addEventListener("key-needed", ({ detail }) => {
  const form = $("key-form");
  $("key-error").textContent = detail;
  if (form.hidden) {
    form.hidden = false;
    $("key").focus();
  }
});

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    $("key-error").textContent = "A key has only letters, digits and signs, and no blanks.";
    return;
  }
  keepKey(key);
  $("key-error").textContent = "";
  $("key").value = "";
  $("key-form").hidden = true;
  await loadPool();
  refresh();
});

addEventListener("hashchange", turn);
startSavings();
turn();
startTrying();
