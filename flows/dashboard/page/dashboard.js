// The page is whole without this script; with it, what is shown stays fresh and what was opened stays open.
const EVERY_MS = 5000;
const PARTS = ["#main", "#pages", "#looked"];

async function refresh() {
  if (document.hidden) return;
  let fresh;
  try {
    const answer = await fetch(".", { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch {
    document.body.dataset.lost = "";
    document.querySelector("#looked").textContent = "The dashboard is not running any more: start it with make up.";
    return;
  }
  delete document.body.dataset.lost;
  for (const part of PARTS) {
    const old = document.querySelector(part);
    const now = fresh.querySelector(part);
    if (!old || !now) continue;
    for (const details of now.querySelectorAll("details[id]")) {
      const before = document.getElementById(details.id);
      if (before) details.open = before.open;
    }
    // A reader who is in the middle of something is not disturbed, and nothing is redrawn without need.
    const inside = old.contains(document.activeElement) && document.activeElement !== document.body;
    const chosen = getSelection()?.rangeCount && !getSelection().isCollapsed && old.contains(getSelection().anchorNode);
    if (!inside && !chosen && old.innerHTML !== now.innerHTML) old.replaceChildren(...now.childNodes);
  }
}

setInterval(refresh, EVERY_MS);
document.addEventListener("visibilitychange", refresh);
