// Asks for what has changed since the last answer, and puts each part into its element.
"use strict";

const EVERY_MS = 1000;
const token = new URLSearchParams(location.search).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
let seen = 0;

async function look() {
  const link = document.getElementById("link");
  try {
    // No answer within ten seconds is none: a laptop that slept would wait for ever.
    const answer = await fetch(`view?seen=${seen}`, { headers, signal: AbortSignal.timeout(10000) });
    if (!answer.ok) throw new Error(await answer.text());
    const view = await answer.json();
    for (const [id, html] of Object.entries(view.parts)) put(id, html);
    seen = view.revision;
    document.getElementById("name").textContent = view.name;
    document.title = `${view.name}: step ${view.data.step}`;
    link.textContent = view.data.ended ? "over" : "live";
    link.className = "";
  } catch (error) {
    link.textContent = `no answer: is ftkit ui still running? (${error.message})`;
    link.className = "lost";
  }
}

// What the reader has opened stays open.
function put(id, html) {
  const element = document.getElementById(id);
  const open = new Set([...element.querySelectorAll("details[open] summary")].map((s) => s.textContent));
  element.innerHTML = html;
  for (const details of element.querySelectorAll("details")) {
    details.open = open.has(details.querySelector("summary").textContent);
  }
}

(async function follow() {
  if (!document.hidden) await look();  // a page that nobody sees costs nothing
  setTimeout(follow, EVERY_MS);
})();
